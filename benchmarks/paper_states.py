"""What the untrained student is taught: the teacher's clean estimates at the states it is asked at.

On-policy these are states of the student's own rollout, off-policy of the teacher's. What the loss
pulls the student's estimate to is looked at as a picture, and the student's own beside it. See
paper.py.
"""

import itertools

import numpy as np
from paper_arms import OPEN, Arm
from paper_run import Bench

from dopsd_jax.common.config_fields import name_or_list
from dopsd_jax.common.flow import euler, x0_hat
from dopsd_jax.families.base import TEACHER
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.families.zimage import family
from dopsd_jax.miniature import judge
from dopsd_jax.miniature import world_scorers as judged

PROMPTS = 12
IDENTITY, CRISP = "identity", "crispness"


def run(bench: Bench, arm: Arm, number: int, seed: int) -> dict[str, object]:
    """Scores of the estimates at every node, for both kinds of states."""
    lesson = bench.lesson(number)
    config = bench.config(lesson.path(OPEN), {})
    pipe = bench.pipe_of(config)
    asked = {"concepts": 0, "ordinary": 0, "bare": PROMPTS}
    cases = judged.cases(lesson.concept, lesson.word, **asked, seed=seed)
    prompts = [case.prompt for case in cases]
    seen = pipe.options(TEACHER, config.teacher)
    shown = pipe.encode_prompt_with_image(prompts, [case.target for case in cases], **seen)
    told = pipe.encode_prompt(prompts)
    nodes = family.grid(name_or_list(config.grid), pipe.scheduler)
    shape = pipe.latent_shape(*cases[0].target.shape[:2])
    found = {}
    for name, mover in (("on-policy", told), ("off-policy", shown)):
        x, found[name] = start_noise(seed, len(cases), shape), []
        for node, after in itertools.pairwise(nodes):
            scores = {"sigma": node}
            for who, context in (("teacher", shown), ("student", told)):
                estimate = pipe.decode(x0_hat(x, pipe.velocity(x, node, context), node))
                scores |= {f"{who} {k}": v for k, v in _scores(estimate, cases).items()}
            found[name].append(scores)
            x = euler(x, pipe.velocity(x, node, mover), node, after)
    return {"targets": found}


def _scores(images: np.ndarray, cases) -> dict[str, float]:
    scenes = [case.truth for case in cases]
    crisp = judged.relative(judge.crispness)(images, scenes)
    return {IDENTITY: float(judged.likeness(images, scenes).mean()), CRISP: float(crisp.mean())}
