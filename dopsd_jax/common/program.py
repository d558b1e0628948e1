"""How a program starts and ends: its options, its entry point, its exit status.

A program reads its command line before it imports JAX, which takes seconds:

    if __name__ == "__main__":
        program.parse()

    import jax
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from absl import flags, logging

from dopsd_jax.common import compile_cache, cpu_memory, gpu_flags, gpu_memory
from dopsd_jax.common.atomic import path_fault
from dopsd_jax.common.background import Background
from dopsd_jax.common.errors import USER_ERROR_EXIT, UserError, report
from dopsd_jax.common.lora_options import LoraOption, lora_option

FLAGS = flags.FLAGS
HELP = ("--help", "-help", "-h", "--helpfull", "-helpfull", "-?")


def options(module: str) -> SimpleNamespace:
    """absl's DEFINE functions (`string`, `integer`, `path`, ...) for the program `module`.

    Programs may have options of the same name: the options of a program that is only imported keep
    their defaults.
    """
    values = FLAGS
    if module != "__main__":
        values = flags.FlagValues()
        values.mark_as_parsed()
    kinds = ("bool", "enum", "float", "integer", "list", "multi_string", "string")
    define = {kind: getattr(flags, f"DEFINE_{kind}") for kind in kinds}
    define["path"] = functools.partial(flags.DEFINE, _Path(stores=False))
    define["path_or_store"] = functools.partial(flags.DEFINE, _Path(stores=True))
    define["loras"] = functools.partial(flags.DEFINE_multi, _Lora(), flags.ArgumentSerializer())
    define = {kind: functools.partial(f, flag_values=values) for kind, f in define.items()}
    return SimpleNamespace(**define)


class _Path(flags.ArgumentParser):
    """Of options that name a file or folder; `stores`: or one in an object store, gs://."""

    def __init__(self, stores: bool):
        self.stores = stores

    def parse(self, argument: str) -> str:
        fault = path_fault(argument, stores=self.stores)
        if fault or not argument:
            raise ValueError(fault or "is empty; give it a name, or leave it out")
        return argument


class _Lora(flags.ArgumentParser):
    """Of options that name LoRA files; see `lora_options`."""

    def parse(self, argument: str | LoraOption) -> LoraOption:
        return argument if isinstance(argument, LoraOption) else lora_option(argument)


def typed(name: str) -> str:
    """The command that was typed to start the program `name`, for a shell."""
    return shlex.join(["python", "-m", f"dopsd_jax.{name}", *sys.argv[1:]])


def local_path(text: str) -> Path:
    """The path in an argument of a `Parser`."""
    if fault := path_fault(text):
        raise argparse.ArgumentTypeError(f"{text} {fault}")
    return Path(text)


def local_lora(text: str) -> LoraOption:
    """The LoRA file, with its strength, in an argument of a `Parser`."""
    try:
        return lora_option(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} {error}") from None


def local_name(text: str) -> str:
    """The same for what may be a name on the hub."""
    local_path(text)
    return text


def parse(
    *,
    required: Sequence[str] = (),
    rewrite: Callable[[list[str]], list[str]] = list,
    check: Callable[[], None] = lambda: None,
    more: Callable[[], str] = str,
) -> None:
    """Reads the options; a wrong one ends the program with one line.

    required: options that must be given. rewrite: changes the command line first. check: raises
    `UserError` for options that are wrong together. more: what --help says at its end.
    """
    status = report(lambda: _parse(sys.argv, required, rewrite, check, more))
    if status:
        sys.exit(status)


def _parse(
    argv: list[str],
    required: Sequence[str],
    rewrite: Callable[[list[str]], list[str]],
    check: Callable[[], None],
    more: Callable[[], str],
) -> None:
    if any(option in HELP for option in argv[1:]):
        print("\n".join([help_text(argv[0]), more()]).rstrip(), flush=True)
        sys.exit(0)
    logging.set_verbosity(logging.FATAL)  # what goes wrong in a library is raised as well
    try:
        rest = FLAGS(rewrite(argv))
    except (flags.Error, ValueError, OSError) as error:
        raise UserError(f"{str(error).removeprefix('flag ')}; see --help") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not understood; options are written --name=value; see --help")
    if missing := [f"--{name}" for name in required if FLAGS[name].value is None]:
        raise UserError(f"{', '.join(missing)}: must be given; see --help")
    check()


def help_text(name: str) -> str:
    """What the program is, and its options with their defaults."""
    about = sys.modules["__main__"].__doc__ or ""
    own = [m for m in FLAGS.flags_by_module_dict() if m == name or m.startswith("dopsd_jax.")]
    return "\n".join([about.strip(), "", *map(FLAGS.module_help, own)])


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` with the options read, and ends the program with its status."""
    if not FLAGS.is_parsed():
        parse()
    if "jax" in sys.modules:  # what runs without it compiles nothing
        compile_cache.keep()
        gpu_memory.allow()
        gpu_flags.add()
        cpu_memory.keep()
    try:
        status = report(main)
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    Background.leave_if_busy(status)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """For programs with commands or positional arguments: a wrong option is one line, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT, f"error: {message}; see --help\n")
