"""The work of an evaluation: draws and scores what is missing, and keeps both."""

from collections.abc import Mapping, Sequence

import numpy as np

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.progress import Progress
from dopsd_jax.evaluation import results
from dopsd_jax.evaluation.arms import Arm
from dopsd_jax.evaluation.drawing import Shot
from dopsd_jax.evaluation.gallery import Gallery, value_key
from dopsd_jax.evaluation.results import Score
from dopsd_jax.evaluation.scorer import Case, Judge, PairScorer, Scorer, SetScorer, judges

SCORED_TOGETHER = 16


def shots_of(arm: Arm, cases: Sequence[Case], seeds: int) -> list[Shot]:
    """The pictures that a model is asked for, prompt by prompt; a teacher needs what it teaches."""
    drawn = [case for case in cases if arm.painter.asked(case, arm.role)]
    return [Shot(case, number) for case in drawn for number in range(seeds)]


def draw(arms: Sequence[Arm], cases: Sequence[Case], seeds: int, gallery: Gallery) -> None:
    """Draws the pictures that are not kept yet.

    All encoding comes first, and an encoder or a transformer is freed after its last use, so that
    few of them are in memory together.
    """
    missing = {
        arm.name: [s for s in shots_of(arm, cases, seeds) if not gallery.has(arm.key(s), s)]
        for arm in arms
    }
    busy = [arm for arm in arms if missing[arm.name]]
    last = {id(arm.painter): arm for arm in busy}
    for arm in busy:
        asked = {id(shot.case): shot.case for shot in missing[arm.name]}
        count = None
        for left in arm.painter.encode(list(asked.values()), arm.role):
            count = count or Progress(f"encoding for {arm.name}", left)
            count.advance()
        if last[id(arm.painter)] is arm:
            arm.painter.pipe.release_encoders()
    for arm in busy:
        drawn = arm.painter.draw(arm.trained(), missing[arm.name], arm.role)
        count = Progress(f"drawing {arm.name}", len(missing[arm.name]))
        for shot, image in count.over(drawn):
            gallery.put(arm.key(shot), image, shot, arm.name, arm.role)
        if last[id(arm.painter)] is arm:
            arm.painter.pipe.release_transformer()


def judge(
    scorer: Judge, arms: Sequence[Arm], cases: Sequence[Case], seeds: int, gallery: Gallery
) -> Score:
    """The scores of every model by one scorer. Raises `UserError` if they are not numbers."""
    judged = [case for case in cases if judges(scorer, case)]
    own = {arm.name: shots_of(arm, judged, seeds) for arm in arms}
    asked = [arm for arm in arms if len(own[arm.name]) == len(judged) * seeds]
    if isinstance(scorer, PairScorer):
        return results.score(scorer, _compared(scorer, asked, own, seeds, gallery))
    if not isinstance(scorer, SetScorer):
        values = {a.name: _values(scorer, a, own[a.name], gallery) for a in asked}
        return results.score(scorer, {k: v.reshape(-1, seeds) for k, v in values.items()})
    features = _shaped(scorer, asked, own, seeds, gallery)
    found = results.set_score(scorer, features, scorer.reference(judged), scorer.floor(judged))
    if not np.isfinite([x.value for x in found.arms.values()] + [found.floor]).all():
        raise UserError(f"scorer {scorer.name}: its distance is not a finite number")
    return found


def _values(scorer: Scorer, arm: Arm, shots: Sequence[Shot], gallery: Gallery) -> np.ndarray:
    """Those that are kept are not asked for again."""
    names = {shot: arm.key(shot) for shot in shots}
    keys = {shot: value_key(scorer, names[shot], shot) for shot in shots}
    todo = [shot for shot in shots if gallery.values.get(keys[shot]) is None]
    count = Progress(f"scoring {arm.name}: {scorer.name}", len(todo))
    for some in _of_one_size(todo):
        images = [gallery.picture(names[shot]) for shot in some]
        values = np.asarray(scorer(images, [shot.case for shot in some]), np.float64)
        if values.shape != (len(some),) or not np.isfinite(values).all():
            raise UserError(
                f"scorer {scorer.name}: gave {values.tolist()} for {len(some)} pictures; it must "
                "give a finite number for each"
            )
        gallery.values.put({keys[s]: float(v) for s, v in zip(some, values, strict=True)})
        count.advance(len(some))
    return np.array([gallery.values.get(keys[shot]) for shot in shots])


def _compared(
    scorer: PairScorer,
    arms: Sequence[Arm],
    shots: Mapping[str, Sequence[Shot]],
    seeds: int,
    gallery: Gallery,
) -> dict[str, np.ndarray]:
    """Every model but the base, beside the base."""
    features = _shaped(scorer, arms, shots, seeds, gallery)
    base = features.pop(results.BASE)
    found = {}
    for name, own in features.items():
        values = found[name] = np.asarray(scorer.compare(own, base), np.float64)
        if values.shape != own.shape[:2] or not np.isfinite(values).all():
            raise UserError(f"scorer {scorer.name}: must give a finite number for each picture")
    return found


def _shaped(
    scorer: SetScorer | PairScorer,
    arms: Sequence[Arm],
    shots: Mapping[str, Sequence[Shot]],
    seeds: int,
    gallery: Gallery,
) -> dict[str, np.ndarray]:
    """Features [prompts, pictures, d] of every model."""
    found = {arm.name: _features(scorer, arm, shots[arm.name], gallery) for arm in arms}
    return {name: own.reshape(len(own) // seeds, seeds, -1) for name, own in found.items()}


def _features(
    scorer: SetScorer | PairScorer, arm: Arm, shots: Sequence[Shot], gallery: Gallery
) -> np.ndarray:
    found = []
    for some in _of_one_size(shots):
        images = [gallery.picture(arm.key(shot)) for shot in some]
        found.append(scorer.features(images, [shot.case for shot in some]))
    return np.concatenate(found)


def _of_one_size(shots: Sequence[Shot]) -> list[list[Shot]]:
    """Neighbours of one size, a few at a time, in order."""
    found: list[list[Shot]] = []
    size = lambda shot: (shot.case.height, shot.case.width)
    for shot in shots:
        if found and len(found[-1]) < SCORED_TOGETHER and size(found[-1][0]) == size(shot):
            found[-1].append(shot)
        else:
            found.append([shot])
    return found
