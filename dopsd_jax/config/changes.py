"""What may differ when a run is continued: as the fields declare it, and as the user allows it."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopsd_jax.common.config_fields import ALWAYS, NEVER, shown
from dopsd_jax.common.errors import raise_if
from dopsd_jax.config.fields import declared
from dopsd_jax.config.schema import unknown

WEIGHTS = "base_digest"  # of the model's transformer, which adapters are trained on
PLACE = "data.path"
DATA = "data"  # the content of the data set, and how it is read
_NEW_RUN = {
    "lora": "start a new run in another --workdir, with the result of this one in "
    "config.lora.init_from",
    "full": "start a new run in another --workdir, with the result of this one in config.model",
}


def check_allowed(allowed: Sequence[str]) -> None:
    """Raises `UserError` for names that --allow_changes cannot take."""
    fields = declared()
    raise_if(
        f"--allow_changes: {unknown(name) if name not in fields else _never(name)}"
        for name in allowed
        if name != DATA and (name not in fields or fields[name].change == NEVER)
    )


def compare(
    old: Mapping[str, Mapping[str, Any]],
    new: Mapping[str, Mapping[str, Any]],
    allowed: Sequence[str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The allowed changes of a run, each {field, old, new}; and a line for each other one.

    old, new: `config`, the fields by dotted name, and `facts`, what else decides what is trained:
    the digest of the data, the revision of the model. allowed: fields that may differ now; `data`:
    the data set and all fields of it.
    """
    fields, changes, faults = declared(), [], []
    new_run = _NEW_RUN.get(old["config"].get("train"), _NEW_RUN["lora"])
    for name in sorted(old["config"].keys() | new["config"].keys()):
        # A field that is younger than the run: its default keeps what was done before.
        default = fields[name].default if name in fields else None
        was, now = old["config"].get(name, default), new["config"].get(name)
        change = fields[name].change_in(new["config"]) if name in fields else NEVER
        if was == now or change == ALWAYS:
            continue
        group = DATA if name.startswith(f"{DATA}.") else name
        if change != NEVER and {name, group} & set(allowed):
            changes.append({"field": name, "old": was, "new": now})
            continue
        advice = f"keep the old value, or {new_run}"
        if change != NEVER:
            advice = f"keep the old value, allow it with --allow_changes={group}, or {new_run}"
        faults.append(
            f"belongs to a run with config.{name} = {_told(was)}, now {_told(now)}; {advice}"
        )
    for name, now in new["facts"].items():
        was = old["facts"].get(name)
        if was == now or (name == WEIGHTS and was is None):  # the run is older than this fact
            continue
        if name == DATA and DATA in allowed:
            changes.append({"field": name, "old": was, "new": now})
            continue
        allow = f"allow it with --allow_changes={DATA}, or " if name == DATA else ""
        was, now = (
            "none" if fact is None else fact for fact in (old["facts"].get(name, "unknown"), now)
        )
        where = _places(old, new) if name == DATA else ""
        faults.append(f"was trained with {name} {was}, now it is {now}{where}; {allow}{new_run}")
    return changes, faults


def _places(*runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the data of two runs lie, which may be the same place with another content."""
    was, now = (run["config"].get(PLACE) for run in runs)
    return f" (config.{PLACE} = {shown(was)}" + (")" if was == now else f", now {shown(now)})")


def _told(value: Any) -> str:
    """A field's value; None: this version has no such field."""
    return "nothing" if value is None else shown(value)


def _never(name: str) -> str:
    return f"config.{name} cannot change within a run; {_NEW_RUN['lora']}"
