"""The template of every page, and the pieces that pages are made of.

A page is one HTML file with its style, its script and its pictures inside: it can be sent on, and
is whole without a network and without scripts. `page/` has the template. All functions take plain
text and return HTML, but where `html` is said.
"""

import functools
import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import dopsd_jax

FILES = resources.files(__package__) / "page"


@functools.cache
def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def render(kind: str, title: str, about: Sequence[str], verdict: str, body: Sequence[str]) -> str:
    """A whole page.

    kind: what sort of page. about: short facts below the title. verdict: one sentence, may be
    empty. body: html of the sections, in order.
    """
    page = Template(_file("template.html")).substitute(
        title=text(f"{title}: {kind}"),
        kind=text(kind),
        heading=text(title),
        about=" · ".join(map(text, filter(None, about))),
        verdict=f'<p class="verdict">{text(verdict)}</p>' if verdict else "",
        body="\n".join(filter(None, body)),
        footer=f"Written by dopsd_jax {text(dopsd_jax.__version__)}.",
        style=_file("style.css"),
        script=_file("script.js"),
    )
    # Prompts may hold halves of surrogate pairs, which no file can.
    return page.encode("utf-8", "replace").decode()


def text(value: str) -> str:
    """Escaped, for the inside of elements and of quoted attributes."""
    return html.escape(value)


def concept(config: Mapping[str, Any], otherwise: str) -> str:
    """What a run is about, for titles: its trigger, its new word, or the name of its data set.

    config: by the full names of the fields; anything may be missing or of another type.
    """
    paths = config.get("data.path")
    paths = paths if isinstance(paths, list | tuple) else [paths]
    named = [config.get("data.trigger"), config.get("anchor.concept_word")]
    named += [Path(path).stem for path in paths[:1] if isinstance(path, str) and path != "random"]
    return next((name for name in named if isinstance(name, str) and name), otherwise)


def section(title: str, *content: str) -> str:
    """content: html."""
    return f"<section>\n<h2>{text(title)}</h2>\n{''.join(content)}\n</section>"


def remark(*lines: str) -> str:
    """Small print, a paragraph a line."""
    return "".join(f'<p class="remark">{text(line)}</p>' for line in lines)


def facts(found: Iterable[tuple[str, str]]) -> str:
    """Numbers beside each other, each under its name."""
    items = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in found)
    return f'<dl class="facts">{"".join(items)}</dl>'


def words(meanings: Mapping[str, str]) -> str:
    """What words mean."""
    items = (f"<dt>{text(word)}</dt><dd>{text(own)}</dd>" for word, own in meanings.items())
    return f'<dl class="words">{"".join(items)}</dl>'


def copied(content: str) -> str:
    """Text that the script puts a copy button beside."""
    return f'<div class="copy"><code>{text(content)}</code></div>'


def folded(summary: str, content: str) -> str:
    """content: html that is shown on a click."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    kind: str,
    tones: Sequence[Sequence[str]] = (),
) -> str:
    """A table that scrolls sideways inside the page if it must; the first cell names the row.

    kind: `scores` or `settings`. tones: of each row, for each cell: `good`, `bad` or empty.
    """
    lines = []
    for number, (name, *cells) in enumerate(rows):
        own = tones[number][1:] if tones else [""] * len(cells)
        marks = (f' class="{tone}"' if tone else "" for tone in own)
        inside = "".join(
            f"<td{mark}>{text(cell)}</td>" for mark, cell in zip(marks, cells, strict=True)
        )
        lines.append(f'<tr><th scope="row">{text(name)}</th>{inside}</tr>')
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
