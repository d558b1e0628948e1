"""What a layout is, and the options that it reads with."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dopsd_jax.common.config_fields import shown
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.data.cache import FeatureCache
from dopsd_jax.data.sources.collector import KEYS_FIELD, Collector

MAX_KEYS = 200


@dataclass(frozen=True)
class Options:
    """How rows are read.

    prompt_keys: the captions that every row must have; None: all known keys that every row has.
    keys_field: the field that names them, for messages.
    caption_extension: of the caption file beside a picture. caption_lines: each of its lines is an
    alternative. data_root: where relative pictures are looked for besides. cache: keeps the indices
    of archives. teacher_key: a further key that every row must have (teacher.prompt_key).
    image_key: the field of a record that names its picture; "": one of the known names.
    trigger: replaces the placeholder [trigger]. folder_captions: a picture without a caption file
    takes the name of its folder. folder_repeats: a folder `10_name` counts ten times. references:
    where the pictures are that are edited: `auto` or columns of a table, or folders; empty: there
    are none. masks: pictures have mask files beside them.
    """

    prompt_keys: Sequence[str] | None = None
    caption_extension: str = ".txt"
    caption_lines: bool = False
    data_root: str | Path | None = None
    cache: FeatureCache | None = None
    teacher_key: str | None = None
    image_key: str = ""
    trigger: str = ""
    folder_captions: bool = False
    folder_repeats: bool = False
    references: Sequence[str] = ()
    masks: bool = False
    keys_field: str = KEYS_FIELD

    def check(self) -> None:
        """Raises `UserError` for the first option that cannot be."""
        keys, root = self.prompt_keys, self.data_root
        if root and not os.path.isdir(expand(root)):
            raise UserError(f"data.root {root}: no such folder")
        if isinstance(keys, str):
            raise UserError(f"{self.keys_field} is the string {keys!r}; it must be a list")
        if keys is not None and not keys:
            raise UserError(f"{self.keys_field} is empty; name at least one key, or leave it unset")
        if keys is not None and len(keys) > MAX_KEYS:
            raise UserError(f"{self.keys_field} has {len(keys)} keys; name {MAX_KEYS} at most")
        if not all(isinstance(name, str) for name in self.references):
            raise UserError(
                f"data.references is {shown(self.references)}; it must name columns or folders"
            )
        if not self.caption_extension.startswith("."):
            raise UserError(
                f"data.caption_extension {self.caption_extension!r}: must start with a dot, "
                "as '.txt'"
            )

    def collector(self, where: Path, unit: str, keys: Sequence[str] | None = None) -> Collector:
        """Gathers the rows of `where`, counted in `unit`; `keys`: all that this layout can have."""
        chosen = self.prompt_keys if keys is None else keys
        own = self.teacher_key, self.trigger, self.keys_field
        return Collector(str(where), chosen, unit, *own)


class Layout(NamedTuple):
    """One way to lay out a data set.

    name: in words. matches: whether a path, which may hold the wildcards * ? [, is laid out this
    way. read: gathers rows, faults and notes; what makes the whole path useless is a `UserError`.
    """

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, Options], Collector]
