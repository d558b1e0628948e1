"""evaluation.html: one page with the table of scores and the pictures."""

from collections.abc import Mapping, Sequence

from dopsd_jax.reporting import html_page, shown_pictures
from dopsd_jax.reporting.pictures import GridRow

SHOWN = 60  # prompts; the others' pictures are in the folder


def page(
    title: str,
    about: Sequence[str],
    verdict: str,
    cells: Sequence[Sequence[str]],
    tones: Sequence[Sequence[str]],
    notes: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[GridRow],
    facts: Mapping[str, str],
    command: str,
) -> str:
    """The page: verdict, table of scores, pictures, and what it was made from.

    cells, tones: of the table with its head, see `results.table` and `results.tones`.
    """
    head, *body = cells
    left_out = len(rows) - SHOWN
    pictures = [shown_pictures.show([shown_pictures.of_arrays(columns, rows[:SHOWN])])]
    if left_out > 0:
        pictures.append(html_page.remark(f"{left_out} further prompts are not shown here."))
    scores = (
        html_page.table(head, body, "scores", tones[1:]),
        html_page.remark(
            "Mean ± half the width of the 95 % interval over prompts; differences are within "
            "prompts, on the same noise, and coloured where the interval leaves out 0.",
            *notes,
        ),
    )
    settings = html_page.table(("setting", "value"), facts.items(), "settings")
    sections = (
        html_page.section("Scores", *scores),
        html_page.section("Pictures", *pictures),
        html_page.section("Evaluate again", html_page.copied(command)),
        html_page.section("Settings", html_page.folded("all settings and versions", settings)),
    )
    return html_page.render("Evaluation", title, about, verdict, sections)
