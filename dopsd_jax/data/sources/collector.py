"""Gathers the rows of a data set, with their faults and notes for the user."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from dopsd_jax.common.atomic import NOT_UTF8
from dopsd_jax.common.errors import MAX_PROBLEMS, UserError, is_utf8, one_line
from dopsd_jax.data.blobs import Blob
from dopsd_jax.data.sources.captions import CONCEPT, KNOWN_KEYS
from dopsd_jax.data.table import Table

NOT_READ = "it has so many faults that it was not read to the end"
KEYS_FIELD = "data.prompt_keys"  # names the captions, where no other field does
MAX_HIDDEN = 50_000  # problems that are counted before reading ends
PLACEHOLDERS = ("[trigger]", "[name]")  # of ai-toolkit; stand for the word that is trained
_LINE_END = re.compile(r"\r\n?")


class Examples:
    """How many there are of something, and the first few of them.

    What is added several times in a row is counted each time, and named once.
    """

    def __init__(self, kept: int = 10):
        self.count, self.first, self._kept = 0, [], kept
        self._last, self._repeats = None, 0

    @classmethod
    def of(cls, numbers: Sequence[int], name: Callable[[int], object]) -> "Examples":
        """Things that are known by number; only the first few are named."""
        found = cls()
        found.first = [str(name(int(number))) for number in numbers[: found._kept]]
        found.count = len(numbers)
        return found

    def add(self, item: object) -> None:
        self.count += 1
        if item == self._last:
            self._repeats += 1
            return
        self._last = item
        if len(self.first) < self._kept:
            self.first.append(str(item))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = self.count - self._repeats - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")


def listing(items: Iterable[object], limit: int = 10) -> str:
    """`items` joined by commas; those beyond `limit` are only counted."""
    examples = Examples(limit)
    for item in items:
        examples.add(item)
    return str(examples)


class Collector:
    """Gathers rows into a `Table` and watches which caption keys they have.

    `where`: the source, for messages; `unit`: what its rows are counted in there. `required`: a key
    that every row must have besides, the teacher's. `trigger`: replaces a placeholder.
    `keys_field`: see `Options`. `fields`: the names of the source's fields, for the message when
    none of them is known.
    """

    def __init__(
        self,
        where: str,
        prompt_keys: Sequence[str] | None,
        unit: str,
        required: str | None = None,
        trigger: str = "",
        keys_field: str = KEYS_FIELD,
    ):
        self.where, self.unit, self.required, self.trigger = where, unit, required, trigger
        self.keys_field = keys_field
        self.chosen, besides = prompt_keys is not None, [required] if required else []
        keys = prompt_keys if self.chosen else KNOWN_KEYS
        self.keys = tuple(dict.fromkeys((*keys, *besides)))
        self.table = Table(self.keys, where)
        self.fields: Iterable[str] = ()
        self.counts = dict.fromkeys(self.keys, 0)
        self.missing = {key: Examples() for key in (self.keys if self.chosen else besides)}
        self.empty = {key: Examples() for key in self.keys}
        self.placeholders, self.line_ends, self.untriggered = Examples(), Examples(), Examples()
        self.problems: list[str] = []
        self.hidden = 0  # faults that are only counted
        self.notes: list[str] = []

    def problem(self, problem: str) -> None:
        """Notes a fault. Raises `UserError` where there are so many that this is no data set."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(one_line(problem))  # names in it may be of any length
            return
        self.hidden += 1
        if self.hidden == MAX_HIDDEN:
            counted = f"... and {self.hidden} more"
            raise UserError(*self.problems, counted, f"{self.where}: is no data set; {NOT_READ}")

    def add(
        self,
        image: str | Blob,
        captions: Iterable[tuple[str, str]],
        name: object,
        **facts: object,
    ) -> None:
        """Adds a row whose captions are good; `name` identifies it in a list of faults.

        A caption under `CONCEPT` is the row's concept. A picture whose name no file can hold is a
        fault.
        """
        if not is_utf8(str(image)):
            self.problem(f"{image}: {NOT_UTF8}")
            return
        kept, concept = [], ""
        for key, text in captions:
            if key == CONCEPT:
                concept = text.strip()
            if key in self.counts:
                kept.append((key, self._text(text, name)))
        texts = dict(kept)
        for key, text in texts.items():
            self.counts[key] += 1
            if not text.strip():
                self.empty[key].add(name)
        for key in self.missing:
            if key not in texts:
                self.missing[key].add(name)
        self.table.append(image, kept, concept=concept, **facts)

    def _text(self, text: str, name: object) -> str:
        """A caption as it is trained."""
        if "\r" in text:
            self.line_ends.add(name)
            text = _LINE_END.sub("\n", text)
        for mark in PLACEHOLDERS:
            if mark in text:
                self.placeholders.add(name)
                text = text.replace(mark, self.trigger or mark)
        if self.trigger not in text:
            self.untriggered.add(name)
        return text

    def finish(self) -> tuple[Table, list[str], list[str]]:
        """The rows with the captions that all have, or that were asked for; faults; notes."""
        keys, rows = self.keys, len(self.table)
        if not self.chosen and rows:
            counts = {key: count for key, count in self.counts.items() if count}
            keys = tuple(key for key, count in counts.items() if count == rows)
            partial = [f"{k} ({n} of {rows} rows)" for k, n in counts.items() if n < rows]
            left = f"; left out, because not in every row: {listing(partial)}" if partial else ""
            if keys:
                self.notes.append(f"{self.where}: prompt keys {listing(keys)}{left}")
            else:
                self.problem(self._no_common_key(counts))
        for what, by_key in (("missing", self.missing), ("empty", self.empty)):
            for key, rows_of in by_key.items():
                if (key in keys or key == self.required) and rows_of:
                    other = f"leave the key out of {self.keys_field}"
                    if key == self.required:
                        other = "name another key in teacher.prompt_key"
                    self.problem(
                        f"{self.where}: caption {key!r} is {what} in {self.unit} {rows_of} "
                        f"({rows_of.count} of {rows} rows); write it, or {other}"
                        + (self._fields() if rows_of.count == rows else "")
                    )
        self._remarks()
        if self.hidden:
            self.problems.append(f"... and {self.hidden} more")
        return self.table if self.problems else self.table.only(keys), self.problems, self.notes

    def _remarks(self) -> None:
        """What was changed in captions, and what should have been."""
        found = f"{self.placeholders.count} captions: {self.placeholders}"
        if self.placeholders and not self.trigger:
            self.problem(
                f"{self.where}: the placeholder {' or '.join(PLACEHOLDERS)} stands in {found}; set "
                "data.trigger to the word to put there ('[trigger]' keeps it as it is)"
            )
        elif self.placeholders:
            self.notes.append(f"{self.where}: data.trigger is put for the placeholder in {found}")
        if self.untriggered:
            self.notes.append(
                f"{self.where}: data.trigger {self.trigger!r} is not in "
                f"{self.untriggered.count} captions: {self.untriggered}"
            )
        if self.line_ends:
            self.notes.append(
                f"{self.where}: line ends of Windows are read as plain ones in "
                f"{self.line_ends.count} captions: {self.line_ends}"
            )

    def _fields(self) -> str:
        fields = listing(map(repr, self.fields), 20)
        return f"; the fields here are {fields}" if fields else ""

    def _no_common_key(self, counts: Mapping[str, int]) -> str:
        have = [f"{key} in {n}" for key, n in counts.items()]
        have = f"of {len(self.table)} rows, {listing(have)}" if have else "none is there"
        return (
            f"{self.where}: no caption key is in every row ({have}){self._fields()}; write the "
            f"missing captions under one of {listing(KNOWN_KEYS, 11)}, or name the field of the "
            "captions in data.caption_key"
        )
