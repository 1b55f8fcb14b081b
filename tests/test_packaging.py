"""What is installed: the wheel's files, pinned versions, declared imports, the version and both commands."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint, packages_distributions
from pathlib import Path

import click
import dask.cli
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tilestream

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def named(requirements: list) -> set[str]:
    """Canonical names; groups that include others are dicts, their members are listed anyway."""
    return {canonicalize_name(Requirement(text).name) for text in requirements if isinstance(text, str)}


RUNTIME = named(PROJECT["project"]["dependencies"])
TOOLS = named([text for group in PROJECT["dependency-groups"].values() for text in group])


def imported(folder: Path) -> set[str]:
    """Top-level outside modules that the files of a folder import anywhere."""
    modules = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"tilestream"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    built = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_the_wheel_holds_code_data_pipelines_and_the_licence(wheel):
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "tilestream").rglob("*") if path.is_file()}
    expected = {name for name in data if not name.endswith(".pyc")}
    assert {"tilestream/py.typed", "tilestream/report/template/page.html"} <= expected
    pipelines = {f"tilestream/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.yaml")}
    assert pipelines
    licence = f"tilestream-{PROJECT['project']['version']}.dist-info/licenses/LICENSE"
    assert expected | pipelines | {licence} <= wheel


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"tilestream"}
    assert not [name for name in wheel if name.endswith(".pyc") or "/tests/" in name]


def test_every_direct_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([s.operator for s in pin.specifier] == ["=="] and not pin.extras for pin in pins)
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names))
    assert RUNTIME | TOOLS | named(PROJECT["build-system"]["requires"]) <= set(names)
    assert str(next(pin for pin in pins if pin.name == "torch").specifier) == "==2.13.0"


def test_pins_meet_what_is_asked_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    groups = [text for group in PROJECT["dependency-groups"].values() for text in group if isinstance(text, str)]
    for text in [*PROJECT["project"]["dependencies"], *groups]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("tilestream", RUNTIME | named([text for extra in EXTRAS.values() for text in extra])),
        ("tests", RUNTIME | TOOLS),
    ],
)
def test_whatever_is_imported_is_declared(folder, allowed):
    modules = imported(ROOT / folder) - {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert "torch" in modules
    distributions = packages_distributions()
    undeclared = {
        module
        for module in modules
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & allowed
    }
    assert undeclared == set()


def test_the_version_is_the_project_s():
    assert tilestream.__version__ == PROJECT["project"]["version"]


def test_the_licence_is_apache():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.fixture(scope="module")
def command() -> click.Command:
    """What `dask` loads by the entry point."""
    ((name, target),) = PROJECT["project"]["entry-points"]["dask_cli"].items()
    loaded = EntryPoint(name, target, "dask_cli").load()
    assert isinstance(loaded, click.Command)
    assert loaded.name == name == "tilestream"
    return loaded


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "-h",
        "saliency --help",
        "synth OUT --images 20 --seed=1",
        "--debug run p.yaml --set train.epochs=3 --set a.b=c -- -x",
    ],
)
def test_dask_hands_arguments_over_unread(command, monkeypatch, line):
    seen = []
    monkeypatch.setattr("tilestream.cli.main", lambda arguments: seen.append(list(arguments)))
    monkeypatch.setitem(dask.cli.cli.commands, "tilestream", command)
    result = CliRunner().invoke(dask.cli.cli, ["tilestream", *line.split()])
    assert (result.exit_code, result.output) == (0, "")
    assert seen == [line.split()]


def test_dask_passes_the_exit_status_on(command, monkeypatch):
    monkeypatch.setattr("tilestream.cli.main", lambda arguments: sys.exit(2))
    monkeypatch.setitem(dask.cli.cli.commands, "tilestream", command)
    assert CliRunner().invoke(dask.cli.cli, ["tilestream", "info"]).exit_code == 2


def test_dask_s_other_commands_load_nothing_heavy():
    # `dask scheduler`, `dask worker` ... import the entry point's module too
    module = PROJECT["project"]["entry-points"]["dask_cli"]["tilestream"].split(":")[0]
    code = f"import sys, {module}; print({{'torch', 'zarr', 'sklearn'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "set()"
