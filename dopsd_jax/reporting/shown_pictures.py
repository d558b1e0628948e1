"""The pictures of a page: a row of figures a prompt, and those of several steps in one place."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from dopsd_jax.reporting.html_page import copied, remark, text, words
from dopsd_jax.reporting.pictures import GridRow

SIDE = 512  # pixels: larger pictures are embedded smaller
PIXELS = 160  # pictures with sides up to this show their pixels, and are embedded without losses
MEANINGS = {
    "reference": "a picture that the prompt edits",
    "target": "the picture that belongs to the prompt",
    "base": "the model before training",
    "teacher": "the model that is also shown the target: what tuned learns from",
    "tuned": "the trained model, which sees the prompt alone",
}


class Round(NamedTuple):
    """The pictures of one step. step: None where there is one round only, of no step.

    file: the weights of that step, for the reader; empty where none were written.
    rows: caption and pictures of each; None where there is none.
    """

    step: int | None
    file: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]]


def embedded(picture: Image.Image, alt: str) -> str:
    """An `img` with the picture inside; small ones are enlarged pixel by pixel."""
    small = max(picture.size) <= PIXELS
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    kind, mark = ("png", ' class="pixels"') if small else ("jpeg", "")
    picture.convert("RGB").save(encoded, kind, quality=88)  # of JPEG; PNG has none
    data = base64.b64encode(encoded.getvalue()).decode()
    return (
        f'<img{mark} loading="lazy" width="{picture.width}" height="{picture.height}" '
        f'alt="{text(alt)}" src="data:image/{kind};base64,{data}">'
    )


def show(rounds: Sequence[Round]) -> str:
    """What the columns mean, the choice of a step, and a row a prompt."""
    columns = list(dict.fromkeys(name for own in rounds for name in own.columns))
    known = {
        word: own for word, own in MEANINGS.items() if any(c.startswith(word) for c in columns)
    }
    prompts: dict[tuple[int, str], None] = {}
    for own in rounds:
        prompts |= dict.fromkeys((i, caption) for i, (caption, _) in enumerate(own.rows))
    rows = "".join(_row(rounds, columns, *place) for place in sorted(prompts, key=lambda p: p[0]))
    return f"{words(known)}{_size(rounds)}{_picker(rounds)}{rows}"


def _size(rounds: Sequence[Round]) -> str:
    """A remark where all pictures are of one small size, so that nobody takes it for a fault."""
    sizes = {p.size for own in rounds for _, row in own.rows for p in row if p is not None}
    small = [f"{w} x {h}" for w, h in sizes if max(w, h) <= PIXELS]
    if len(sizes) != 1 or not small:
        return ""
    return remark(f"The model draws {small[0]} pixels, which are enlarged here.")


def _picker(rounds: Sequence[Round]) -> str:
    """Steps and their files: a list, which the script makes a slider of."""
    if rounds[-1].step is None or len(rounds) < 2:
        return ""
    last = len(rounds) - 1
    items = []
    for own in rounds:
        file = f": <code>{text(own.file)}</code>" if own.file else ""
        mark = f' data-file="{text(own.file)}"' if own.file else ""
        items.append(f'<li data-step="{own.step}"{mark}>step {own.step}{file}</li>')
    return (
        f'<ul id="steps" class="remark">{"".join(items)}</ul>'
        f'<div class="picker" id="picker" hidden><label>step <output>{rounds[-1].step}</output>'
        f'<input type="range" min="0" max="{last}" value="{last}" '
        f'aria-label="step whose pictures are shown"></label>{copied(rounds[-1].file)}'
        '<p class="remark none">of this step there is no file</p></div>'
    )


def thumbnails(pictures: Sequence[Image.Image]) -> str:
    """Pictures without words, small."""
    images = (
        f"<figure>{embedded(picture, f'training picture {n}')}</figure>"
        for n, picture in enumerate(pictures, 1)
    )
    return f'<div class="thumbs">{"".join(images)}</div>'


def _row(rounds: Sequence[Round], columns: Sequence[str], place: int, caption: str) -> str:
    """The figures of one prompt, those of a column beside each other."""
    cells = []
    for column in columns:
        found = []
        for own in rounds:
            if place < len(own.rows) and own.rows[place][0] == caption and column in own.columns:
                picture = own.rows[place][1][own.columns.index(column)]
                if picture is not None:
                    found.append((own.step, picture))
        alike = len({picture.tobytes() for _, picture in found}) == 1 and len(found) == len(rounds)
        for step, picture in found[:1] if alike else found:
            cells.append(_figure(column, None if alike else step, picture, caption))
    head = f"<h3>{text(caption)}</h3>" if caption else ""
    return f'<article class="row">{head}<div class="cells">{"".join(cells)}</div></article>\n'


def _figure(part: str, step: int | None, picture: Image.Image, caption: str) -> str:
    at = "" if step is None else f", step {step}"
    mark = "" if step is None else f' data-step="{step}"'
    image = embedded(picture, f"{part}{at}: {caption}")
    return (
        f'<figure data-part="{text(part)}"{mark}>{image}'
        f"<figcaption><b>{text(part)}</b>{at}</figcaption></figure>"
    )


def of_arrays(columns: Sequence[str], rows: Sequence[GridRow]) -> Round:
    """One round, of no step."""
    opened = lambda image: None if image is None else Image.fromarray(image)
    return Round(None, "", columns, [(r.caption, list(map(opened, r.images))) for r in rows])
