"""What benchmarks/on_gpu.py measures: every case is a command, run in a process of its own."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dopsd_jax.common import gpu_flags

SIDES = (512, 768, 1024)
CARDS = (12, 16, 24, 48, 80)  # GiB
SECTIONS = ("ceiling", "step", "switch", "torch", "full", "card", "sampling", "filling", "start")
MINUTES = {"start": 10, "filling": 10}  # a case may take; of all others 6
# Family, model, recipe, rows of the student's and the teacher's captions (None: as all texts are).
MODELS = {
    "zimage": ("zimage", "lora", "128,704"),
    "klein 4b": ("flux2_klein", "4b", None),
    "klein 9b": ("flux2_klein", "9b", None),
}
SHORT = {"zimage": "32,64"}  # the same in a dry run
# One switch alone each, beside the options that the programs set themselves. XLA's own defaults for
# the others: command buffers for kernels and products, no dynamic_slice_fusion, gemm_fusion 0.
XLA = {
    "dynamic slices in products": "--xla_gpu_enable_dynamic_slice_fusion=true",
    "loops in command buffers": "--xla_gpu_enable_command_buffer=+WHILE",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "tiles searched exhaustively": "--xla_gpu_exhaustive_tiling_search=true",
    "cuDNN's fused products": "--xla_gpu_cudnn_gemm_fusion_level=2",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "cuBLASLt": "--xla_gpu_enable_cublaslt=true",
    "loops double buffered": "--xla_gpu_enable_while_loop_double_buffering=true",
}
TORCH = {  # see torch_step.py; the first is how the released code computes
    "checkpointing": "checkpointing",
    "plain": "plain",
    "per step": "per_step",
    "per step, checkpointing": "per_step,checkpointing",
    "per step, compiled": "per_step,compile",
    "per step, compiled, checkpointing": "per_step,compile,checkpointing",
}
FULL = {
    "float32 moments": {},
    "bfloat16 moments, teacher on the host": {
        "moments_dtype": "bfloat16", "offload": "teacher"
    },
    "adafactor, teacher on the host": {"optimizer": "adafactor", "offload": "teacher"},
}  # fmt: skip
BASES = {
    "bfloat16": {"base_dtype": "bfloat16"},
    "int8": {"base_dtype": "int8"},
    "fp8": {"base_dtype": "fp8"},
    "nf4": {"base_dtype": "nf4"},
    "streamed": {"base_dtype": "bfloat16", "offload": "base"},
}


class Case(NamedTuple):
    """name: begins with the section. command: a script of this folder and its words.

    env: of the process. card: GiB of the whole card that it may use; None: all there is. group:
    once one of its cases fits on a card, larger cards are not tried.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = {}
    card: int | None = None
    group: str = ""

    @property
    def section(self) -> str:
        return self.name.partition(":")[0]

    @property
    def seconds(self) -> int:
        """The most that it may take."""
        return 60 * MINUTES.get(self.section, 6)


def cases(dry: bool) -> list[Case]:
    """All of them, in the order in which they are run; `dry`: at tiny sizes, for a CPU."""
    makers = (_ceiling, _steps, _switches, _torch, _full, _cards, _sampling, _around)
    return [case for maker in makers for case in maker(dry)]


def _ceiling(dry: bool) -> Iterator[Case]:
    yield Case("ceiling: product", ("ceiling.py", f"--side={64 if dry else 8192}"))


def _step(model: str, dry: bool, changes: Mapping[str, Any], side: int = 1024, **more) -> tuple:
    """The words of step.py."""
    family, recipe, tokens = MODELS[model]
    words = ["step.py", f"--config=configs/{family}.py:{'random' if dry else recipe}"]
    if dry:
        side, tokens = side // 16, tokens and SHORT[family]
        words += ["--config.grid=1,0.5", "--repeats=1", "--warmup=1"]
    words += [f"--side={side}"] + ([f"--tokens={tokens}"] if tokens else [])
    # PyTorch's loop has no anchors.
    plain = {"batch_size": 1, "accumulate": 1, "remat": "none", "anchor.share": 0.0}
    own = plain | dict(changes)
    words += [f"--config.{name}={value}" for name, value in own.items()]
    return (*words, *(f"--{name}={value}" for name, value in more.items()))


def _steps(dry: bool) -> Iterator[Case]:
    for model in MODELS:
        for batch in (1,) if model == "klein 9b" else (1, 2, 4):
            for remat in ("none", "dots", "full", "auto"):
                own = {"batch_size": batch, "remat": remat}
                yield Case(f"step: {model}, batch {batch}, {remat}", _step(model, dry, own))


def _switches(dry: bool) -> Iterator[Case]:
    for model in ("zimage", "klein 4b"):
        command = _step(model, dry, {})
        yield Case(f"switch: {model}, none", command)
        yield Case(f"switch: {model}, XLA's own options", command, {gpu_flags.SWITCH: "off"})
        for name, flags in XLA.items():
            yield Case(f"switch: {model}, {name}", command, {"XLA_FLAGS": flags})
        loose = _step(model, dry, {"remat": "unrolled"})
        yield Case(f"switch: {model}, layers one by one", loose)
        plain = _step(model, dry, {"attention": "xla"})
        yield Case(f"switch: {model}, attention by XLA", plain)
        for batch in (1, 4):  # the kernels are rounded once a forward pass, however many images
            own = {"batch_size": batch, "teacher.products": "fp8"}
            name = f"switch: {model}, batch {batch}, teacher's products in fp8"
            yield Case(name, _step(model, dry, own))


def _torch(dry: bool) -> Iterator[Case]:
    for model in ("zimage", "klein 4b"):
        for batch in (1, 4):
            for name, words in TORCH.items():
                words = words.replace("compile", "compile_eager") if dry else words
                own = {"batch_size": batch}
                command = _step(model, dry, own, torch=words)
                yield Case(f"torch: {model}, batch {batch}, {name}", command)


def _full(dry: bool) -> Iterator[Case]:
    for model, recipe in (("klein 4b", "4b_identity_full"), ("zimage", "full")):
        for name, changes in FULL.items():
            own = {"train": "full", "base_dtype": "float32", "remat": "full"} | changes
            command = _step(model, dry, own)
            command = tuple(w.replace(f":{MODELS[model][1]}", f":{recipe}") for w in command)
            yield Case(f"full: {model}, {name}", command)


def _cards(dry: bool) -> Iterator[Case]:
    for model in MODELS:
        for side in SIDES[::-1]:
            for base, changes in BASES.items():
                group = f"card: {model}, {side}, {base}"
                command = _step(model, dry, {"remat": "full"} | changes, side)
                for card in CARDS:
                    yield Case(f"{group}, {card} GB", command, card=card, group=group)


def _sampling(dry: bool) -> Iterator[Case]:
    for model in ("zimage", "klein 4b"):
        family = MODELS[model][0]
        for batch in (1, 4):
            for who in ("ours", "diffusers"):
                words = [f"--family={family}", f"--batch={batch}", f"--who={who}"]
                words += ["--dry", "--side=64"] if dry else ["--side=1024"]
                yield Case(f"sampling: {model}, batch {batch}, {who}", ("sampling.py", *words))


def _around(dry: bool) -> Iterator[Case]:
    own = ("--dry",) if dry else ()
    for batch in (1, 4, 16):
        command = ("around.py", "--what=filling", f"--batch={batch}", *own)
        yield Case(f"filling: zimage, batch {batch}", command)
    for name, more in (("first", ()), ("second", ("--second",))):
        yield Case(f"start: zimage, {name}", ("around.py", "--what=start", *more, *own))
