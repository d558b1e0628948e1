"""The other names under which checkpoints hold a network's tensors, and views between them.

The canonical names are those of diffusers and transformers, as the networks' `names` lists them. A
layout says which canonical tensors, stacked, make each of its own. Layouts are recognised by their
names alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.models.names import Leaf, Source
from dopsd_jax.weights.tensors import Piece, Recipe, Tensors, View
from dopsd_jax.weights.validation import check_tensors, sources

CANONICAL = "diffusers"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a layout: canonical tensors stacked along the first axis, then given `shape`.

    swapped: it is one canonical tensor whose first half of rows stands last.
    """

    name: str
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    swapped: bool = False

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Of one tensor, as this one and the canonical one are made of each other."""
        half = self.shape[0] // 2 if self.swapped else 0
        return (Piece(name, (half, 2 * half)), Piece(name, (0, half))) if half else (Piece(name),)

    @classmethod
    def stacked(cls, name: str, parts: Sequence[Source]) -> "Entry":
        rows = sum(part.shape[0] for part in parts)
        return cls(name, tuple(parts), (rows, *parts[0].shape[1:]))


@dataclasses.dataclass(frozen=True)
class Layout:
    """All tensors of a layout, those that may be missing (`extras`), and possible prefixes."""

    name: str
    entries: tuple[Entry, ...]
    extras: tuple[Entry, ...] = ()
    prefixes: tuple[str, ...] = ("",)


@dataclasses.dataclass(frozen=True)
class Found:
    """A recognised layout, and the prefix that the names carry."""

    layout: Layout
    prefix: str


def canonical(leaves: Iterable[Leaf], unused: Iterable[Source] = ()) -> Layout:
    """The layout in which every tensor is itself."""
    one = lambda name, shape: Entry(name, (Source(name, shape),), shape)
    return Layout(
        CANONICAL,
        tuple(one(n, s) for n, s in sources(leaves).items()),
        tuple(one(u.name, u.shape) for u in unused),
    )


def renamed(name: str, base: Layout, rename: Mapping[str, str]) -> Layout:
    """`base` with parts of names replaced, in the mapping's order."""

    def one(entry: Entry) -> Entry:
        new = entry.name
        for old, replacement in rename.items():
            new = new.replace(old, replacement)
        return dataclasses.replace(entry, name=new)

    entries, extras = (tuple(map(one, group)) for group in (base.entries, base.extras))
    return Layout(name, entries, extras)


def recognise(where: str, names: Iterable[str], layouts: Sequence[Layout]) -> Found:
    """The layout and prefix that most of the names belong to. Raises `UserError` if none does."""
    names, best, most = set(names), None, 0
    for layout in layouts:
        for prefix in layout.prefixes:
            count = sum(prefix + entry.name in names for entry in layout.entries)
            if count > most:
                best, most = Found(layout, prefix), count
    if best is None:
        few = ", ".join(sorted(names)[:3])
        raise UserError(
            f"{where}: holds no tensor of this network (its names are such as {few or 'none'}); "
            "is this the right file?"
        )
    return best


def as_canonical(tensors: Tensors, found: Found) -> View:
    """The tensors under canonical names. Raises `UserError` unless every one is accounted for."""
    prefix, layout = found.prefix, found.layout
    needed = {prefix + e.name: e.shape for e in layout.entries}
    extras = [e for e in layout.extras if prefix + e.name in tensors.infos]
    check_tensors(
        tensors.where, tensors.infos, needed, [Source(prefix + e.name, e.shape) for e in extras]
    )
    recipes = {}
    for entry in (*layout.entries, *extras):
        if len(entry.sources) == 1:
            pieces = entry.pieces(prefix + entry.name)
            recipes[entry.sources[0].name] = Recipe(pieces, entry.sources[0].shape)
            continue
        first = 0
        for source in entry.sources:
            rows = (first, first + source.shape[0])
            recipes[source.name] = Recipe((Piece(prefix + entry.name, rows),), source.shape)
            first = rows[1]
    return View(tensors, recipes)


def in_layout(tensors: Tensors, found: Found) -> View:
    """Canonical tensors under the names of a layout: the inverse of `as_canonical`.

    Extras that the layout does not know are left out; so are those that the tensors do not have.
    """
    layout = found.layout
    extras = [e for e in layout.extras if e.sources[0].name in tensors.infos]
    faults = []
    for entry in layout.entries:
        types = {tensors.infos[s.name].dtype for s in entry.sources}
        if len(types) > 1:
            faults.append(
                f"{tensors.where}: {', '.join(s.name for s in entry.sources)} are stored in "
                f"different types ({', '.join(sorted(types))}) but are one tensor in the "
                f"{layout.name} layout; choose one type (--dtype)"
            )
    raise_if(faults)
    recipes = {
        found.prefix + e.name: Recipe(sum((e.pieces(s.name) for s in e.sources), ()), e.shape)
        for e in (*layout.entries, *extras)
    }
    return View(tensors, recipes)
