"""The plan of the house: what may import what, and how large a room may be."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "simqat_jax"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LAYERS = [
    {"files"},
    {"numerics"},
    {"rules"},
    {"config"},
    {"ir"},
    {"capture", "ops"},
    {"training"},
    {"calibration"},
    {"analysis"},
    {"integer"},
    {"targets"},
    {"cli"},
]
"""From the foundation up: a room imports from those below it; two on one floor know nothing of
each other. `simqat_jax/__init__.py` is the roof."""
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def imported(name: str, path: pathlib.Path) -> set[str]:
    """The modules of the package that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            inside = {f"{module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= inside or {module}
    return {module for module in found if module.split(".")[0] == "simqat_jax"}


ARROWS = {name: imported(name, path) for name, path in SOURCES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_file_has_a_room():
    rooms = {room(name) for name in SOURCES if name != "simqat_jax"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "simqat_jax"])
def test_arrows_point_down(name):
    upward = [
        other
        for other in ARROWS[name]
        if other == "simqat_jax"
        or (room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)])
    ]
    assert not upward


def test_targets_know_nothing_of_each_other():
    for name, others in ARROWS.items():
        parts = name.split(".")
        if parts[1:2] == ["targets"] and len(parts) > 3:
            strangers = [
                o for o in others if o.startswith("simqat_jax.targets.") and len(o.split(".")) > 3
            ]
            assert {o.split(".")[2] for o in strangers} <= {parts[2]}


def test_no_circles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in ARROWS.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())


def test_the_picture_shows_the_layers():
    """docs/architecture.md draws the arrows that are held here."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    (picture,) = re.findall(r"^```text\n(files.*?)^```", text, re.M | re.S)
    drawn = [set(re.findall(r"\w+", floor)) for floor in picture.split("<")]
    assert drawn[: len(LAYERS)] == LAYERS


def definitions():
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert node.end_lineno is not None
                yield f"{name}.{node.name}", node, node.end_lineno - node.lineno + 1


def test_rooms_stay_small():
    large = [
        f"{name}: {lines} lines"
        for name, node, lines in definitions()
        if lines > (200 if isinstance(node, ast.ClassDef) else 60)
    ]
    assert not large
    assert max(len(path.read_text().splitlines()) for path in SOURCES.values()) <= 500


def test_folders_say_what_they_are():
    folders = {path.parent for path in SOURCES.values()} - {PACKAGE}
    missing = [f for f in folders if not (f / "README.md").is_file()]
    assert not [f for f in missing if not (f.parent / "README.md").is_file()]
