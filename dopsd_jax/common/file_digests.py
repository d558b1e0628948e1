"""sha256 of files, read piece by piece, several files at once."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

_THREADS = 4


def file_digests(folder: epath.Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of each file `folder / name`, by name. Raises OSError."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def files_below(folder: epath.Path) -> list[str]:
    """Names of all files in a folder and its subfolders, relative to it, in order."""
    names, root = [], None
    for top, _, files in folder.walk():
        root = root or top  # of a store, `walk` gives paths without gs://
        names += [(top / name).relative_to(root).as_posix() for name in files]
    return sorted(names)
