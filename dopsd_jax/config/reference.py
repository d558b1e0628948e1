"""What is known of every field, as text: for --help, and for docs/configuration.md.

`python -m dopsd_jax.config.reference` writes that file to stdout.
"""

from dopsd_jax.common.config_fields import NEVER, NUMBERS, ON_REQUEST, Field, as_option
from dopsd_jax.config.fields import METHOD, choices, conditions, sections
from dopsd_jax.methods import anchor
from dopsd_jax.methods.registry import METHODS

HEAD = """# Configuration

This file is generated: `python -m dopsd_jax.config.reference > docs/configuration.md`.

A configuration is a Python file with a function `get_config`, such as
[configs/zimage.py](../configs/zimage.py); copy that file to write your own. Single fields are set
on the command line: `--config.teacher.decay=0.999`. There a field that has no effect because of
another (*only with*) is an error; a file may set it, for the settings that use it. A number outside
its range, NaN or infinity is always an error. Lists are written with commas.

*Continued*: whether the field may differ when a run is continued. `yes`: freely. `on request`: if
`--allow_changes` names it ([running.md](running.md)). `no`: never; start a new run, with
`lora.init_from` if it shall go on from a result.
"""


def markdown() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    for title, fields in sections().items():
        rows = "\n".join(map(_row, fields))
        if title == METHOD:
            title += "\n\n" + _methods()
        head = "| field | default | values | | continued |\n|---|---|---|---|---|"
        parts.append(f"\n## {title}\n\n{head}\n{rows}\n")
    return "".join(parts)


def _methods() -> str:
    """A table of the methods, from their records."""
    rows = "\n".join(f"| `{m.name}` | {m.summary} | {m.source} |" for m in METHODS.values())
    return (
        f"More of them: [methods.md](methods.md).\n\n| method | | source |\n|---|---|---|\n{rows}"
    )


def help_text() -> str:
    """The fields for a terminal."""
    lines = ["Fields of the configuration, set with --config.FIELD=VALUE:"]
    for title, fields in sections().items():
        lines += ["", f"{title}:"]
        for field in fields:
            known = allowed(field)
            lines.append(
                f"  --config.{field.name}={as_option(field.default)}" + f"  ({known})" * bool(known)
            )
            lines.append(f"      {field.help}")
    return "\n".join(lines)


def allowed(field: Field) -> str:
    """What a field may hold, in words; empty: any text."""
    if known := choices(field) or field.listed:
        return ", ".join(known)
    if field.kind not in NUMBERS:
        return {"bool": "true, false"}.get(field.kind, "")
    low = f"above {field.above:g}" if field.above is not None else f"{field.low:,}"
    unit = f" {field.unit}" if field.unit else ""
    return f"{low} to {field.high:,}{unit}"


def _row(field: Field) -> str:
    only = "; ".join(
        f"only with {name} = {', '.join(needed)}" + _anchors(field, name)
        for name, needed in conditions(field).items()
    )
    help = f"{field.help}. {only[0].upper()}{only[1:]}" if only else field.help
    change = {NEVER: "no", ON_REQUEST: "on request"}.get(field.change, "yes")
    for name, values in field.asked_with.items():
        change += f"; on request with {name} = {', '.join(values)}"
    default = f"`{as_option(field.default)}`" if field.default != "" else ""
    return f"| `{field.name}` | {default} | {allowed(field)} | {help} | {change} |"


def _anchors(field: Field, name: str) -> str:
    """What else gives a field of methods an effect."""
    return " or anchor.share above 0" if name == "method" and field.name in anchor.USED else ""


if __name__ == "__main__":
    print(markdown(), end="")
