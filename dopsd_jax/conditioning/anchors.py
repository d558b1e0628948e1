"""The prompts of anchors (`methods.anchor`): which they are, their features, and whose turn it is.

To the encoders they are a data set whose rows have no picture. Where anchors edit pictures, these
are added to the features of a prompt when a batch is made.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand, read_bytes
from dopsd_jax.conditioning.cached import DIGESTS, CachedFeatures
from dopsd_jax.conditioning.encoding import concept_pattern, put_class
from dopsd_jax.conditioning.padding import check_channels, padded_rows
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.dataset import Dataset, spread
from dopsd_jax.data.images import ImageInfo
from dopsd_jax.data.loader import BatchIndex, turn
from dopsd_jax.data.picture_index import Infos
from dopsd_jax.data.prepared import Caption, Prepared
from dopsd_jax.data.prepared_parts import is_prepared
from dopsd_jax.data.sources.captions import prompts_in
from dopsd_jax.data.table import DataRow, Table
from dopsd_jax.families.base import STUDENT, Features, Tree
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods import anchor
from dopsd_jax.methods.anchor import Micro
from dopsd_jax.methods.method import Needs

FOLDER = "anchors"  # of a prepared data set
KEY = "prompt"
FIELD = "config.anchor.prompts"
_SHIPPED = Path(__file__).parents[1] / "data" / "prompts"
GENERAL, EDITS = _SHIPPED / "general.txt", _SHIPPED / "edits.txt"
_LISTS = {anchor.GENERAL: GENERAL, anchor.EDITS: EDITS}
MOST_NEW = 256  # prompts with new words
# Of a syllable: what it may begin with, its vowel, what it may end with.
_ONSETS = (*"bdfgklmnprstvwz", "bl", "dr", "fl", "gr", "kl", "pr", "sn", "tr")
_VOWELS, _CODAS = "aeiou", "bdfklmnprstvz"


class Anchors:
    """The anchors of a run. `micro`: those of a step. folder: of the cache.

    of_row: the student's features of a caption of the data set, whose pictures anchors edit.
    """

    def __init__(
        self,
        pipe: Pipeline,
        dataset: Dataset,
        config: ConfigDict,
        folder: Path,
        micro: Micro,
        of_row: Callable[[Caption], Features],
    ):
        self.pipe, self.micro, self.seed = pipe, micro, config.seed
        self.edit, self.of_row = config.anchor.edit, of_row
        if dataset.features is None:
            self.prompts = prompt_set(choose(config, dataset.rows, dataset.prompt_keys))
            self.store = CachedFeatures(pipe, self.prompts, config, folder, Needs())
        else:
            self.store = open_prepared(dataset.features, pipe, config, folder)
            self.prompts = Dataset(self.store.rows, self.store.infos, (), (KEY,), ())
        kinds = [_kind(row) for row in self.prompts.rows]
        self.kinds = [np.flatnonzero(np.array(kinds) == kind) for kind in dict.fromkeys(kinds)]

    def survey(self) -> None:
        """Finds the features that are missing, and the padded length of all."""
        self.store.survey()
        self.pad()

    def compute(self) -> None:
        """Computes the features that are missing."""
        self.store.compute()

    def pad(self) -> None:
        """Finds the one padded length of all prompts, whose features are there or surveyed."""
        shapes = self.store.shapes(STUDENT, [KEY])
        self.rows = padded_rows(shapes, self.pipe, STUDENT, FIELD)

    def numbers(self, step: int) -> list[int]:
        """The prompts of a step, by number: the kinds in turn, each in an order of its own."""
        count = self.micro.count * self.micro.size
        found = []
        for place in range(step * count, (step + 1) * count):
            each, kind = divmod(place, len(self.kinds))
            own = self.kinds[kind]
            found.append(int(own[turn(each, len(own), self.seed, kind)]))
        return found

    def texts(self, step: int) -> list[str]:
        """The prompts of a step."""
        return [self.prompts.rows[number].captions[0][1] for number in self.numbers(step)]

    def batch(self, index: BatchIndex, places: Int64[np.ndarray, " p"]) -> Tree:
        """Their contexts beside a batch, with a leading axis of micro-batches.

        index: the whole batch, whose rows' pictures anchors edit. places: of each micro-batch, to
        load here.
        """
        numbers = np.reshape(self.numbers(index.n), self.micro)[:, places]
        features = [self.store.load((int(row), 0), (STUDENT,))[0] for row in numbers.ravel()]
        if self.edit:
            beside = np.arange(self.micro.count * self.micro.size).reshape(self.micro)[:, places]
            rows = [int(place) % len(index.rows) for place in beside.ravel()]
            given = [(int(index.rows[i]), int(index.captions[i])) for i in rows]
            features = [
                self._editing(own, self.of_row(c)) for own, c in zip(features, given, strict=True)
            ]
        whole = self.pipe.family.collate(features, self.rows)
        return jax.tree.map(lambda x: x.reshape(*numbers.shape, *x.shape[1:]), whole)

    def outline(self, row: Features) -> Tree:
        """Arrays like the context of an anchor, from `survey` on.

        row: arrays like the features of a caption of the batch.
        """
        like = self.store.outline((0, 0), STUDENT)
        return self.pipe.family.collate(
            [self._editing(like, row) if self.edit else like], self.rows
        )

    @staticmethod
    def _editing(own: Features, row: Features) -> Features:
        """A prompt's features with the references of a row: see `Family.EDITING`."""
        return {**row, **own}

    def describe(self) -> str:
        """The anchors in a line."""
        names = dict.fromkeys(map(_kind, self.prompts.rows))
        counts = [f"{len(own)} {name}" for own, name in zip(self.kinds, names, strict=True)]
        what = "prompts, which edit the rows' references" if self.edit else "prompts"
        return (
            f"anchors: {self.micro.count * self.micro.size} a step, {self.micro.count} x "
            f"{self.micro.size}, of {' and '.join(counts)} {what}"
        )

    def digest(self) -> str:
        """sha256 over the prompts, in order."""
        texts = (f"{_kind(row)} {row.captions[0][1]}" for row in self.prompts.rows)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


class Prompt(NamedTuple):
    """kind: its name in config.anchor.prompts. where: what messages call it."""

    kind: str
    where: str
    text: str


def choose(config: ConfigDict, rows: Sequence[DataRow], keys: Sequence[str]) -> list[Prompt]:
    """The prompts that config.anchor.prompts names, each text once.

    rows, keys: of the data set, whose captions some kinds replace words in. Raises `UserError`.
    """
    found: list[Prompt] = []
    for kind in as_list(config.anchor.prompts):
        if kind in (anchor.CLASS, anchor.NEW_WORDS):
            found += _replaced(config, kind, rows, keys)
        else:
            path = _LISTS.get(kind) or expand(kind)
            found += [Prompt(kind, f"{path}:{line}", text) for line, text in lines_of(path)]
    first: dict[str, Prompt] = {}
    for prompt in found:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def lines_of(path: Path, field: str = FIELD) -> list[tuple[int, str]]:
    """The lines of a text file of prompts that are not blank, with their numbers from 1.

    field: that names the file.
    """
    kinds = f"{', '.join(anchor.KINDS)}, or " if field == FIELD else ""
    content = read_bytes(path, advice=f"{field} takes {kinds}text files with a prompt a line")
    return prompts_in(content, f"{field} {path}")


def _replaced(
    config: ConfigDict, kind: str, rows: Sequence[DataRow], keys: Sequence[str]
) -> list[Prompt]:
    """The captions with the class word, or words that mean nothing, for the concept's."""
    word = config.anchor.concept_word or config.data.trigger
    pattern = concept_pattern(word)
    captions = [(row.where, text) for row in rows for key, text in row.captions if key in keys]
    raise_if(
        f"{where}: its caption has no {word!r}, which stands for the concept by "
        "config.anchor.concept_word or config.data.trigger; name the word that does"
        for where, text in captions
        if not pattern.search(text)
    )
    if kind == anchor.CLASS:
        name = config.anchor.class_word
        return [Prompt(kind, w, put_class(text, word, name)) for w, text in captions]
    put = lambda text, other: pattern.sub(lambda _: other, text)
    some = [captions[i] for i in spread(len(captions), MOST_NEW)]
    each = MOST_NEW // len(some)
    words = enumerate(new_words(each * len(some), config.seed, word))
    return [Prompt(kind, some[i // each][0], put(some[i // each][1], w)) for i, w in words]


def new_words(count: int, seed: int, word: str = "") -> list[str]:
    """Words of one or two syllables that mean nothing, none of them `word`.

    They have as many forms as a user's own words may have: what is held on one form alone leaks to
    words of another.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    pick = lambda parts: parts[int(rng.random() * len(parts))]
    found = []
    while len(found) < count:
        syllables = 1 + int(rng.random() < 0.5)
        parts = []
        for _ in range(syllables):
            closed = rng.random() < 0.5 or syllables == 1  # else hardly a word
            parts += [pick(_ONSETS), pick(_VOWELS), pick(_CODAS) if closed else ""]
        text = "".join(parts)
        if text != word.lower():
            found.append(text)
    return found


def prompt_set(prompts: Sequence[Prompt]) -> Dataset:
    """Prompts as a data set; pictures and sizes stand for none."""
    table, infos = Table((KEY,)), Infos()
    for number, (kind, where, text) in enumerate(prompts):
        table.append(f"{where} ({kind} {number})", [(KEY, text)])
        infos.append(ImageInfo(1, 1, hashlib.sha256(text.encode()).hexdigest(), ()))
    return Dataset(table, infos, (Bucket(1, 1),) * len(prompts), (KEY,), ())


def _kind(row: DataRow) -> str:
    return str(row.image).rpartition("(")[2].rpartition(" ")[0]


def settings(config: ConfigDict, pipe: Pipeline, folder: Path) -> Mapping[str, object]:
    """What prepared anchors depend on; encoders that are not here are left out."""
    names = [name for name in pipe.ENCODERS[STUDENT] if pipe.part_folder(name).is_dir()]
    own = {n: config.anchor[n] for n in ("prompts", "concept_word", "class_word")}
    own["prompts"] = list(as_list(own["prompts"]))
    digests = {name: pipe.part_digest(name, Path(folder) / DIGESTS) for name in names}
    return {"dtype": config.dtype} | own | pipe.options(STUDENT, config.teacher) | digests


def open_prepared(prepared: Prepared, pipe: Pipeline, config: ConfigDict, folder: Path) -> Prepared:
    """The anchors beside a prepared data set. Raises `UserError` if there are none, or others."""
    path = prepared.folder / FOLDER
    if not is_prepared(path):
        raise UserError(
            f"{prepared.folder}: was prepared without anchors; prepare it again with the fields "
            "config.anchor, or set config.anchor.share to 0"
        )
    found, wanted = Prepared(path), settings(config, pipe, folder)
    names = {name: f"config.anchor.{name}" for name in config.anchor}
    found.check(wanted, {name: names.get(name, name) for name in wanted})
    check_channels(found, pipe, STUDENT)
    return found
