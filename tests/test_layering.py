"""The map in the package is true: every module is on it and imports only upwards."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_harness

ROOT = Path(grpo_harness.__file__).parent
MAP = re.findall(r"^``([\w/.]+)``", grpo_harness.__doc__, re.MULTILINE)
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate"}
MAY_BE_HEAVY = {"policy/", "engines/", "grpo/", "training/", "contract/", "learning/"}


def room(path):
    """The entry of the map that a file or a dotted module below ``grpo_harness`` belongs to."""
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


def test_every_module_is_on_the_map_and_the_map_is_true():
    assert {room(path) for path in FILES} == set(MAP)
    assert len(MAP) == len(set(MAP))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_up_the_map(path):
    own = MAP.index(room(path))
    for module, _ in imports(path):
        package, *rest = module.split(".")
        if package != "grpo_harness":
            continue
        above = [f"{rest[0]}.py", f"{rest[0]}/"]
        (place,) = [MAP.index(entry) for entry in above if entry in MAP] or [-1]
        assert place <= own, f"{path.name} imports {module}, which stands below it on the map"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_needs_torch_imports_it(path):
    heavy = {module for module, _ in imports(path) if module.split(".")[0] in HEAVY}
    names_a_gpu = path.name == "provenance.py" and heavy == {"torch"}
    assert not heavy or room(path) in MAY_BE_HEAVY or names_a_gpu


def test_only_the_plugin_imports_pytest():
    users = {
        room(path) for path in FILES for name, _ in imports(path) if name.split(".")[0] == "pytest"
    }
    assert users == {"plugin/"}


@pytest.mark.parametrize(
    "module", ["rewards.rule", "tasks", "gate.verdicts", "rules", "report.report", "plugin", "cli"]
)
def test_a_module_loads_without_torch(module):
    code = f"import grpo_harness.{module}, sys; sys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
