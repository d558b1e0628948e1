"""results.json: the files that a run has written for its user, with their digests.

A result is printed only after its files were compared with these.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dopsd_jax.common.atomic import write_text
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.file_digests import file_digests, files_below
from dopsd_jax.common.json_files import read_json
from dopsd_jax.parallel import multihost

FILE = "results.json"
SETTINGS = ("export_weights", "export_dtype")


class Results:
    """The results of a work directory.

    `config`: the fields of the run's configuration. `SETTINGS` among them decide what the files
    hold: one that was made with others is not the result. Every process calls every method.
    """

    def __init__(self, workdir: epath.PathLike, config: Mapping[str, Any]):
        self.workdir = epath.Path(workdir)
        self.settings = {name: config.get(name) for name in SETTINGS}

    def record(self, paths: Sequence[epath.Path]) -> None:
        """Writes down the digests of `paths`, files or folders that were just written."""
        with multihost.together():
            if not multihost.is_first():
                return
            known = {name: x for name, x in self._read().items() if self._path(name).exists()}
            for path in paths:
                known[self._name(path)] = {"files": _digests(path), "settings": self.settings}
            write_text(self.workdir / FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")

    def faults(self, paths: Sequence[epath.Path]) -> list[str]:
        """A line for each of `paths` that is not what was recorded."""
        faults = []
        with multihost.together():
            if multihost.is_first():
                known = self._read()
                faults = [self._fault(path, known.get(self._name(path))) for path in paths]
        return multihost.gather([fault for fault in faults if fault])[0]

    def _fault(self, path: epath.Path, entry: Any) -> str | None:
        if not path.exists():
            return f"{path}: is missing"
        if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
            return f"{path}: has no digest in {FILE}"
        if entry.get("settings") != self.settings:
            return f"{path}: was written with other settings ({entry.get('settings')})"
        return None if entry["files"] == _digests(path) else f"{path}: was changed or damaged"

    def _read(self) -> dict[str, Any]:
        """The content of the file; nothing if that cannot be read: then results are made again."""
        try:
            found, _ = read_json(self.workdir / FILE)
        except UserError:
            return {}
        return found if isinstance(found, dict) else {}

    def _path(self, name: str) -> epath.Path:
        return self.workdir / name

    def _name(self, path: epath.Path) -> str:
        return epath.Path(path).relative_to(self.workdir).as_posix()


def _digests(path: epath.PathLike) -> dict[str, str]:
    path = epath.Path(path)
    if path.is_dir():
        return file_digests(path, files_below(path))
    return file_digests(path.parent, [path.name])
