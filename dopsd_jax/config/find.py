"""Finds what comes with the project: its configurations and the trained miniature."""

import os
from pathlib import Path

from dopsd_jax.common.errors import UserError

PACKAGE = Path(__file__).parents[1]


def shipped(*parts: str) -> Path:
    """A path below `configs` or `examples`: inside an installed package, beside it in a clone."""
    installed = PACKAGE.joinpath(*parts)
    return installed if os.path.exists(installed) else PACKAGE.parent.joinpath(*parts)


def config_names() -> list[str]:
    """The configurations that `--config NAME` finds."""
    return sorted(p.stem for p in shipped("configs").glob("*.py"))


def find_config(name: str) -> str:
    """The value of --config with a path: `zimage:tiny` is the shipped `configs/zimage.py:tiny`.

    A name with a folder or an ending stays as it is. Raises `UserError` for a name that is neither
    a file nor shipped.
    """
    stem, colon, argument = name.partition(":")
    if Path(stem).name != stem or Path(stem).suffix or os.path.isfile(stem):
        return name
    if stem not in config_names():
        raise UserError(
            f"--config {stem}: is neither a file nor a configuration of the package; those are "
            + ", ".join(config_names())
        )
    return f"{shipped('configs', f'{stem}.py')}{colon}{argument}"
