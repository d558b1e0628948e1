"""Both pages come from one template, can be read on any screen, and run nothing of what they show.

Where a headless Chromium is installed, it lays the pages out; without one the same is asked of the
files alone, as far as they tell.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from page_checks import Page

from dopsd_jax.evaluation.page import page as evaluation_page
from dopsd_jax.reporting import html_page
from dopsd_jax.reporting.metrics import MetricsWriter
from dopsd_jax.reporting.pictures import GridRow, sample_path, save_grid
from dopsd_jax.reporting.run_page import write_report

WIDTHS = 390, 800, 1400
EVIL = '</style></script><script>alert(1)</script><img src=x onerror="alert(1)">&lt;'
LONG = "x" * 400  # no place to break a line
BROWSERS = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"


def pictures(shade):
    """Small, wide, tall, and larger than a phone."""
    shapes = (64, 64), (40, 700), (700, 40), (512, 512)
    return [np.full((*shape, 3), shade, np.uint8) for shape in shapes]


def of_run(workdir):
    """A run with long and evil words at every place that takes words."""
    with MetricsWriter(workdir) as writer:
        for step in range(1, 9):
            each = {"loss": 1e-7 * step, "loss_per_step": [0.5, 0.2, 1.0, None], "gap": 1.0}
            each |= {"grad_norm": 1e6 / step, "lr": 1e-5 * step, "norm_ratio": 0.3}
            each |= {"images_per_second": 3.0, "seconds": 9.0, "spike": step == 3}
            writer.write({"step": step, **each})
    columns = ["reference 1", "target", "base", "tuned"]
    for step in (0, 4, 8):
        rows = [GridRow(f"{words} {k}", pictures(step)) for k, words in enumerate((LONG, EVIL))]
        save_grid(sample_path(workdir, step), columns, rows)
    (workdir / "lora").mkdir()
    (workdir / "lora" / "step_8.safetensors").write_bytes(b"")
    config = {"data.trigger": EVIL, "model": EVIL, "method": LONG, LONG: LONG, EVIL: EVIL}
    content = {"config": config, "started": EVIL, "command": LONG, EVIL: {EVIL: LONG}}
    content["changes"] = [{"step": EVIL, "field": LONG, "old": EVIL, "new": LONG}]
    rows = [{"model": name, EVIL: 0.5, LONG: EVIL} for name in ("base", "tuned")]
    scores = {"verdict": LONG + EVIL, "note": f"{EVIL}; {LONG}", "rows": rows}
    ranking = {"best": EVIL, "checkpoints": [{"step": 4, EVIL: LONG}]}
    incident = {"why": LONG, "samples": [{"image": EVIL}]}
    (workdir / "incidents").mkdir()
    for name, own in (("config", content), ("scores", scores), ("ranking", ranking),
                      ("incidents/step_3", incident)):  # fmt: skip
        (workdir / f"{name}.json").write_text(json.dumps(own))
    return write_report(workdir).read_text(encoding="utf-8")


def of_evaluation():
    cells = [["metric", "better", "base", "tuned", "tuned - base"], [EVIL, LONG, "1", "2", "+1"]]
    tones = [[""] * 5, ["", "", "", "", "good"]]
    rows = [GridRow(words, [*pictures(9), None]) for words in (LONG, EVIL)]
    columns = ["target", "base", "tuned", EVIL, LONG]
    own = [EVIL, LONG], LONG + EVIL, cells, tones, [EVIL, LONG], columns, rows, {EVIL: LONG}
    return evaluation_page(EVIL, *own, EVIL)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Both pages, by name."""
    return {"run": of_run(tmp_path_factory.mktemp("run")), "evaluation": of_evaluation()}


@pytest.fixture(params=["run", "evaluation"])
def page(request, pages):
    return pages[request.param]


def test_both_come_from_one_template(pages):
    first, second = (Page(own) for own in pages.values())
    for tag in ("style", "script"):
        assert first.inside(tag, "html") == second.inside(tag, "html") != []
    frame = ("header", "main", "footer", "h1")
    in_order = [[tag for tag, _ in own.tags if tag in frame] for own in (first, second)]
    assert in_order == [["header", "h1", "main", "footer"]] * 2


def test_what_data_say_is_text_and_nothing_else(page):
    read = Page(page)
    assert len(read.all("script")) == len(read.all("style")) == 1
    assert "".join(read.text).count(EVIL) >= 4 and html.escape(EVIL) in page
    for _, attrs in read.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:image/").startswith("data:image/")


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(r"https?://|url\(|@import|import\(|fetch\(|XMLHttp|WebSocket", page)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in Page(page).tags}


def test_every_picture_has_a_text_and_a_size(page):
    images = Page(page).all("img")
    assert images
    for image in images:
        assert image["alt"].strip() and int(image["width"]) > 0 and int(image["height"]) > 0


def test_no_width_is_fixed_beyond_a_phone(page):
    """Widths in min() give way; what has none of its own is as wide as the page at most."""
    read = Page(page)
    (style,) = read.inside("style", "head")
    fixed = re.findall(r"(?<!max-)\b(?:min-)?width:\s*([\d.]+)(px|rem|em|ch)", style)
    assert fixed and all(float(n) * (1 if unit == "px" else 16) <= 390 for n, unit in fixed)
    assert not any("width" in attrs.get("style", "") for _, attrs in read.tags)
    assert "overflow-wrap: anywhere" in style and "@media (prefers-color-scheme: dark)" in style


def test_tables_scroll_inside_the_page(page):
    read = Page(page)
    tables = [n for n, (tag, _) in enumerate(read.tags) if tag == "table"]
    assert tables and all(read.tags[n - 1][1].get("class") == "scroll" for n in tables)


def test_every_file_of_the_template_is_installed():
    names = {path.name for path in html_page.FILES.iterdir()}
    assert names == {"template.html", "style.css", "script.js"}


# What is measured in each page, at each width. Scripts of the pages have run by then.
MEASURE = """
const told = {};
const frames = [...document.querySelectorAll("iframe")];
const loaded = frames.map((frame) => new Promise((done) => { frame.onload = done; }));
frames.forEach((frame) => { frame.srcdoc = pages[frame.dataset.page]; });
Promise.all(loaded).then(() => {
  for (const frame of frames) {
    const inside = frame.contentDocument;
    const visible = () => [...inside.querySelectorAll("figure[data-part=tuned]")]
      .filter((one) => one.getClientRects().length).map((one) => one.dataset.step ?? "");
    const picker = inside.getElementById("picker"), found = { last: visible() };
    if (picker) {
      const input = picker.querySelector("input");
      found.file = picker.querySelector("code").textContent;
      input.value = 0;
      input.dispatchEvent(new Event("input"));
      found.first = visible();
      found.none = !picker.querySelector(".none").hidden;
    }
    const cells = inside.querySelector(".cells");
    told[`${frame.dataset.page} ${frame.width}`] = {
      ...found,
      wide: inside.documentElement.scrollWidth,
      columns: getComputedStyle(cells).gridTemplateColumns.split(" ").length,
      wipes: inside.querySelectorAll(".wipe .pair img").length,
      copied: inside.querySelectorAll(".copy button").length,
      text: Math.min(...[...inside.querySelectorAll("figcaption, h3, p")]
        .map((one) => parseFloat(getComputedStyle(one).fontSize))),
      alerted: inside.querySelectorAll("script").length,
    };
  }
  document.getElementById("told").textContent = JSON.stringify(told);
});
"""


@pytest.fixture(scope="module")
def laid_out(pages, tmp_path_factory):
    """What a browser measured, by page and width."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    frames = "".join(
        f'<iframe data-page="{name}" width="{width}" height="900"></iframe>'
        for name in pages
        for width in WIDTHS
    )
    content = json.dumps(pages).replace("<", "\\u003c")
    path = tmp_path_factory.mktemp("browser") / "measure.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><pre id="told"></pre>{frames}'
        f"<script>const pages = {content};{MEASURE}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--window-size=1500,1000", "--virtual-time-budget=20000", "--dump-dom"]
    options += [f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
    told = re.search(r'<pre id="told">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told[1]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "evaluation"])
def test_nothing_overflows_on_any_screen(laid_out, name, width):
    found = laid_out[f"{name} {width}"]
    assert found["wide"] <= width
    assert found["columns"] == 2 if width == min(WIDTHS) else found["columns"] > 4
    assert found["text"] >= 13 and found["alerted"] == 1


def test_the_script_shows_one_step_and_its_file(laid_out):
    found = laid_out["run 390"]
    assert found["last"] == ["8", "8"] and found["first"] == ["0", "0"]
    assert found["file"].endswith("lora/step_8.safetensors") and found["none"]  # of step 0
    assert found["wipes"] == 4 and found["copied"] >= 4  # two prompts, each before and after
    assert laid_out["evaluation 390"]["wipes"] == 4
