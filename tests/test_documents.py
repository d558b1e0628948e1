"""What the documents say of files and rooms is true."""

import re

import pytest
from conftest import ROOT
from test_rooms import ROOMS, arrows

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"runs", "build", ".venv"} & set(path.relative_to(ROOT).parts)
)
ARCHITECTURE = ROOT / "docs" / "architecture.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    inside = [link.partition("#")[0] for link in links if not re.match(r"\w+:", link)]
    assert not [link for link in inside if link and not (document.parent / link).exists()]


def section(title: str) -> str:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_drawing_of_the_rooms_is_true():
    drawing = section("The rooms").partition("```mermaid\ngraph LR\n")[2].partition("\n```")[0]
    assert drawing == "\n".join(arrows())


def test_every_room_is_described():
    assert re.findall(r"^\| `(\w+)` \|", section("The rooms"), flags=re.M) == list(ROOMS)


def test_the_walk_names_files_that_exist_each_once():
    named = re.findall(r"`([\w/]+\.py)`", section("One caption and one picture"))
    assert len(named) > 25
    assert len(named) == len(set(named))
    package = ROOT / "dopsd_jax"
    assert not [f for f in named if not (package / f.removeprefix("dopsd_jax/")).is_file()]
