"""Many strings in one buffer."""

from array import array
from collections.abc import Iterable, Sequence


class Strings(Sequence[str]):
    """Strings in one buffer of UTF-8."""

    def __init__(self, strings: Iterable[str] = ()):
        self._text, self._ends = bytearray(), array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        # File names may hold bytes that are no UTF-8; they come back as they were.
        self._text += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.many((range(len(self))[i],))[0]

    def many(self, numbers: Iterable[int]) -> list[str]:
        """Those of these numbers, which are 0 or more, in their order."""
        text, ends = self._text, self._ends
        return [text[ends[i] : ends[i + 1]].decode("utf-8", "surrogateescape") for i in numbers]
