"""The page: gradio's components around `drawing` and `watching`, and the server of them.

gradio is the extra `ui`. Its statistics are off, nothing is shared, and files are only those that
the two give it.
"""

import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_fields import is_number
from dopsd_jax.data.images import open_image
from dopsd_jax.reporting import parameters
from dopsd_jax.serving.drawing import Studio, numbers
from dopsd_jax.serving.watching import Watched

REFRESH = 5.0  # seconds between two looks at a run
KEPT = 24 * 3600  # seconds that pictures shown stay in gradio's cache, and between two looks at it
DRAW, WATCH = "draw", "watch"  # names of the endpoints


def need_gradio() -> ModuleType:
    """gradio, with its statistics off. Raises `UserError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError:
        raise UserError(
            "the page is built with gradio, which is not installed; pip install 'dopsd_jax[ui]'"
        ) from None
    return gradio


def build(studio: Studio | None, watched: Watched | None) -> Any:
    """The page as `gradio.Blocks`: a tab for each that is given. Raises `UserError`."""
    ui = need_gradio()
    with ui.Blocks(
        analytics_enabled=False, title="dopsd_jax", delete_cache=(KEPT, KEPT), fill_width=True
    ) as page:
        if studio:
            with ui.Tab("Draw"):
                _draw_tab(ui, page, studio)
        if watched:
            with ui.Tab("Run"):
                _watch_tab(ui, page, watched)
    return page


def serve(page: Any, host: str, port: int) -> None:
    """Serves the page until it is stopped, and prints its address.

    port: 0: the first free one from 7860 on. Raises `UserError` for a place that cannot be had.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port or None,  # gradio then looks from 7860 on
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"--port {port}: is not free on {host} ({error}); take another") from None
    print(f"page: {address}", flush=True)
    page.block_thread()


def _told(ui: ModuleType, action: Callable) -> Any:
    """What the action returns; a fault of the user becomes a message on the page."""
    try:
        return action()
    except UserError as error:
        raise ui.Error(str(error), print_exception=False) from None


def _whole(ui: ModuleType, value: int, label: str, **bounds: int) -> Any:
    """A field of a whole number. Text from a client is told; gradio compares it with bounds."""
    field = ui.Number(value, label=label, precision=0, **bounds)
    read = field.preprocess

    def checked(payload: Any) -> Any:
        if payload is not None and not is_number(payload):
            raise ui.Error(f"{label}: {payload!r} is no number", print_exception=False)
        return read(payload)

    field.preprocess = checked
    return field


def _draw_tab(ui: ModuleType, page: Any, studio: Studio) -> None:
    names = list(studio.files())
    with ui.Row():
        with ui.Column(scale=1, min_width=280):
            prompt = ui.Textbox(label="Prompt", lines=3)
            loras = ui.Dropdown(names, value=names[:1], multiselect=True, label="LoRA")
            strengths = ui.Textbox("1", label="Strengths, such as 0.5, 0.8, 1")
            with ui.Row():
                seed = _whole(ui, 0, "Seed", minimum=0, maximum=2**32 - 1)
                steps = _whole(ui, studio.pipe.family.DEPLOYED_STEPS, "Steps", minimum=1)
            with ui.Row():
                size = studio.pipe.own_size
                width = _whole(ui, size, "Width", minimum=1)
                height = _whole(ui, size, "Height", minimum=1)
            button = ui.Button("Draw", variant="primary")
            more = ui.Button("Look for new files", size="sm")
        with ui.Column(scale=3, min_width=320):
            shown = ui.Gallery(
                label="base, then each strength, from the same noise",
                columns=4,
                format="png",
                object_fit="contain",
                buttons=["download", "fullscreen"],
                interactive=False,
            )
            about = ui.Textbox(label="Parameters", lines=4, interactive=False)

    def draw(prompt, seed, loras, strengths, width, height, steps) -> Iterator:
        factors = _told(ui, lambda: numbers(strengths or "1"))
        whole = lambda value: None if value is None else int(value)
        sizes = {"width": whole(width), "height": whole(height), "steps": whole(steps)}
        asked = prompt or "", whole(seed) or 0, loras or ()  # None: a field that was emptied
        drawn, pictures = studio.draw(*asked, factors, **sizes), []
        while (one := _told(ui, lambda: next(drawn, None))) is not None:
            picture = Image.fromarray(one.image)
            picture.info |= parameters.chunks(one.made)  # a PNG file that is saved has them
            pictures.append((picture, one.label))
            yield pictures, picture.info[parameters.CHUNK]

    inputs = [prompt, seed, loras, strengths, width, height, steps]
    button.click(draw, inputs, [shown, about], api_name=DRAW)
    found = lambda: ui.Dropdown(choices=list(studio.files()))
    more.click(found, None, loras, api_visibility="private")
    page.load(found, None, loras, api_visibility="private")


def _watch_tab(ui: ModuleType, page: Any, watched: Watched) -> None:
    numbers = ui.Label(label=str(watched.workdir), show_heading=True)
    table = ui.Dataframe(headers=["", ""], interactive=False, column_widths=["12em", "auto"])
    grids = ui.Gallery(label="pictures, the newest first", columns=1, preview=True, format="png")
    before = ui.State(None)  # the files that this visitor sees

    def look(seen) -> tuple:
        found = _told(ui, watched.numbers)
        files = watched.pictures()
        state = [(str(path), path.stat().st_mtime_ns) for path, _ in files]
        done = {f"step {found['step']}": watched.share()}
        rows = [[name, text] for name, text in found.items()]
        if state == seen:
            return done, rows, ui.skip(), state
        opened = [(_told(ui, lambda p=path: open_image(p)), text) for path, text in files]
        return done, rows, opened, state

    outputs = [numbers, table, grids, before]
    ui.Timer(REFRESH).tick(look, before, outputs, api_name=WATCH, show_progress="hidden")
    page.load(look, before, outputs, api_visibility="private")
