"""What a run trains, by config.train: adapters beside the frozen network, or the whole network.

Either way there is a `student`, a tree of float32 parameters, and a `base` that never changes; the
method and the step know no more than that.
"""

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import jax
from flax import nnx
from ml_collections import ConfigDict

from dopsd_jax.adapters import attach, kinds
from dopsd_jax.adapters.attach import Slot
from dopsd_jax.adapters.base import Adapter
from dopsd_jax.common.atomic import make_folder
from dopsd_jax.common.config_fields import as_list, name_or_list
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import local_file
from dopsd_jax.common.progress import byte_progress
from dopsd_jax.conversion.export import export_diffusers, export_single
from dopsd_jax.families.base import Family, Size
from dopsd_jax.families.lora import lora_layers
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.live import LiveTensors
from dopsd_jax.weights.lora_files import LoraFile
from dopsd_jax.weights.lora_write import write_lora


class Trained(Protocol):
    """One value of config.train.

    variables: type of the network's variables that are trained; all others are the base.
    chosen: the adapted layers, if there are adapters.
    """

    variables: ClassVar[type[nnx.Variable]]
    chosen: Mapping[str, Slot]

    def products(self, slot: Slot) -> int:
        """Multiplications of a layer's adapter for one row of its input."""

    def inner(self, slot: Slot) -> int:
        """Of these, those that `remat=dots` does again."""

    def attach(self, network: nnx.Module) -> None:
        """Gives a network the variables that are trained, where it has none yet."""

    def check(self) -> None:
        """Raises `UserError` for files that the start needs and that do not fit."""

    def start(self, student: nnx.State) -> nnx.State:
        """The student before step 1, from the network's own. Raises `UserError`."""

    def describe(self, student: nnx.State) -> list[str]:
        """What is trained, in a few lines; `student` may be abstract."""

    def is_export_step(self, step: int) -> bool:
        """Whether a checkpoint of this step comes with an export."""

    def export_paths(self, workdir: Path, step: int) -> list[Path]:
        """What `export` writes."""

    def written(self, workdir: Path, step: int, live: nnx.State) -> nnx.State:
        """The trained weights as `export` wrote those of a step, read again; raises `UserError`.

        `live`: the weights that were written. They are the answer where the files hold the whole
        network, of which there is no room for another copy.
        """

    def export(
        self, model: Path, workdir: Path, step: int, student: nnx.State, origin: Mapping[str, str]
    ) -> None:
        """Writes the trained weights for other programs to load. Every process calls it.

        `model`: the folder trained from. `origin`: what the header of a LoRA file says of the run.
        """


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on the layers of config.lora.targets; the file loads in diffusers and ComfyUI."""

    config: ConfigDict
    family: Family
    network: Size
    chosen: Mapping[str, Slot]
    variables: ClassVar = nnx.LoRAParam

    @property
    def scale(self) -> float:
        return self.config.lora.alpha / self.config.lora.rank

    @property
    def kind(self) -> type[Adapter]:
        return kinds.kind_of(self.config.lora)

    def products(self, slot: Slot) -> int:
        return self.kind.products(slot.din, slot.dout, self.config.lora.rank)

    def inner(self, slot: Slot) -> int:
        return self.kind.inner(slot.din, slot.dout, self.config.lora.rank)

    def attach(self, network: nnx.Module) -> None:
        options, key = self.config.lora, jax.random.key(self.config.seed)
        attach.attach(network, self.chosen, options.rank, options.alpha, key, self.kind)

    def check(self) -> None:
        if self.config.lora.init_from:
            self._read(self.config.lora.init_from)

    def start(self, student: nnx.State) -> nnx.State:
        path = self.config.lora.init_from
        if not path:
            return student
        modules = self._read(path).modules
        return attach.load(student, self.chosen, modules, self.scale, path, self.kind)

    def _read(self, path: str) -> LoraFile:
        file = lora_files.read_adapter(path, lora_layers(self.family, self.network))
        if not all(isinstance(module, self.kind.module) for module in file.modules.values()):
            raise UserError(
                f"config.lora.init_from: {path} is no {self.kind.title}, which config.lora.kind "
                "names; set it to what the file is"
            )
        return file

    def describe(self, student: nnx.State) -> list[str]:
        lines = [
            f"{self.kind.title} adapters: {len(self.chosen)} layers, {_count(student):,} parameters"
        ]
        return lines + _table(Counter(map(_kind, self.chosen)))

    def is_export_step(self, step: int) -> bool:
        return True

    def export_paths(self, workdir: Path, step: int) -> list[Path]:
        return [workdir / "lora" / f"step_{step}.safetensors"]

    def written(self, workdir: Path, step: int, live: nnx.State) -> nnx.State:
        (path,) = self.export_paths(workdir, step)
        with local_file(path) as local:
            file = lora_files.read_adapter(local, lora_layers(self.family, self.network))
        return attach.load(live, self.chosen, file.modules, self.scale, str(path), self.kind)

    def export(
        self, model: Path, workdir: Path, step: int, student: nnx.State, origin: Mapping[str, str]
    ) -> None:
        if jax.process_index() == 0:
            (path,) = self.export_paths(workdir, step)
            make_folder(path.parent)
            modules = attach.export(student, self.chosen, self.scale, self.kind)
            strings = {**origin, "ss_steps": str(step)}
            layers = lora_layers(self.family, self.network)
            write_lora(path, modules, layers, metadata=strings)


@dataclasses.dataclass(frozen=True)
class FullNetwork:
    """Every parameter of the transformer; a whole model comes out."""

    config: ConfigDict
    family: Family
    network: Size
    variables: ClassVar = nnx.Param
    chosen: ClassVar[Mapping[str, Slot]] = {}

    def products(self, slot: Slot) -> int:
        return 0

    def inner(self, slot: Slot) -> int:
        return 0

    def attach(self, network: nnx.Module) -> None:
        pass

    def check(self) -> None:
        pass

    def start(self, student: nnx.State) -> nnx.State:
        return student

    def describe(self, student: nnx.State) -> list[str]:
        parts: Counter[str] = Counter()
        for path, leaf in nnx.to_flat_state(student):
            parts[str(path[0])] += leaf.size
        lines = [f"the whole transformer: {_count(student):,} parameters in float32"]
        return lines + _table(parts)

    def is_export_step(self, step: int) -> bool:
        every = self.config.export_every
        return step == self.config.steps or bool(every and step % every == 0)

    def export_paths(self, workdir: Path, step: int) -> list[Path]:
        path = workdir / "model" / f"step_{step}"
        names = {"diffusers": path, "comfyui": path.with_name(f"{path.name}.safetensors")}
        return [names[name] for name in as_list(self.config.export)]

    def written(self, workdir: Path, step: int, live: nnx.State) -> nnx.State:
        return live

    def export(
        self, model: Path, workdir: Path, step: int, student: nnx.State, origin: Mapping[str, str]
    ) -> None:
        tensors = LiveTensors(
            student,
            self.family.NETWORKS["transformer"].names(self.network),
            self.config.export_dtype,
        )
        write, written = jax.process_index() == 0, self.export_paths(workdir, step)
        options = {"transformer": tensors, "write": write, "progress": byte_progress("writing")}
        if write:
            make_folder(workdir / "model")
        for path in written:
            if path.suffix:
                export_single(model, path, **options)
            else:
                export_diffusers(model, path, replace=True, **options)
        if write:  # only the newest stays, in every form: each has the size of the model
            for old in (workdir / "model").iterdir():
                found = re.fullmatch(r"step_(\d+)(\.safetensors)?", old.name)
                if found and int(found[1]) != step:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()


VARIABLES = {"lora": Adapters.variables, "full": FullNetwork.variables}


def trained(config: ConfigDict, family: Family, network: Size) -> Trained:
    """What config.train names. Raises `UserError` for targets that the network has not."""
    if config.train == "full":
        return FullNetwork(config, family, network)
    targets = name_or_list(config.lora.targets)
    slots = attach.slots(family.NETWORKS["transformer"].names(network))
    chosen = attach.select(slots, targets, family.LORA_PRESETS)
    return Adapters(config, family, network, chosen)


def _count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _kind(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _table(counts: Counter) -> list[str]:
    width = max(len(f"{n:,}") for n in counts.values())
    return [f"  {number:>{max(width, 4)},} {name}" for name, number in sorted(counts.items())]
