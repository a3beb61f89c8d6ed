"""Imports go down the floors only, and the files keep to their manners."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldm_jax"
FLOORS = {
    "errors": 0,
    "keys": 0,
    "options": 0,
    "files": 0,
    "sharding": 0,
    "diffusion": 1,
    "models": 1,
    "data": 1,
    "train": 2,
    "interop": 2,
    "eval": 3,
    "runs": 4,
    "sampling": 5,
    "jobs": 6,
    "cli": 7,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(source: str) -> set[str]:
    """The rooms of ldm_jax (first name after the package) that a module's text imports."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            if module == "ldm_jax":
                rooms |= {alias.name for alias in node.names}
            elif module.startswith("ldm_jax."):
                rooms.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ldm_jax.")}
    return rooms


def violations(room: str, source: str) -> list[str]:
    floor = FLOORS[room]
    return [
        other
        for other in imported_rooms(source)
        # Floor 0 is single files that may stand on `errors`; a room may use its own files.
        if other != room and not FLOORS[other] < floor and not (floor == 0 and other == "errors")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if path == PACKAGE / "__init__.py":
        assert not imported_rooms(path.read_text())
        return
    assert not violations(room, path.read_text())


def test_an_upward_or_sideways_import_is_found():
    assert violations("models", "from ldm_jax.train import state") == ["train"]
    assert violations("data", "from ldm_jax import models") == ["models"]
    assert violations("jobs", "import ldm_jax.cli") == ["cli"]
    assert violations("train", "from ldm_jax.models.unet import Config") == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_without_a_name(path):
    assert path.stem not in ("utils", "util", "helpers", "base", "common", "misc")


def foreign_imports(nodes) -> set[str]:
    names = set()
    for node in nodes:
        names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {name.split(".")[0] for name in names} & {"tensorflow", "torch"}


def test_the_trainer_never_imports_tensorflow_or_torch():
    for path in FILES:
        tree = ast.parse(path.read_text())
        if path == PACKAGE / "interop" / "torch_file.py":  # inside a function, for such a file
            assert not foreign_imports(tree.body), path
            assert foreign_imports(ast.walk(tree)) == {"torch"}, path
        else:
            assert not foreign_imports(ast.walk(tree)), path
