"""The step of a run, compiled in a thread while features are made and weights are loaded.

It is known before both: tokens are counted without an encoder (`Features.survey`), and the network
in shapes is the one that is loaded later. JAX keeps a program with its function, so the first call
with arrays of these shapes finds it. Nothing depends on that: for other arrays the function
compiles as it would have without this, and so it does after a fault in the thread, which then
appears where it always did.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax.common.background import Background
from dopsd_jax.common.errors import one_line
from dopsd_jax.conditioning.features import Features
from dopsd_jax.data.buckets import Shape
from dopsd_jax.estimation import abstract_step, remat
from dopsd_jax.families.base import Tree
from dopsd_jax.families.pipeline import Pipeline
from dopsd_jax.methods.flow_matching import Batch
from dopsd_jax.parallel import multihost
from dopsd_jax.run import build


class EarlyStep:
    """The programs of a run's step, one for each shape of rows.

    plan: the step, with the network's graph, for `build.make_plan`; None if nothing is compiled
    early. saved: seconds of compiling that nothing waited for, once it is finished.
    """

    plan: tuple[build.Plan, nnx.GraphDef] | None = None
    saved = 0.0

    def __init__(
        self,
        config: ConfigDict,
        pipe: Pipeline,
        features: Features,
        mesh: Mesh,
        shapes: Sequence[Shape],
    ):
        """Begins to compile. shapes: of the batches, in the order in which they come.

        Raises `UserError` as `Features.survey` and `remat.settle` do.
        """
        # Of several processes the first makes the features while the others wait, and a GPU's
        # compiler asks those of the other processes which kernels are fast: all compile at the
        # first step, see `multihost.begin_together`.
        if jax.process_count() > 1 or not shapes:
            return
        features.survey()
        remat.settle(config, pipe, features, mesh)
        config = config.copy_and_resolve_references()
        config.remat = pipe.remat
        own = pipe.family, pipe.config, pipe.attention, mesh, pipe.scheduler, pipe.vae_config.factor
        plan, graphdef, base = build.abstract_plan(config, *own)
        self.plan = plan, graphdef
        programs = []
        for batch, anchors, latent in given(config, features, mesh, shapes):
            arguments = plan.abstract_state, base, batch, 0, anchors
            programs.append(functools.partial(plan.step.lower, *arguments, latent=latent))
        self._enough = threading.Event()
        self._work = Background(lambda: self._compile(programs, mesh))

    def _compile(self, programs: Sequence[Callable[[], jax.stages.Lowered]], mesh: Mesh) -> None:
        with jax.set_mesh(mesh):
            for number, lower in enumerate(programs):
                if number and self._enough.is_set():  # a device has no room for both
                    break
                lower().compile()

    def finish(self) -> None:
        """Waits for the first program, or for the one that is being compiled.

        Called before the first step: what is not begun then is compiled when it is needed.
        """
        if self.plan is None:
            return
        self._enough.set()
        begin = time.monotonic()
        try:
            self._work.wait()
        except Exception as error:
            what = one_line(f"{type(error).__name__}: {error}")[:300]
            multihost.say(f"the step was not compiled early ({what}); it is compiled now")
        self.saved = max(0.0, self._work.seconds - (time.monotonic() - begin))


def given(
    config: ConfigDict, features: Features, mesh: Mesh, shapes: Sequence[Shape]
) -> Iterator[tuple[Batch, Tree | None, tuple[int, ...]]]:
    """What steps on rows of these shapes are given: batch, anchors, and the shape of the noise.

    All in shapes, types and placements; from `Features.survey` on.
    """
    pipe, anchors, outlines = features.pipe, features.anchors, features.outlines()
    for shape in shapes:
        student, teacher, *held = outlines[shape]
        width, height = shape.bucket
        case = abstract_step.workload(pipe, height, width)
        batch = abstract_step.batch_shapes(config, case, (student, teacher), mesh)
        put = anchors and abstract_step.samples(mesh, *anchors.micro)
        beside = jax.tree.map(put, held[0]) if held else None
        yield batch, beside, (config.batch_size, *pipe.latent_shape(height, width))
