"""The house keeps the rules of CONTRIBUTING.md: its root, its floors, its arrows, its sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergekit_pave"
ROOT_FILES = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
WITHOUT_MERGEKIT = ("algebra", "storage", "calibration")
MOST_FLOORS, MOST_LINES = 8, 400


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module of `package` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) + 1 - node.level]
            module = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """`algebra` for a file in that folder, `errors` for errors.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports() -> list[tuple[str, str, str]]:
    """Room, imported name, and `file:line`, of the whole package."""
    found = []
    for path in modules():
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for line, name in imported(path.read_text("utf-8"), package):
            found.append((room_of(path), name, f"{path.relative_to(ROOT)}:{line}"))
    return found


def rooms() -> set[str]:
    return {room_of(path) for path in modules()} - {"__init__", "__main__"}


def arrows() -> dict[tuple[str, str], list[str]]:
    """Which room imports from which, and where; the two doors of the root are no rooms."""
    found: dict[tuple[str, str], list[str]] = {}
    for room, name, place in imports():
        parts = name.split(".")
        if parts[0] == "mergekit_pave" and room in rooms():
            target = parts[1] if parts[1] in rooms() else "__init__"
            if target != room:
                found.setdefault((room, target), []).append(place)
    return found


def drawn() -> dict[str, set[str]]:
    """The drawing in CONTRIBUTING.md, from the lowest room to the highest."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (block,) = re.findall(r"```house\n(.*?)```", text, re.S)
    lines = [line.partition("->") for line in block.splitlines()]
    return {room.strip(): set(below.split()) for room, _, below in lines}


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The longest way down from each room, itself included."""

    def floor(room: str, way: tuple[str, ...] = ()) -> int:
        assert room not in way, f"a circle: {' -> '.join([*way[way.index(room):], room])}"
        return 1 + max((floor(lower, (*way, room)) for lower in below.get(room, ())), default=0)

    return {room: floor(room) for room in below}


def as_graph(pairs) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for room, lower in pairs:
        graph.setdefault(room, set()).add(lower)
        graph.setdefault(lower, set())
    return graph


# --- the rules -----------------------------------------------------------------------------


def test_the_root_holds_folders_and_four_files():
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert files <= ROOT_FILES, f"into a folder with {sorted(files - ROOT_FILES)}"
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders | {"errors"} == rooms() == set(drawn())


def test_no_arrow_leads_back_up():
    order = list(drawn())
    up = {f"{room} -> {lower}": places for (room, lower), places in arrows().items()
          if lower == "__init__" or order.index(lower) >= order.index(room)}
    assert not up


def test_no_circle_and_few_floors():
    found = floors(as_graph(arrows()))
    assert max(found.values()) <= MOST_FLOORS, found


def test_the_arrows_are_those_of_the_drawing():
    found = as_graph(arrows())
    assert {room: sorted(found[room]) for room in found} == {
        room: sorted(below) for room, below in drawn().items()}


def test_the_lower_rooms_do_not_know_mergekit():
    found = [place for room, name, place in imports()
             if room in WITHOUT_MERGEKIT and name.split(".")[0] == "mergekit"]
    assert not found


def test_no_file_is_too_long():
    lines = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in modules()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_no_test_module_is_too_long_or_imports_another():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= MOST_LINES, path
        for line, name in imported(text, ""):
            assert not re.match(r"(test_|conftest\b)", name), f"{path}:{line}"


# Called from outside of the package: by Python, by click, and where the reference is written.
CALLED_FROM_OUTSIDE = {
    "main", "list_commands", "get_command", "show", "reference_table"}


def names_used() -> set[str]:
    """Every name that the package loads, imports, names as `module:name`, or asks in a template."""
    templates = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("templates/*"))
    asked = re.findall(r"\{[{%](.*?)[%}]\}", templates, re.DOTALL)
    found = set(re.findall(r"\w+", " ".join(asked)))
    for path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        for top in tree.body:
            own = getattr(top, "name", None)  # a function that calls itself has no caller yet
            for node in ast.walk(top):
                if isinstance(node, ast.ImportFrom):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Name) and node.id != own:
                    found.add(node.id)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= set(re.findall(r"^[\w.]+:(\w+)$", node.value))
    return found


def test_nothing_is_there_for_tests_alone():
    used = names_used() | CALLED_FROM_OUTSIDE
    unused = {f"{path.relative_to(ROOT)}: {node.name}" for path in modules()
              for node in ast.walk(ast.parse(path.read_text("utf-8")))
              if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in used
              and not node.name.startswith("__")}
    assert not unused


# --- what the rules are read with ----------------------------------------------------------


@pytest.mark.parametrize("source, names", [
    ("import a.b, c", ["a.b", "c"]),
    ("from a import b as x, c", ["a.b", "a.c"]),
    ("from . import b", ["p.q.b"]),
    ("from .m import b", ["p.q.m.b"]),
    ("from ..m import b", ["p.m.b"]),
    ("def f():\n    if x:\n        from a.b import c", ["a.b.c"]),
])
def test_every_kind_of_import_is_read(source, names):
    assert [name for _, name in imported(source, "p.q")] == names


def test_circles_and_floors_are_seen():
    assert floors({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(AssertionError, match="a circle: a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})
