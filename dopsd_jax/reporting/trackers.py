"""Where a run's numbers and pictures can be watched: TensorBoard, Weights & Biases.

metrics.jsonl is always written, and is what a report is made of. A tracker is beside it: it may
fail without harm, so a fault of one is said once, and the run goes on without it.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.common.atomic import is_remote, write_text
from dopsd_jax.common.config_fields import as_list
from dopsd_jax.common.json_files import read_json
from dopsd_jax.config.fields import TRACKERS
from dopsd_jax.config.schema import flat
from dopsd_jax.reporting.metrics import plain

TENSORBOARD, WANDB_RUN = "tensorboard", "wandb.json"  # in the work folder

Picture = UInt8[np.ndarray, "h w 3"]


class Tracker(Protocol):
    """Gets the numbers of every step, and pictures now and then."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Those of one step, by name."""

    def picture(self, step: int, name: str, image: Picture) -> None:
        """One that was made after a step."""

    def close(self) -> None:
        """Nothing comes any more."""


class TensorBoard:
    """Event files in the work folder; those of steps after `step` are hidden."""

    def __init__(self, library: ModuleType, config: ConfigDict, workdir: epath.Path, step: int):
        purge = {"purge_step": step + 1} if step else {}
        self.writer = library.SummaryWriter(str(workdir / TENSORBOARD), **purge)
        lines = (f"    {name} = {value}" for name, value in flat(config).items())
        self.writer.add_text("config", "\n".join(lines), step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Picture) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a run that is continued goes on in the same one.

    Its own environment variables hold, such as WANDB_PROJECT and WANDB_MODE=offline.
    """

    def __init__(self, library: ModuleType, config: ConfigDict, workdir: epath.Path, step: int):
        path = workdir / WANDB_RUN
        known = read_json(path)[0].get("id") if path.exists() else None
        project = {} if os.environ.get("WANDB_PROJECT") else {"project": "dopsd_jax"}
        self.as_image = library.Image
        self.run = library.init(
            dir=None if is_remote(workdir) else str(workdir),
            id=known,
            resume="allow",
            config=flat(config),
            name=workdir.name,
            **project,
        )
        write_text(path, json.dumps({"id": self.run.id}) + "\n")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Picture) -> None:
        self.run.log({name: self.as_image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """Those of config.trackers.

    Args:
      step: the step that the run goes on from. note: prints a line.
      write: False for a process that leaves writing to another.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        step: int,
        note: Callable[[str], None],
        *,
        write: bool = True,
    ):
        self.note: Callable[[str], None] = note
        self.open: dict[str, Tracker] = {}
        for name in as_list(config.trackers) if write else []:
            library = importlib.import_module(TRACKERS[name])
            make = functools.partial(KINDS[name], library, config, workdir, step)
            tracker = self._tried(name, make)
            if tracker is not None:
                self.open[name] = tracker

    def numbers(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record of metrics.jsonl."""
        values = scalars(record)
        self._each(lambda tracker: tracker.numbers(record["step"], values))

    def picture(self, step: int, name: str, path: epath.Path) -> None:
        """A picture, from its file."""
        if self.open:
            with path.open("rb") as file:
                image = np.asarray(Image.open(file).convert("RGB"))
            self._each(lambda tracker: tracker.picture(step, name, image))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.open = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._tried(name, functools.partial(act, tracker))

    def _tried(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        # Whatever a tracker's library raises (a disk, a network, a login) must not end the run.
        except Exception as error:
            self.open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.note(f"config.trackers: {name} fails, the run goes on without it ({reason})")
            return None

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by name; those of a list with their places, from 0."""
    found = {}
    for name, value in record.items():
        value = plain(value)
        several = enumerate(value) if isinstance(value, list) else ((None, value),)
        for place, number in several:
            if type(number) in (int, float) and name != "step":
                found[name if place is None else f"{name}/{place}"] = number
    return found
