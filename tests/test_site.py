"""The site of the documents: built without a warning, read without a network."""

import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from conftest import ROOT
from test_documents import DOCUMENTS, section

REFERENCE = re.compile(r"reference/(\S+)\.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as CI builds it; every warning is an error there: links, anchors, docstrings."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={out}"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_document_is_on_it(site):
    for document in DOCUMENTS:
        where = document.relative_to(ROOT)
        if not where.parts[0].startswith("."):
            name = "index" if where.stem == "README" else where.stem
            assert (site / where.parent / f"{name}.html").is_file(), where


def test_links_lead_to_files_of_the_site(site, pages):
    links = 0
    for page, text in pages.items():
        for link in re.findall(r'<a\b[^>]*?\bhref="?([^" >]+)', text):
            path = unquote(link.partition("#")[0])
            if path and not re.match(r"\w+:", path):
                start = site if path.startswith("/") else page.parent  # of 404.html
                assert (start / path.lstrip("/")).exists(), f"{page.relative_to(site)}: {link}"
                links += 1
    assert links > 1000


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for page, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="?([^" >]+)', text)
        loaded += re.findall(r'<link\b[^>]*?\bhref="?([^" >]+)', text)
        assert loaded and not [url for url in loaded if re.match(r"(\w+:)?//", url)], page
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8"))
        assert not found, sheet
    # What makes the theme's script fetch more: drawings, and the numbers of a code host.
    active = re.compile(r'class="mermaid"|data-md-component="?source')
    assert not [page for page, text in pages.items() if active.search(text)]


def test_the_public_modules_have_a_page(site):
    listed = re.findall(r"^\| `([\w.]+)` \|", section("What others may build on"), flags=re.M)
    assert REFERENCE.findall((ROOT / "mkdocs.yml").read_text("utf-8")) == listed
    for module in listed:
        text = (site / "reference" / f"{module}.html").read_text("utf-8")
        assert len(re.findall(rf'id="{re.escape(module)}\.\w+', text)) >= 1, module
