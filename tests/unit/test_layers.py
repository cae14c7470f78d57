"""The floors of docs/architecture.md hold: a file imports only from its own room and from floors below."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cvdist"
# Libraries that only some rooms may import, so that the loop runs without them.
ONLY_IN = {"ray": {"jobs", "runtime"}, "mlflow": {"tracking", "saved"}}


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top, as the table in docs/architecture.md has them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.search(r"\| floor \| rooms \|.*?\n((?:\|.*\n)+)", text)
    assert table, "docs/architecture.md has no table of floors"
    rows = [line for line in table[1].splitlines() if not line.startswith("| ---")]
    return [re.findall(r"`(\w+)`", row.split("|")[2]) for row in rows]


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(name: str) -> str:
    """`storage` for `cvdist.storage.locate`; empty for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and not parts[1].startswith("_") else ""


def test_each_room_stands_in_the_table_once() -> None:
    listed = [name for rooms in floors() for name in rooms]
    there = {room(name) for name in modules()} - {""}
    assert sorted(listed) == sorted(there)


def test_unit_tests_lie_in_the_folders_of_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/test_*.py")}
    assert folders <= {name for rooms in floors() for name in rooms}


def test_no_import_leads_upward_or_to_a_neighbor() -> None:
    level = {name: number for number, rooms in enumerate(floors()) for name in rooms}
    wrong = []
    for name, path in modules().items():
        for target in imports(path):
            own, other = room(name), room(target)
            if target.startswith("cvdist.") and own and other and own != other and level[other] <= level[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}, which is not on a floor below")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_two_modules_import_each_other_at_their_start() -> None:
    """A cycle within a room, between the imports at the top of its files."""
    known = modules()
    edges = {name: set[str]() for name in known}
    for name, path in known.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cvdist"):
                full = {f"{node.module}.{one.name}" for one in node.names}
                edges[name] |= {one if one in known else str(node.module) for one in full} - {name}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"modules in or above a cycle: {', '.join(sorted(edges))}"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for name, path in modules().items()
        for target in imports(path)
        if target.split(".")[0] == library and room(name) not in ONLY_IN[library]
    }
    assert not users, f"{library} is imported outside of {ONLY_IN[library]}: {', '.join(sorted(users))}"
