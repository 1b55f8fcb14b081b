"""The arrows of the house: which package may import which. Lazy and TYPE_CHECKING imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tilestream"
LEAVES = {"geometry", "nets", "cluster", "synthesis", "report"}
BELOW_STAGES = LEAVES | {"engine", "store", "methods", "training"}
ALLOWED = {
    **{leaf: set() for leaf in LEAVES},
    "engine": {"geometry"},
    "store": {"geometry"},
    "methods": {"engine", "geometry", "nets"},
    "training": {"engine", "methods", "nets"},
    "stages": BELOW_STAGES,
    "cli": {"stages"},
    "__main__": {"cli"},
    "__init__": {"engine", "methods", "nets", "store"},
}
THIRD_PARTY = {
    "geometry": set(),
    "cluster": {"dask", "distributed", "dask_cuda", "rich", "bokeh", "tornado"},
}
"""Packages whose outside imports are limited as well: geometry is standard library only, cluster never names torch."""


def imports(path: Path, root: Path = ROOT) -> tuple[set[str], set[str]]:
    """Packages of ours, and top-level outside packages, that a file imports anywhere."""
    ours, others = set(), set()
    here = ["tilestream", *path.relative_to(root).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "tilestream" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "tilestream":
                others.add(parts[0])
            elif len(parts) > 1:
                ours.add(parts[1])
    return ours, others


def package(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    name = package(path)
    assert name in ALLOWED, f"{name} is no room of the house"
    ours, _ = imports(path)
    assert ours - {name} <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(THIRD_PARTY))
def test_pure_packages_import_little(name):
    import sys

    for path in (ROOT / name).rglob("*.py"):
        assert imports(path)[1] - set(sys.stdlib_module_names) <= THIRD_PARTY[name], path


def test_every_room_is_there():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms == BELOW_STAGES | {"stages"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..store import Store", {"store"}),
        ("from .. import nets", {"nets"}),
        ("def f():\n    import tilestream.cluster.run", {"cluster"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tilestream.report import page", {"report"}),
        ("from tilestream import stages", {"stages"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(tmp_path, code, expected):
    path = tmp_path / "engine" / "file.py"
    path.parent.mkdir()
    path.write_text(code)
    assert imports(path, tmp_path)[0] == expected
