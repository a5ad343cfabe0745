"""The map in the package is true: every module is on it and imports only upwards."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import grpo_harness

ROOT = Path(grpo_harness.__file__).parent
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
MAY_BE_HEAVY = {"policy/", "engines/", "grpo/", "training/", "contract/", "learning/"}


def entries(package):
    """The files and rooms that the docstring of a package lists, in their order."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    return re.findall(r"^``([\w/.]+)``(?: …)?  ", text, re.MULTILINE)


def entry(path):
    """The entry of its package's map that a file or a folder is."""
    return f"{path.name}/" if path.is_dir() else path.name


MAP = entries(ROOT)


def room(path):
    """The entry of the map that a file below the package belongs to."""
    first, *rest = path.relative_to(ROOT).parts
    return f"{first}/" if rest else first


def imports(path):
    """Yield (module, whether it is imported when the file is) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        node
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.unparse(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in late
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in late


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
MODULES = [path for path in FILES if path.name != "__init__.py"]
ROOMS = sorted({path.parent for path in MODULES} - {ROOT})


def test_every_module_is_on_the_map_and_the_map_is_true():
    assert {room(path) for path in FILES} == set(MAP)
    assert len(MAP) == len(set(MAP))


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: folder.name)
def test_every_room_has_a_map_that_is_true(folder):
    listed = entries(folder)
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    # One name stands for all task types, which know nothing of each other.
    types = {f"{module.__name__.split('.')[-1]}.py" for module in _task_types()}
    alike = types if folder.name == "tasks" else set()
    assert files - alike <= set(listed) <= files
    assert len(listed) == len(set(listed))


def _task_types():
    import importlib

    from grpo_harness.tasks import task_types

    return [importlib.import_module(type(of).__module__) for of in task_types().values()]


def target(module):
    """The file that an imported name of ours comes from."""
    *parts, name = module.split(".")[1:]
    for place in (ROOT.joinpath(*parts, name), ROOT.joinpath(*parts)):
        if place.with_suffix(".py").is_file():
            return place.with_suffix(".py")
        if (place / "__init__.py").is_file():
            return place
    raise AssertionError(f"{module} is nowhere")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_up_the_maps(path):
    for module, _ in imports(path):
        if module.split(".")[0] != "grpo_harness":
            continue
        to = target(module)
        if to == ROOT:
            continue
        if room(path) != (
            away := room(to) if to.is_file() else f"{to.relative_to(ROOT).parts[0]}/"
        ):
            assert MAP.index(away) < MAP.index(room(path)), f"{path.name} imports {module}"
        elif to.is_file() and to != path:
            listed = entries(path.parent)
            places = [listed.index(n) if n in listed else None for n in (to.name, path.name)]
            if None in places:  # a task type: of its room it knows what stands above all of them
                places = [listed.index(to.name), listed.index("arithmetic.py")]
            assert places[0] < places[1], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_needs_torch_imports_it(path):
    heavy = {module for module, _ in imports(path) if module.split(".")[0] in HEAVY}
    late = {module for module, now in imports(path) if not now}
    named = {"provenance.py": {"torch"}, "dataset.py": {"datasets"}}.get(path.name, set())
    assert heavy <= named & late or room(path) in MAY_BE_HEAVY


def test_only_the_plugin_imports_pytest():
    users = {
        room(path) for path in FILES for name, _ in imports(path) if name.split(".")[0] == "pytest"
    }
    assert users == {"plugin/"}


@pytest.mark.parametrize(
    "module", ["rewards.rule", "tasks", "gate.verdicts", "checks", "report.report", "plugin", "cli"]
)
def test_a_module_loads_without_torch(module):
    code = f"import grpo_harness.{module}, sys; sys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_draws_is_loaded_only_where_something_is_drawn():
    code = (
        "import grpo_harness.engines.transformers, sys\n"
        "sys.exit(bool({'grpo_harness.engines.decoding', 'transformers.modeling_utils'} "
        "& set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_room_is_in_the_wheel():
    table = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {f"grpo_harness.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    listed = table["tool"]["setuptools"]["packages"]
    assert {"grpo_harness", "grpo_harness.suites", *rooms} == {*listed}
