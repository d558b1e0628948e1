"""Which GPU on_gpu.py measures, as nvidia-smi tells."""

import os
import subprocess
from typing import NamedTuple

from dopsd_jax.common.errors import UserError

FACTS = ("index", "uuid", "name", "memory.total", "memory.used", "driver_version")
IDLE = 1024  # MiB that a screen may hold


class Card(NamedTuple):
    """A GPU. memory: bytes."""

    name: str
    memory: int
    uuid: str
    driver: str


def find() -> Card:
    """The GPU that is measured: the one that is the most idle, of those that may be used.

    Raises `UserError` where there is none, or where something else is on it.
    """
    ask = ["nvidia-smi", f"--query-gpu={','.join(FACTS)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return choose(lines, os.environ.get("CUDA_VISIBLE_DEVICES"))


def choose(lines: list[str], visible: str | None) -> Card:
    """As `find`, of what nvidia-smi says of `FACTS`; visible: as CUDA reads it."""
    rows = [dict(zip(FACTS, map(str.strip, line.split(",")), strict=False)) for line in lines]
    if visible is not None:
        named = [word.strip() for word in visible.split(",")]
        rows = [row for row in rows if row["index"] in named or row["uuid"] in named]
    if not rows:
        raise UserError(
            "no NVIDIA GPU is here that may be used (CUDA_VISIBLE_DEVICES); --dry tries the cases "
            "at tiny size, --list names them"
        )
    told = [row for row in rows if row["memory.total"].isdigit() and row["memory.used"].isdigit()]
    if not told:
        raise UserError(
            f"nvidia-smi does not say how much memory {rows[0]['name']} has; a part of a GPU "
            "(MIG) cannot be measured"
        )
    row = min(told, key=lambda row: int(row["memory.used"]))
    if int(row["memory.used"]) > IDLE:
        raise UserError(
            f"{row['memory.used']} MiB of {row['name']} are in use: the times would mean nothing; "
            "end what runs there, or name an idle GPU in CUDA_VISIBLE_DEVICES"
        )
    memory = int(row["memory.total"]) << 20
    return Card(row["name"], memory, row["uuid"], row["driver_version"])
