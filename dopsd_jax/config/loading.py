"""Reads a configuration file, a Python file with `get_config`, and sets single fields of it."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import read_text
from dopsd_jax.config.fields import declared
from dopsd_jax.config.find import find_config, shipped
from dopsd_jax.config.schema import unknown

EXAMPLE = shipped("configs", "zimage.py")


def load(spec: str, changes: Mapping[str, str] = {}) -> ConfigDict:
    """The configuration that `FILE[:ARGUMENT]` gives, with the fields of `changes` set.

    Raises `UserError` for a file that is not there or not right, whatever it raises itself, and for
    every change of a field that there is not, or to a value of another kind.
    """
    path, colon, argument = find_config(spec).partition(":")
    space: dict[str, Any] = {"__name__": "configuration", "__file__": path}
    text = read_text(path, advice="give --config a configuration file, or a name such as zimage")
    _told(path, lambda: exec(compile(text, path, "exec"), space))
    get_config = space.get("get_config")
    if not callable(get_config):
        raise UserError(f"{path}: has no function get_config; see {EXAMPLE}")
    config = _told(path, lambda: get_config(argument) if colon else get_config())
    if not isinstance(config, ConfigDict | dict):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config returned {kind}, not a ConfigDict; see {EXAMPLE}")
    raise_if(f"{path}: {fault}" for fault in _told(path, lambda: _never(config)))
    fields = _told(path, config.to_dict) if isinstance(config, ConfigDict) else config
    config = _told(path, lambda: ConfigDict(fields, type_safe=False))
    raise_if([fault for name, text in changes.items() if (fault := _change(config, name, text))])
    return config.lock()


def choose(argument: str | None, known: Sequence[str]) -> str:
    """The argument behind the colon of `--config FILE:ARGUMENT`; the first of `known` if none."""
    name = argument or known[0]
    if name not in known:
        raise UserError(f"--config: argument {name!r} is not one of {', '.join(known)}")
    return name


def _told(path: str, action: Callable[[], Any]) -> Any:
    """What `action` returns; what the code of the file raises becomes one line with its place."""
    try:
        return action()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}; correct the configuration") from None
    except (Exception, SystemExit) as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}:{places[-1].lineno}" if places else path
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(f"{where}: {what}; correct the configuration") from None


def _never(node: Mapping | ConfigDict, name: str = "config", above: tuple = ()) -> list[str]:
    """What no field can be: in a group inside itself, without a value, or named by no text."""
    if any(node is group for group in above):
        return [f"{name}: is a group inside itself; take it out"]
    is_config, faults = isinstance(node, ConfigDict), []
    for key, value in node.items(preserve_field_references=True) if is_config else node.items():
        where = f"{name}.{key}"
        if not isinstance(key, str):
            faults.append(f"{where}: its name {key!r} is no text; correct the configuration")
            continue
        try:
            value = value.get() if isinstance(value, FieldReference) else value
        except RequiredValueError:
            faults.append(f"{where}: has no value, its place is kept for one; write it there")
        if isinstance(value, Mapping | ConfigDict):
            faults += _never(value, where, (*above, node))
    return faults


def _change(config: ConfigDict, name: str, text: str) -> str | None:
    """Sets one field from the command line; returns the line about what is wrong, if something."""
    field = declared().get(name)
    if field is None:
        return unknown(name)
    *groups, last = name.split(".")
    node = config
    for group in groups:
        node = node.get(group)
        if not isinstance(node, ConfigDict):
            return f"config.{name}: the configuration has no group {group}; start from zimage.py"
    try:
        node[last] = field.parse(text)
    except ValueError as error:
        return f"config.{name}: {text!r} {error}"
    return None
