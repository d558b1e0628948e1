"""The compiled step does the work that the method asks for, and little beside it.

No times: figures of the compiled program, which are the same on every machine. Each bound is what
there is a reason for, so a new one needs a new reason. tests/test_flops.py says that the traced
step has the counted products; here it is the compiler's own program that is counted.
"""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import program_work
import pytest

from dopsd_jax import dopsd, families
from dopsd_jax.config.fields import defaults
from dopsd_jax.estimation import abstract_step, compiled_step, program_text
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.models.zimage_config import ZImageConfig
from dopsd_jax.run import build

ZIMAGE = {"dim": 128, "layers": 5, "refiner_layers": 2, "heads": 4, "caption_dim": 32}
KLEIN = {"heads": 4, "head_dim": 32, "double_layers": 2, "single_layers": 5, "text_dim": 48}
GRID = (1.0, 0.7, 0.3, 0.0)
NODES = len(GRID) - 1
DEPTH = 5  # of the deepest stack, and of no other
LAYERS = 2 + DEPTH  # that see image and time
# Adapters in one stack are compiled in half of the time; the first case has all, as users have.
FEW = {"zimage": "main", "flux2_klein": "klein_upstream"}
CASES = [(family, remat) for family in ("zimage", "flux2_klein") for remat in ("none", "full")]
CASES.append(("flux2_klein", "dots"))
by_case = pytest.mark.parametrize(("name", "remat"), CASES)


class Step(NamedTuple):
    """A step that was compiled, what is known without a compiler, and the lines it was given."""

    report: compiled_step.Report
    program: abstract_step.Program
    compiled: jax.stages.Compiled
    text: program_text.Program
    given: int


def workload(name: str, deeper: int = 0) -> abstract_step.Workload:
    """A small network, in which an image's tokens outweigh a text's; `deeper`: layers more."""
    if name == "zimage":
        sizes = ZIMAGE | {"layers": ZIMAGE["layers"] + deeper}
        size, rows = ZImageConfig(**sizes, axes_dims=(8, 12, 12)), (32, 64)
    else:
        sizes = KLEIN | {key: KLEIN[key] + deeper for key in ("double_layers", "single_layers")}
        size, rows = Flux2Config(**sizes, axes_dims=(8, 8, 8, 8)), (512, 512)
    return abstract_step.Workload(families.load(name), size, 256, 256, *rows)


def lowered(name: str, remat: str, grid=GRID, deeper: int = 0):
    """What is known of a step without the compiler, and what the compiler is given."""
    config = defaults()
    config.family, config.model, config.remat = name, build.RANDOM, remat
    config.dtype = config.base_dtype = "float32"
    config.batch_size, config.lora.rank = 1, 4
    if (name, remat) != CASES[0]:
        config.lora.targets = FEW[name]
    config.grid = ",".join(map(str, grid))
    found, lower = compiled_step.prepare(config, workload(name, deeper), jax.devices()[:1])
    return found, *lower()


@functools.cache
def step(name: str, remat: str) -> Step:
    return compiled(name, remat)


def compiled(name: str, remat: str) -> Step:
    report, given, program = lowered(name, remat)
    done = given.compile()
    lines = given.as_text().count("\n")
    return Step(report, program, done, program_text.read(done.as_text()), lines)


def executed(own: Step) -> float:
    """Products that run, in those that are counted."""
    return program_work.product_flops(own.text) / own.report.work.executed


def reads(own: Step) -> dict[tuple[int, ...], float]:
    """How often each kernel of the deepest stack is read in a step, by its shape."""
    kernels = Counter(leaf.shape for leaf in jax.tree.leaves(own.program.base) if deepest(leaf))
    assert len(kernels) > 1
    return {shape: program_work.reads(own.text, shape) / count for shape, count in kernels.items()}


def deepest(leaf) -> bool:
    return leaf.ndim == 3 and leaf.shape[0] == DEPTH


@by_case
def test_no_product_is_done_that_is_not_counted(name, remat):
    """Of the counted ones some are missing: those of a single row become sums, and what no gradient
    needs is not computed again."""
    work = step(name, remat).report.work
    assert 0.9 < executed(step(name, remat)) <= 1
    again = work.executed - work.model
    assert again > 0  # attention makes its weights again, with every remat
    own = step(name, "none").report.work
    assert (again > own.executed - own.model) == (remat == "full")


@by_case
def test_a_layer_is_taken_from_its_stack_once_a_pass(name, remat):
    """Three passes a node: the teacher's, the student's, and the gradient's, in which a layer that
    is computed again uses the same copy. A stack that is copied, transposed or converted whole
    would count as one more."""
    assert max(reads(step(name, remat)).values()) <= 3 * NODES


@by_case
def test_memory_holds_what_the_backward_pass_needs_and_one_layer(name, remat):
    """Beside what is kept of the forward pass and two sums of gradients (of the rollout, of the
    step), one layer's backward pass at a time: the gradient of each of its arrays, a copy of each
    in the order in which a product takes it, and with remat the arrays themselves; attention's
    weights, which no pass keeps, and their gradient; and for each pass the layer's weights, taken
    from the stack. No node keeps anything."""
    own = step(name, remat)
    layer = step(name, "none").report.account.activations / LAYERS
    kernels = sum(
        4 * leaf.size / DEPTH for leaf in jax.tree.leaves(own.program.base) if deepest(leaf)
    )
    case = workload(name)
    tokens = (case.height // 16) * (case.width // 16) + case.rows_student
    attended = 4 * case.size.heads * tokens**2
    account, copies = own.report.account, {"none": 2, "dots": 3, "full": 3}[remat]
    bound = account.activations + 2 * account.gradient + copies * layer + 2 * attended + 3 * kernels
    assert own.compiled.memory_analysis().temp_size_in_bytes < bound
    if remat == "full":  # the bound would not hold for a step that keeps everything
        assert step(name, "none").compiled.memory_analysis().temp_size_in_bytes > bound


@by_case
def test_a_program_is_as_long_as_what_the_compiler_is_given(name, remat):
    """An operation becomes a line in a fused loop, a parameter or two of that loop, a constant, and
    its part of the line that runs the loop: five. A state of n arrays whose checks are repeated
    for each of them would have n * n more."""
    own = step(name, remat)
    assert sum(map(len, own.text.bodies.values())) < 5 * own.given


@pytest.mark.parametrize("name", ["zimage", "flux2_klein"])
def test_a_program_grows_neither_with_layers_nor_with_nodes(name):
    """Beyond a few constants. A layer or a node that is unrolled has hundreds of lines."""
    _, larger, _ = lowered(name, "full", (*GRID[:-1], 0.2, 0.1, 0.0), deeper=3)
    assert abs(larger.as_text().count("\n") - step(name, "full").given) < 20


def test_the_bounds_find_a_teacher_that_is_asked_twice(monkeypatch):
    """Of two answers the mean: a fourth pass."""
    once = dopsd.ask_teacher

    def twice(*own):
        ask = once(*own)
        return lambda x, node: (ask(x, node) + ask(1.001 * x, node)) / 2

    monkeypatch.setattr(dopsd, "ask_teacher", twice)
    own = compiled("flux2_klein", "none")
    assert executed(own) > 1.1
    assert max(reads(own).values()) == 4 * NODES
