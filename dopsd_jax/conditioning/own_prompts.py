"""Prompts of the user's own, which are drawn beside rows of the data set: config.sample_prompts."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import expand
from dopsd_jax.conditioning.anchors import KEY, Prompt, lines_of, prompt_set
from dopsd_jax.conditioning.cached import CachedFeatures
from dopsd_jax.conditioning.padding import longest, padded_rows
from dopsd_jax.families.base import STUDENT, PaddedLengths, Tree
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods.method import Needs

FIELD = "config.sample_prompts"


class OwnPrompts:
    """The prompts, and their contexts for the student. folder: of the cache."""

    def __init__(self, pipe: Pipeline, config: ConfigDict, folder: Path):
        self.pipe = pipe
        prompts = chosen(config)
        self.texts = [prompt.text for prompt in prompts]
        absent = [n for n in pipe.ENCODERS[STUDENT] if not pipe.part_folder(n).is_dir()]
        if prompts and absent:
            raise UserError(
                f"{FIELD}: {pipe.part_folder(absent[0])} is not here, so no prompt can be encoded; "
                "leave the field out"
            )
        self.store = None
        if prompts:
            self.store = CachedFeatures(pipe, prompt_set(prompts), config, folder, Needs())

    def survey(self) -> None:
        """Finds the features that are missing."""
        if self.store:
            self.store.survey()

    def compute(self) -> None:
        """Computes the features that are missing."""
        if self.store:
            self.store.compute()

    def rows(self, least: PaddedLengths) -> PaddedLengths:
        """Padded lengths that all prompts have room in: `least` where that is enough."""
        if self.store is None:
            return least
        shapes = self.store.shapes(STUDENT, [KEY])
        return longest(least, padded_rows(shapes, self.pipe, STUDENT, FIELD))

    def contexts(self, rows: PaddedLengths) -> list[Tree]:
        """One for each prompt, of the lengths `rows`."""
        load = lambda number: self.store.load((number, 0), (STUDENT,))[0]
        collate = self.pipe.family.collate
        return [collate([load(number)], rows) for number in range(len(self.texts))]


def chosen(config: ConfigDict) -> Sequence[Prompt]:
    """The prompts that the field names: itself, or the lines of text files.

    A string is one prompt with its commas, or names text files with commas between them. Raises
    `UserError`.
    """
    value, found = config.sample_prompts, []
    items = as_list(value)
    files = [str(item).endswith(".txt") for item in items]
    if isinstance(value, str) and not all(files):
        if len(items) > 1 and any(files):
            raise UserError(
                f"{FIELD}: {value!r} names text files and prompts; write all prompts into a text "
                "file, a prompt a line"
            )
        items, files = (value.strip(),), (False,)
    for item, file in zip(items, files, strict=True):
        if file:
            path = expand(item)
            lines = lines_of(path, FIELD)
            found += [Prompt(FIELD, f"{path}:{line}", text) for line, text in lines]
        else:
            found.append(Prompt(FIELD, FIELD, str(item)))
    return found
