"""The step of a run is compiled once, before there are features and weights."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import RANDOM_CONFIG, ROOT, run_program
from PIL import Image

from dopsd_jax.common.background import Background
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import loading
from dopsd_jax.data.loader import Batches
from dopsd_jax.estimation import compiled_step, counted_step, early_step, remat
from dopsd_jax.estimation.early_step import EarlyStep
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build, data_set

WORDS = ("a red circle", "a blue square far to the left " * 12)  # padded to different lengths
CLASS = {
    "method": "dreambooth",
    "dreambooth.class_word": "circle square",
    "dreambooth.concept_word": "a",
}
FEW_PROMPTS = f"{ROOT}/examples/miniature/ordinary.txt"
ANCHORS = {"anchor.share": 0.5, "batch_size": 4, "accumulate": 2, "anchor.prompts": FEW_PROMPTS}
CASES = {
    "a picture for the teacher": ("zimage:random", {}),
    "anchors, several micro-batches": ("zimage:random", ANCHORS),
    "latents, class prompts": ("zimage:random", CLASS),
    "dropped captions": ("zimage:random", {"data.caption_dropout": 0.5}),
    "masks": ("zimage:random", {"data.masks": "files"}),
    "references": ("flux2_klein:random", {}),
    "smaller cells": ("zimage:tiny", {"data.masks": "files", "data.buckets": "64x64,64x32"}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two sizes of pictures, of which one has a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        size = (96, 96) if i % 2 else (128, 64)
        Image.new("RGB", size, (60 * i, 10, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{i} {WORDS[i // 2]}")
    Image.fromarray(np.eye(96, dtype=np.uint8) * 255).save(folder / "1_mask.png")
    return folder


class Run:
    """What `train` has when it begins to compile, and later."""

    def __init__(self, pictures, workdir, config="zimage:random", **fields):
        given = {"data.path": str(pictures), "data.buckets": "96x96,128x64", **fields}
        self.config = loading.load(config, {k: str(v) for k, v in given.items()})
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.pipe, _ = build.open_pipeline(self.config, workdir, self.mesh)
        self.dataset = data_set.open_data(self.config, workdir, self.pipe)
        self.features = Features(self.pipe, self.dataset, self.config, workdir / "features")
        config, dataset = self.config, self.dataset
        self.batches = Batches(
            *(dataset.rows_by_shape(), dataset.rows, dataset.prompt_keys),
            batch_size=config.batch_size * config.accumulate, seed=0,
            dropout=config.data.caption_dropout,
        )  # fmt: skip

    def given(self, n):
        """What the n-th step is given."""
        index, anchors = self.batches.batch(n), self.features.anchors
        own = self.features.batch(index, self.config.accumulate)
        held = anchors and anchors.batch(index, np.arange(anchors.micro.size))
        put = lambda tree: sharding.put_batch(tree, self.mesh)
        return index.shape, put(own), anchors and put(held)

    def step(self, early):
        """The metrics of the first step."""
        self.features.prepare()
        with jax.set_mesh(self.mesh):
            plan = build.make_plan(self.config, self.pipe, self.mesh, early and early.plan)
            state = plan.initial_state(self.pipe.hand_over())
            if early:
                early.finish()
            shape, batch, held = self.given(0)
            latent = self.config.batch_size, *self.pipe.latent_shape(*shape.bucket[::-1])
            base = self.pipe.split[2]
            return plan.step(state, base, batch, 0, held, latent=latent)[1]

    def begin(self):
        shapes = self.batches.shapes_between(0, 1)
        return EarlyStep(self.config, self.pipe, self.features, self.mesh, shapes)


FEW = {"method": "sft", "sft.samples": 1, "remat": "auto"}  # a step that is quickly compiled


@pytest.fixture
def compiled(caplog):
    """How often a step has been compiled."""
    jax.config.update("jax_log_compiles", True)
    yield lambda: sum("XLA compilation of jit(step)" in r.getMessage() for r in caplog.records)
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize("config", ["zimage:random", "flux2_klein:random"])
def test_what_remat_auto_counts_has_the_anchors_of_the_run(config, pictures, tmp_path, monkeypatch):
    counted, make = [], counted_step.make_program
    monkeypatch.setattr(compiled_step, "device_memory", lambda device: 1 << 40)
    keep = lambda *given: counted.append(make(*given)) or counted[-1]
    monkeypatch.setattr(counted_step, "make_program", keep)
    (tmp_path / "prompts.txt").write_text("a tree\na house by a tree")
    own = ANCHORS | {"anchor.prompts": tmp_path / "prompts.txt", "remat": "auto"}
    run = Run(pictures, tmp_path, config, **own)
    run.features.survey()
    assert remat.settle(run.config, run.pipe, run.features, run.mesh).remat == "none"
    run.features.prepare()
    _, _, held = run.given(0)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(counted[0].anchors) == shapes(held)


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_will_be_given_is_known_before_any_encoder_is_loaded(case, pictures, tmp_path):
    config, fields = CASES[case]
    run = Run(pictures, tmp_path, config, **fields)
    run.features.survey()
    shapes = run.batches.shapes_between(0, run.batches.per_epoch)
    given = early_step.given(run.config, run.features, run.mesh, shapes)
    foreseen = dict(zip(shapes, given, strict=True))
    assert not {"text_encoder", "vlm", "vae"} & run.pipe.__dict__.keys() and len(shapes) == 2
    run.features.prepare()
    for n in range(run.batches.per_epoch):
        shape, *found = run.given(n)
        assert sharding.abstract(found) == list(foreseen[shape][:2])


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("zimage:random_full", {}),
        ("zimage:random", {"base_dtype": "nf4", "lora.kind": "lokr", "remat": "dots"}),
        ("flux2_klein:random", {"dtype": "bfloat16", "remat": "unrolled"}),
    ],
)
def test_the_network_in_shapes_is_the_one_that_is_loaded(config, fields, pictures, tmp_path):
    run = Run(pictures, tmp_path, config, **fields)
    pipe = run.pipe
    own = pipe.family, pipe.config, pipe.attention, run.mesh, pipe.scheduler
    plan, graphdef, base = build.abstract_plan(run.config, *own, pipe.vae_config.factor)
    with jax.set_mesh(run.mesh):
        real = build.make_plan(run.config, run.pipe, run.mesh)
    assert run.pipe.split[0] == graphdef and real.abstract_state == plan.abstract_state
    found = jax.tree.flatten(sharding.abstract(run.pipe.split[2]))
    assert found == jax.tree.flatten(base)
    assert build.make_plan(run.config, run.pipe, run.mesh, (plan, graphdef)) is plan


def test_the_step_that_was_compiled_early_is_the_one_that_runs(pictures, tmp_path, compiled):
    run = Run(pictures, tmp_path, **FEW)
    early = run.begin()
    run.features.prepare()
    early._work.wait()
    assert compiled() == 1
    metrics = run.step(early)
    assert compiled() == 1 and early.saved > 0
    plain = Run(pictures, tmp_path, **FEW).step(None)
    jax.tree.map(np.testing.assert_array_equal, metrics, plain)


def test_a_run_on_other_shapes_than_foreseen_only_compiles_again(
    pictures, tmp_path, compiled, monkeypatch
):
    plain = Run(pictures, tmp_path, **FEW).step(None)
    before = compiled()
    run = Run(pictures, tmp_path, **FEW)
    monkeypatch.setattr(run.features, "outlines", lambda own=run.features.outlines: longer(own()))
    early = run.begin()
    metrics = run.step(early)
    assert compiled() - before == 2
    jax.tree.map(np.testing.assert_array_equal, metrics, plain)


def longer(outlines):
    put = lambda x: x.update(shape=(x.shape[0] + 64, *x.shape[1:])) if x.ndim == 2 else x
    return {shape: jax.tree.map(put, contexts) for shape, contexts in outlines.items()}


def test_a_fault_while_compiling_early_is_told_and_the_step_compiles_as_ever(
    pictures, tmp_path, compiled, monkeypatch, capsys
):
    plain = Run(pictures, tmp_path, **FEW).step(None)
    before = compiled()

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(EarlyStep, "_compile", fail)
    run = Run(pictures, tmp_path, **FEW)
    metrics = run.step(run.begin())
    told = "the step was not compiled early (RuntimeError: RESOURCE_EXHAUSTED: no room)"
    assert told in capsys.readouterr().out
    assert compiled() - before == 1
    jax.tree.map(np.testing.assert_array_equal, metrics, plain)


def test_shapes_come_in_the_order_in_which_batches_have_them(pictures, tmp_path):
    batches = Run(pictures, tmp_path, batch_size=1).batches
    for first in range(2 * batches.per_epoch):
        for stop in range(first, batches.per_epoch * (first // batches.per_epoch + 1) + 1):
            own = dict.fromkeys(batches.batch(n).shape for n in range(first, stop))
            assert batches.shapes_between(first, stop) == list(own)
    assert batches.shapes_between(5, 3) == []


def test_a_thread_says_what_it_raised_and_how_long_it_took():
    work = Background(lambda: time.sleep(0.1))
    work.wait()
    assert 0.1 <= work.seconds < 10
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 / 0).wait()


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise UserError('config.x: is wrong')", 2, "error: config.x: is wrong"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("return 75", 75, ""),
    ],
)
def test_a_program_that_ends_does_not_wait_for_its_threads(end, status, said):
    program = f"""
import time
from dopsd_jax.common import program
from dopsd_jax.common.background import Background
from dopsd_jax.common.errors import UserError
def main():
    Background(lambda: time.sleep(60))
    {end}
program.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == status and said in done.stderr


@pytest.mark.slow
def test_a_run_says_what_was_compiled_beside_its_start(tmp_path):
    done = run_program("train", *RANDOM_CONFIG, "--config.steps=2", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "start.json").read_text())
    assert start["compiling (beside the above)"] > 0
    assert "compiling (beside the above) " in done.stdout
