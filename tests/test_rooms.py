"""The rooms of the package: which may import which. docs/architecture.md explains them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dopsd_jax

PACKAGE = Path(dopsd_jax.__file__).parent
NAME = PACKAGE.name
# A room imports itself and what stands before it.
ROOMS = (
    "common",
    "parallel",
    "models",
    "weights",
    "data",
    "adapters",
    "dopsd",
    "random_model",
    "families",
    "conversion",
    "methods",
    "config",
    "training",
    "conditioning",
    "run",
    "reporting",
    "evaluation",
    "estimation",
    "serving",
    "programs",  # the files at the top of the package, but dopsd.py
    "miniature",
)
# What parses a command line before JAX is imported, which takes seconds.
LIGHT = ("common.program", "config.flags", "convert", "parallel.cluster", "__main__")
HEAVY = {"jax", "flax", "orbax", "grain", "transformers", "torch"}


def _modules() -> dict[str, Path]:
    """Module names without the package's, and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


MODULES = _modules()


def room(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in ROOMS else "programs"


def imports(path: Path) -> set[str]:
    """The modules of the package that a file names, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(
                name if name.removeprefix(f"{NAME}.") in MODULES else node.module for name in inner
            )
    found = {name.removeprefix(f"{NAME}.") for name in found if name.startswith(f"{NAME}.")}
    return found & MODULES.keys()


GRAPH = {module: imports(path) for module, path in MODULES.items()}


def test_every_file_stands_in_a_room():
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(ROOMS)


def test_a_room_imports_only_what_stands_before_it():
    wrong = {
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    }
    assert not wrong


def test_no_file_imports_itself_through_others():
    done, circles = set(), []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circles.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for other in sorted(GRAPH[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(GRAPH):
        visit(module, ())
    assert not circles


def arrows() -> list[str]:
    """The imports between rooms, without those that follow from others, as mermaid draws them."""
    direct = {
        name: {room(o) for m, others in GRAPH.items() if room(m) == name for o in others} - {name}
        for name in ROOMS
    }
    behind: dict[str, set[str]] = {}
    for name in ROOMS:  # in their order: what a room imports is known before it
        direct[name] &= behind.keys()
        behind[name] = direct[name].union(*(behind[other] for other in direct[name]))
    return [
        f"    {other} --> {name}"
        for name in ROOMS
        for other in sorted(direct[name], key=ROOMS.index)
        if not any(other in behind[third] for third in direct[name])
    ]


def test_nothing_imports_the_miniature():
    guests = {m for m, others in GRAPH.items() if any(room(o) == "miniature" for o in others)}
    assert not {m for m in guests if room(m) != "miniature"}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_no_large_library(module):
    code = f"import sys, {NAME}.{module}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(out.stdout.split())
