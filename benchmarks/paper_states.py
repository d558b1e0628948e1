"""What the untrained student is taught: the teacher's clean estimates at the states it is asked at.

On-policy these are states of the student's own rollout, off-policy of the teacher's. What the loss
pulls the student's estimate to is looked at as a picture. See paper.py.
"""

import itertools

import numpy as np
from paper_records import CONCEPT, CRISP
from paper_run import PROMPTS, Bench

from dopsd_jax.common.config_fields import name_or_list
from dopsd_jax.common.flow import euler, x0_hat
from dopsd_jax.families.pipeline import start_noise
from dopsd_jax.families.zimage import family
from dopsd_jax.miniature import judge, render
from dopsd_jax.miniature import world_scorers as judged


def run(bench: Bench, _, number: int, seed: int) -> dict[str, object]:
    """Scores of the teacher's estimates at every node, for both kinds of states."""
    lesson = bench.lesson(number)
    config = bench.config(lesson.path, {})
    pipe = bench.pipe(config.train, config.lora.rank)
    asked = {"concepts": PROMPTS, "ordinary": 0}
    cases = judged.cases(lesson.concept, lesson.word, **asked, seed=seed)
    prompts = [case.prompt for case in cases]
    seen = {name: config.teacher[name] for name in ("min_pixels", "max_pixels")}
    shown = pipe.encode_prompt_with_image(
        prompts, [case.target for case in cases], **seen, doubled=config.teacher.doubled_template
    )
    told = pipe.encode_prompt(prompts)
    nodes = family.grid(name_or_list(config.grid), pipe.scheduler)
    shape = pipe.latent_shape(*cases[0].target.shape[:2])
    found = {}
    for name, mover in (("on-policy", told), ("off-policy", shown)):
        x, found[name] = start_noise(seed, len(cases), shape), []
        for node, after in itertools.pairwise(nodes):
            target = x0_hat(x, pipe.velocity(x, node, shown), node)
            found[name].append({"sigma": node, **_scores(pipe.decode(target), cases)})
            x = euler(x, pipe.velocity(x, node, mover), node, after)
    return {"targets": found}


def _scores(images: np.ndarray, cases) -> dict[str, float]:
    truth = judged.fitted(images, [case.truth for case in cases])
    edges = judge.crispness(images) / judge.crispness(render.render(truth))
    return {CONCEPT: float(judge.iou(images, truth).mean()), CRISP: float(edges.mean())}
