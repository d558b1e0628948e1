"""The options --config and --workdir, which programs share. Imports no JAX; see common.program."""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dopsd_jax.common import program
from dopsd_jax.config import schema
from dopsd_jax.config.find import find_config

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "FILE[:ARGUMENT], or one of the package by its name, such as zimage or zimage:tiny; single "
    "fields are set with --config.FIELD=VALUE",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; train, prepare and check: runs/zimage if not given"
)


def parse(*required: str, strict: bool = True, data: bool = True) -> None:
    """Reads the command line and checks the configuration: a fault ends the program with a line.

    required: options that must be given beside --config. strict: whether a field of the command
    line that has no effect is a fault. data: whether config.data.path must name something.
    """

    def check() -> None:
        fields = CONFIG.value.to_dict()
        if not data:
            fields = {**fields, "data": {**fields["data"], "path": "not read"}}
        schema.check(fields, asked() if strict else ())

    program.parse(required=("config", *required), rewrite=named, check=check)


def asked() -> list[str]:
    """The fields that the command line sets."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def named(argv: Sequence[str]) -> list[str]:
    """The command line with the path of a configuration that it gives by its name."""
    argv = list(argv)
    for i, option in enumerate(argv):
        name, equals, value = option.partition("=")
        if name in ("--config", "-config") and equals:
            argv[i] = f"{name}={find_config(value)}"
        elif name in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = find_config(argv[i + 1])
    return argv
