"""What the page of a run says of its configuration, and the commands to copy."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from etils import epath

from dopsd_jax.config import schema
from dopsd_jax.config.fields import defaults
from dopsd_jax.reporting import html_page

ABOUT_RUN = ("config", "changes", "started", "command")  # sections of config.json shown elsewhere
LONGEST = 200  # letters of a value in the list of changes


def text_of(value: Any) -> str:
    """A value of a JSON file as text; it can be anything."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _setting(value: Any) -> str:
    return "(empty)" if value == "" else text_of(value)


def command(content: Mapping[str, Any]) -> str:
    """What was typed, to train again. content: of config.json."""
    typed = content.get("command")
    if not isinstance(typed, str) or not typed:
        return ""
    return html_page.section("Train it again", html_page.copied(typed))


def sample_command(model: str, lora: epath.Path, word: str, edits: bool) -> str:
    """word: of the concept, for the prompt. edits: whether the rows edited pictures."""
    prompt = f"a {word}" if word else "what to draw"
    options = ["--model", model, "--lora", str(lora)]
    if edits:
        prompt, options = "what to do", [*options, "--reference", "picture_to_edit.png"]
    options += ["--prompt", prompt, "--out", "pictures"]
    return shlex.join(["python", "-m", "dopsd_jax.sample", *options])


def changes(content: Mapping[str, Any]) -> str:
    """The fields that were changed when the run went on: `--allow_changes`."""
    found = content.get("changes")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if not rows:
        return ""
    fields = ("step", "field", "old", "new")
    body = [[text_of(row.get(field, ""))[:LONGEST] for field in fields] for row in rows]
    return f"<h3>Changed on the way</h3>{html_page.table(fields, body, 'settings')}"


def show(content: Mapping[str, Any]) -> str:
    """What differs from the defaults; the rest folded."""
    if not content:
        return "<p>There is no config.json.</p>"
    config, usual = content.get("config"), schema.flat(defaults())
    config = config if isinstance(config, dict) else {}
    # Through JSON, as config.json went: tuples become lists.
    usual = json.loads(json.dumps(usual))
    differs = [
        (name, _setting(value), _setting(usual[name]) if name in usual else "(none)")
        for name, value in config.items()
        if name not in usual or value != usual[name]
    ]
    parts = []
    if differs:
        head = ("setting", "here", "default")
        parts.append(html_page.remark("What differs from the defaults:"))
        parts.append(html_page.table(head, differs, "settings"))
    rest = {"all settings": config}
    rest |= {n: own for n, own in content.items() if isinstance(own, dict) and n != "config"}
    loose = {name: own for name, own in content.items() if not isinstance(own, dict)}
    rest["other"] = {name: own for name, own in loose.items() if name not in ABOUT_RUN}
    for name, own in rest.items():
        if own:
            rows = [(field, _setting(value)) for field, value in own.items()]
            table = html_page.table(("", ""), rows, "settings")
            parts.append(html_page.folded(name, table))
    return "".join(parts)
