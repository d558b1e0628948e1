"""Which files the site has (a hook of mkdocs.yml).

A page stands on the site where its document stands in the repository, and so does every file that
a document links to. So the links that work on a code host work on the site, unchanged.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
REFERENCE = "reference/"  # pages of the navigation that are made from docstrings


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the pages of the navigation, and what these link to."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = list(_pages(config.nav))
    found = {name: _made(name, config) for name in pages if name.startswith(REFERENCE)}
    for name in pages:
        if name not in found:
            found[name] = _file(name, config)
            for linked in _links(ROOT / name):
                found.setdefault(linked, _file(linked, config))
    return Files([*theme, *found.values()])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Numbered lists as Python-Markdown wants them: what belongs to an entry 4 columns in, and a
    blank line between entries."""
    lines, numbered = [], False
    for line in markdown.splitlines():
        if line.startswith("   "):
            line = f" {line}" if numbered else line
        elif line.strip():
            begins = re.match(r"\d+\. ", line) is not None
            lines += [""] * (begins and numbered)
            numbered = begins
        lines.append(line)
    return "\n".join(lines)


def _pages(nav: list | dict | str) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(part)


def _file(name: str, config: MkDocsConfig) -> File:
    return File.generated(config, name, abs_src_path=str(ROOT / name))


def _made(name: str, config: MkDocsConfig) -> File:
    """The page of one module."""
    module = name.removeprefix(REFERENCE).removesuffix(".md")
    title = module.removeprefix("dopsd_jax.")
    return File.generated(config, name, content=f"---\ntitle: {title}\n---\n\n::: {module}\n")


def _links(page: Path) -> Iterator[str]:
    """The files of the repository that a document links to, but other documents."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        path = (page.parent / link).resolve()
        if path.is_file() and path.suffix != ".md" and path.is_relative_to(ROOT):
            yield str(path.relative_to(ROOT))
