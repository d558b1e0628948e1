"""The options --config and --workdir, which programs share. Imports no JAX; see common.program."""

from collections.abc import Callable, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from dopsd_jax.common import program
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import schema
from dopsd_jax.config.fields import declared
from dopsd_jax.config.loading import load
from dopsd_jax.config.reference import help_text

OPTIONS = program.options("__main__")  # of every program that imports this
_FILE = OPTIONS.path(
    "config",
    None,
    "FILE[:ARGUMENT], or one of the package by its name, such as zimage or zimage:tiny; single "
    "fields are set with --config.FIELD=VALUE",
)
WORKDIR = OPTIONS.path_or_store(
    "workdir", None, "folder of the run; if not given, runs/zimage, runs/flux2_klein: by the family"
)


class _Config:
    """The configuration of the command line, once it is parsed."""

    value: ConfigDict
    asked: Mapping[str, str] = {}  # the fields that the command line sets, as text


CONFIG = _Config()


def parse(
    *required: str,
    strict: bool = True,
    data: bool = True,
    more_checks: Callable[[], None] = lambda: None,
) -> None:
    """Reads the command line and checks the configuration: a fault ends the program with a line.

    required: options that must be given beside --config. strict: whether a field of the command
    line that has no effect is a fault. data: whether config.data.path must name something.
    more_checks: raises `UserError` for the program's own options.
    """

    def check() -> None:
        CONFIG.value = load(_FILE.value, CONFIG.asked)
        fields = CONFIG.value.to_dict()
        if not data and isinstance(fields.get("data"), dict):
            fields["data"] |= {"path": "not read"}
        schema.check(fields, CONFIG.asked if strict else ())
        more_checks()

    program.parse(required=("config", *required), rewrite=taken, check=check, more=help_text)


def taken(argv: Sequence[str]) -> list[str]:
    """The command line without the fields of the configuration, which are kept in CONFIG.asked."""
    asked, rest = {}, []
    CONFIG.asked = asked
    words = iter(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False))
    for word in words:
        option, equals, text = word.partition("=")
        option = "--" + option.lstrip("-") if option.startswith("-") else option
        name = option.removeprefix("--config.").removeprefix("--noconfig.")
        if name == option:
            rest.append(word)
            continue
        field = declared().get(name)
        if option.startswith("--noconfig."):
            text = "false"
        elif not equals:
            is_switch = field is not None and field.kind == "bool"
            text = "true" if is_switch else next(words, None)
            if text is None:
                raise UserError(f"--config.{name}: has no value; write --config.{name}=VALUE")
        asked[name] = text
    return rest
