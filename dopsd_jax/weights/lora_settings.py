"""A LoRA's scale outside its tensors: in PEFT's json or in header strings."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_fields import Fields, in_json, is_number
from dopsd_jax.common.json_files import parse_json, read_json

HEADER = "lora_adapter_metadata"  # diffusers' header string with PEFT's settings
HEADER_PREFIX = "transformer."
OWN = "dopsd_jax."  # our own header strings
BASE = OWN + "base"  # config.json of the network that a file is for
EDITS = OWN + "edits"  # there where the rows that it was trained on edit pictures
# Single header strings in which trainers put alpha and rank. Not kohya's ss_network_alpha: it says
# how a file was trained, beside alpha tensors; programs that multiply these in leave it as it was.
ALPHAS = ("alpha", "lora_alpha", "network_alpha")
RANKS = ("rank", "lora_rank", "r", "network_dim")
# Starts that also change the base weights, so that the file alone is not the whole change.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
AGAIN = "save the adapter again"
MAX_PATTERNS, MAX_CHOICES = 100, 64
MAX_PATTERN = 300  # characters


class Pattern:
    r"""A pattern of layer names as PEFT's rank_pattern and alpha_pattern have them.

    PEFT takes regular expressions, and a file may hold one that takes forever. Here matching takes
    time in proportion to the name: names, `.`, `\d`, `\w`, each also with `*` or `+`, and `|`, also
    in brackets. Raises ValueError for anything else.
    """

    _ITEM = re.compile(r"(\\[dw.]|\[0-9\]|[\w.-])([*+]?)", re.ASCII)
    _CHOICE = re.compile(r"\(([^()]*)\)(?![*+?{])")

    def __init__(self, text: str):
        if len(text) > MAX_PATTERN:
            raise ValueError("it is too long")
        choices = [text.removeprefix("^").removesuffix("$")]
        while any("(" in choice for choice in choices):
            expanded = []
            for choice in choices:
                if not (group := self._CHOICE.search(choice)):
                    raise ValueError("its brackets are not simple")
                head, tail = choice[: group.start()], choice[group.end() :]
                expanded += [f"{head}{inner}{tail}" for inner in group[1].split("|")]
            choices = expanded[: MAX_CHOICES + 1]
        choices = list(itertools.chain(*(choice.split("|") for choice in choices)))
        if len(choices) > MAX_CHOICES:
            raise ValueError("it is too long")
        self.choices = [self._items(choice) for choice in choices]

    def _items(self, choice: str) -> list[tuple[str, str]]:
        items, at = [], 0
        while at < len(choice):
            if not (found := self._ITEM.match(choice, at)):
                raise ValueError(f"{choice[at:]!r} in it is not understood")
            items.append((found[1], found[2]))
            at = found.end()
        return items

    def matches(self, path: str) -> bool:
        """Whether the pattern is the whole path, or the end of it after a dot."""
        starts = {0} | {i + 1 for i, c in enumerate(path) if c == "."}
        return any(len(path) in _ends(items, path, starts) for items in self.choices)


_PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # a name: its dots are dots
_pattern = functools.lru_cache(MAX_PATTERNS)(Pattern)


def _ends(items: list[tuple[str, str]], path: str, at: set[int]) -> set[int]:
    for item, times in items:
        step = lambda places, item=item: {
            i + 1 for i in places if i < len(path) and _fits(item, path[i])
        }
        reached = set(at) if times == "*" else set()
        new = step(at)
        while new - reached:
            reached |= new
            new = step(new) if times else set()
        at = reached
    return at


def _fits(item: str, character: str) -> bool:
    if item in (r"\d", "[0-9]"):
        return character.isdigit()
    if item == r"\w":
        return character.isalnum() or character == "_"
    return item == "." or item[-1] == character


@dataclasses.dataclass(frozen=True)
class Settings:
    """Rank and alpha as stated outside the tensors.

    Attributes:
      where: the file or header string that says it.
      rank: of layers without one of their own; None: each layer's own.
      alpha: of layers without one of their own.
      ranks, alphas: by patterns of layer names.
      root: rank-stabilised, scale alpha / sqrt(rank).
      loose: single header strings, of the trainer's own layers: alpha tensors go before them.
    """

    where: str
    rank: float | None
    alpha: float
    ranks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    root: bool = False
    loose: bool = False

    def scale(self, paths: Sequence[str], rank: int) -> float:
        """The scale of a layer, by any of its names. Raises ValueError with what is wrong."""
        expected = _first(self.ranks, paths, self.rank)
        if expected not in (None, rank):
            raise ValueError(f"has rank {rank}, but {self.where} says {expected}")
        alpha = _first(self.alphas, paths, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _first(patterns: Mapping[str, Any], paths: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that one of the names matches: PEFT's own rule."""
    for pattern, value in patterns.items():
        plain = _PLAIN.fullmatch(pattern)
        for path in paths:
            if path == pattern or path.endswith(f".{pattern}"):
                return value
            if not plain and _pattern(pattern).matches(path):
                return value
    return default


def from_peft(path: Path) -> Settings:
    """PEFT's adapter_config.json. Raises `UserError` with every fault."""
    content, _ = read_json(path, again=AGAIN, missing=AGAIN, finite=False)
    return _peft_settings(Fields(content, str(path)), "")


def from_header(metadata: Mapping[str, str], path: Path) -> Settings | None:
    """What a file's header strings say; None if nothing. Raises `UserError` with every fault."""
    if HEADER in metadata:
        where = f"{path}: header string {HEADER}"
        content = parse_json(metadata[HEADER], where, AGAIN, finite=False)
        return _peft_settings(Fields(content, where), HEADER_PREFIX)
    alphas, ranks = (_numbers(metadata, names, path) for names in (ALPHAS, RANKS))
    if len(set(alphas.values())) > 1:
        said = ", ".join(f"{name} {value:g}" for name, value in alphas.items())
        raise UserError(f"{path}: its header strings disagree ({said}); {AGAIN}")
    if not alphas:
        return None
    name, alpha = next(iter(alphas.items()))
    return Settings(
        f"{path}: header string {name}", next(iter(ranks.values()), None), alpha, loose=True
    )


def _numbers(metadata: Mapping[str, str], names: tuple[str, ...], path: Path) -> dict[str, float]:
    found = {}
    for name in names:
        text = metadata.get(name, "None")
        if text in ("", "None", "null"):
            continue
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not is_number(found[name]) or found[name] <= 0:
            raise UserError(f"{path}: header string {name} is {text!r}, not a number; {AGAIN}")
    return found


def _peft_settings(fields: Fields, prefix: str) -> Settings:
    get = lambda name: fields.json.get(prefix + name)
    if get("peft_type") not in ("LORA", None):
        fields.problem(f"peft_type {in_json(get('peft_type'))} is not supported, only LORA")
    for name, what in (("use_dora", "DoRA"), ("lora_bias", "biases"), ("fan_in_fan_out", "Conv1D")):
        if get(name):
            fields.problem(f"{name} is set; {what} in adapters is not supported")
    if str(get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        fields.problem(
            f"init_lora_weights {in_json(get('init_lora_weights'))} changes the base model too; "
            "convert the adapter to a plain LoRA with PEFT first"
        )
    for name in ("r", "lora_alpha"):
        if not is_number(get(name)) or get(name) <= 0:
            fields.problem(f"{name} {in_json(get(name))} is not a positive number; {AGAIN}")
    tables = []
    for name in ("rank_pattern", "alpha_pattern"):
        table = get(name) or {}
        good = lambda v: is_number(v) and v > 0
        if not isinstance(table, dict) or not all(map(good, table.values())):
            fields.problem(f"{name} is not a table of positive numbers; {AGAIN}")
            table = {}
        _check_patterns(fields, name, table)
        tables.append(table)
    fields.finish()
    return Settings(
        fields.where, get("r"), float(get("lora_alpha")), *tables, bool(get("use_rslora"))
    )


def _check_patterns(fields: Fields, name: str, table: Mapping[str, Any]) -> None:
    patterns = [pattern for pattern in table if not _PLAIN.fullmatch(pattern)]
    if len(patterns) > MAX_PATTERNS or len(table) > 100 * MAX_PATTERNS:
        fields.problem(f"{name} has {len(table)} patterns, too many; {AGAIN}")
        return
    for pattern in patterns:
        try:
            Pattern(pattern)
        except ValueError as error:
            fields.problem(f"{name} {pattern!r} is not a pattern that is read here: {error}")
