"""The interface of scorers, and how they are found.

A scorer judges pictures one by one, or beside the base's, or a set of pictures as a whole.
`--scorers=package.module:attribute` names a scorer of your own, or a function without arguments
that makes one.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from dopsd_jax.common.errors import UserError, raise_if

Picture = UInt8[np.ndarray, "_H _W 3"]  # of several pictures each has its own size
BETTER, NEEDS = ("higher", "lower"), ("prompt", "target")


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt, and what pictures of it are compared with.

    kind: which scorers it is for: of real data sets `training` (a row's own caption), `test` and
      `ordinary` (a test without the word that is taught); of the miniature those of
      `miniature.world_scorers`.
    prompt: what is drawn. text: what is scored, with the class word in place of a placeholder.
    seed: of the first picture's noise.
    target: the picture that likeness is measured to, and that the teacher is shown.
    shown: what the teacher is shown in the place of the target; None: the target.
    told: the caption of a teacher that sees no picture (config.teacher.context=prompt); "": this
      teacher does not draw the case.
    references: the pictures that are edited.
    truth: what the miniature's judge compares with, a `miniature.world.Scene`.
    truth_digest: names it.
    """

    kind: str
    prompt: str
    text: str
    height: int
    width: int
    seed: int
    target: Picture | None = None
    references: Sequence[Picture] = ()
    truth: Any = None
    truth_digest: str = ""
    shown: Picture | None = None
    told: str = ""


def digest(image: Picture) -> str:
    """sha256 of a picture's size and pixels."""
    size = repr(image.shape).encode()
    return hashlib.sha256(size + np.ascontiguousarray(image).tobytes()).hexdigest()


@runtime_checkable
class Scorer(Protocol):
    """Judges pictures one by one.

    name: of the row in the tables. better: `higher` or `lower`.
    kinds: the kinds of cases it judges; empty: all.
    needs: what it looks at besides the picture: `prompt` (`Case.text`), `target`.
    identity: names weights and settings; values are kept under it and reused.
    """

    name: str
    better: str
    kinds: Sequence[str]
    needs: Sequence[str]
    identity: str

    def __call__(self, images: Sequence[Picture], cases: Sequence[Case]) -> Sequence[float]:
        """A finite number for each picture; `cases[i]` is the one that `images[i]` was drawn for.

        All pictures of a call have the same size.
        """


@runtime_checkable
class SetScorer(Protocol):
    """Judges a set of pictures by comparing the distribution of features with a reference's.

    The other members are those of `Scorer`. `floor`: what the figure is for real pictures in place
    of samples, given the cases; printed beside it.
    """

    name: str
    better: str
    kinds: Sequence[str]
    needs: Sequence[str]
    identity: str

    def features(
        self, images: Sequence[Picture], cases: Sequence[Case]
    ) -> Float[np.ndarray, "n d"]:
        """Of each picture."""

    def reference(self, cases: Sequence[Case]) -> Float[np.ndarray, "n d"]:
        """Features of one real picture for each case."""

    def distance(self, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
        """Between two sets of features."""

    def floor(self, cases: Sequence[Case]) -> float:
        """The distance of other real pictures to the reference."""


@runtime_checkable
class PairScorer(Protocol):
    """Compares a model's pictures with the base model's of the same prompt and noise.

    The other members are those of `Scorer`. The base itself has no score. least: pictures a prompt
    that it needs.
    """

    name: str
    better: str
    kinds: Sequence[str]
    needs: Sequence[str]
    identity: str
    least: int

    def features(
        self, images: Sequence[Picture], cases: Sequence[Case]
    ) -> Float[np.ndarray, "n d"]:
        """Of each picture."""

    def compare(
        self, own: Float[np.ndarray, "p s d"], base: Float[np.ndarray, "p s d"]
    ) -> Float[np.ndarray, "p s"]:
        """Of p prompts with s pictures each, `own[i, j]` and `base[i, j]` from the same noise."""


Judge = Scorer | SetScorer | PairScorer
MEMBERS = ("name", "better", "kinds", "needs", "identity")


def judges(scorer: Judge, case: Case) -> bool:
    """Whether a scorer says anything about pictures of a case."""
    wanted = not scorer.kinds or case.kind in scorer.kinds
    return wanted and (case.target is not None or "target" not in scorer.needs)


def load_scorers(
    names: Sequence[str], known: dict[str, Callable[[], Judge]], option: str = "--scorers"
) -> list[Judge]:
    """The scorers that `names` are of: some of `known`, or `module:attribute` of the user's.

    `option`: what messages call the names. Raises `UserError` with every name that is of none, and
    every scorer that is incomplete; of `known` that cannot be made, with how to go on without it.
    """
    found: list[Judge] = []
    faults: list[str] = []
    failed: dict[str, tuple[str, ...]] = {}
    for name in names:
        try:
            if name in known:
                found.append(known[name]())
            elif ":" in name:
                found.append(_users(name, option))
            else:
                faults.append(
                    f"{option}: {name!r} is not one of {', '.join(known)}, or module:attribute"
                )
        except UserError as error:
            failed[name] = error.problems
    others = ",".join(name for name in names if name not in failed)
    for name, (first, *more) in failed.items():
        way_out = f"; or leave it out: {option}={others}" if others and name in known else ""
        faults += [first + way_out, *more]
    doubled = {s.name for s in found if [o.name for o in found].count(s.name) > 1}
    faults += [f"{option}: two of them are called {name!r}" for name in sorted(doubled)]
    raise_if(faults)
    return found


def _users(where: str, option: str) -> Judge:
    module, _, attribute = where.partition(":")
    done = "imported"
    try:
        scorer = importlib.import_module(module)
        for part in attribute.split("."):
            scorer = getattr(scorer, part)
        if inspect.isclass(scorer) or inspect.isfunction(scorer):
            done = "made"
            scorer = scorer()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(f"{option}={where}: cannot be {done} ({what})") from None
    lacking = [name for name in MEMBERS if not hasattr(scorer, name)]
    if not isinstance(scorer, SetScorer | PairScorer) and not callable(scorer):
        lacking.append("__call__(images, cases)")
    if lacking:
        raise UserError(f"{option}={where}: is no scorer, it has no {', '.join(lacking)}")
    for name in ("name", "identity"):
        if not isinstance(getattr(scorer, name), str):
            raise UserError(f"{option}={where}: `{name}` is no text but {getattr(scorer, name)!r}")
    for name in ("kinds", "needs"):
        if not isinstance(own := getattr(scorer, name), Collection) or isinstance(own, str):
            raise UserError(f"{option}={where}: `{name}` is {own!r}, not a list of names")
    if scorer.better not in BETTER:
        raise UserError(f"{option}={where}: `better` is {scorer.better!r}, not higher or lower")
    unknown = [need for need in scorer.needs if need not in NEEDS]
    if unknown:
        raise UserError(f"{option}={where}: it needs {unknown[0]!r}; it can have {NEEDS}")
    return scorer
