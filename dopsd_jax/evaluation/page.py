"""evaluation.html: one page with the table of scores and the pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from dopsd_jax.reporting.html_page import render
from dopsd_jax.reporting.pictures import GridRow

CELL = 320  # pixels: larger pictures are embedded smaller
SHOWN = 60  # prompts; the others' pictures are in the folder


def page(
    title: str,
    verdict: str,
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[GridRow],
    facts: Mapping[str, str],
) -> str:
    """The page: verdict, table of scores, a row of pictures a prompt, and what it was made from."""
    head, *body = cells
    line = lambda tag, row: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
    remarks = "".join(f'<p class="remark">{html.escape(note)}</p>' for note in notes)
    left_out = len(rows) - SHOWN
    if left_out > 0:
        remarks_below = f'<p class="remark">{left_out} further prompts are not shown here.</p>'
    else:
        remarks_below = ""
    table = line("th", head), "".join(f"<tr>{line('td', row)}</tr>" for row in body)
    pictures = line("th", columns), "".join(_row(row) for row in rows[:SHOWN])
    settings = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    parts = (
        f'<p class="verdict">{html.escape(verdict)}</p>' if verdict else "",
        f'<div class="scroll"><table class="scores"><tr>{table[0]}</tr>{table[1]}</table></div>',
        '<p class="remark">Mean ± half the width of the 95 % interval over prompts; differences '
        "are within prompts, on the same noise.</p>",
        remarks,
        f'<h2>Pictures</h2>\n<table class="pictures"><tr>{pictures[0]}</tr>{pictures[1]}</table>',
        remarks_below,
        f"<h2>Settings</h2>\n<table>{settings}</table>",
    )
    return render(title, "\n".join(parts), style=OWN_STYLE)


def _row(row: GridRow) -> str:
    cells = "".join(f"<td>{_image(image)}</td>" for image in row.images)
    caption = html.escape(row.caption)
    return f'<tr>{cells}</tr><tr><td colspan="{len(row.images)}">{caption}</td></tr>'


def _image(image) -> str:
    if image is None:
        return "none"
    picture = Image.fromarray(image)
    small = max(picture.size) <= CELL // 2  # shown enlarged, so without losses
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    data = base64.b64encode(encoded.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return f'<img loading="lazy" src="data:image/{kind};base64,{data}" alt="">'


OWN_STYLE = """
.pictures td { width: 25%; border: 0; padding: .2rem; } .pictures img { width: 100%; }
.pictures td[colspan] { color: var(--faint); padding-bottom: 1rem; }
.scores td { white-space: nowrap; } .scroll { overflow-x: auto; }
"""
