"""A module as a source of reward functions. It is parsed, and never imported or run."""

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

_MOST = 1 << 20
_GIVEN = {
    *("prompts", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric"),
}
"""What TRL gives to a reward function beside the columns."""

_HARMLESS = {"logging", "os", "random", "sys", "warnings"}
"""Modules whose functions a module may call while it is imported."""

_ACTS = {"input", "parse_args", "parse_args_and_config", "parse_args_into_dataclasses", "train"}


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, as ``module:function``, and the columns that it needs."""

    module: str
    name: str
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


def rewards_in(file: Path, home: Path) -> list[RewardFunction]:
    """Return the functions of a file that have the signature of TRL's rewards.

    Raises ``ValueError`` or ``OSError`` for a file that has some and cannot be used.
    """
    if file.stat().st_size > _MOST:
        return []
    source = file.read_bytes()
    if b"completion" not in source:
        return []
    tree = _parsed(source)
    functions = [of for of in tree.body if isinstance(of, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = {of.name: needs for of in functions if (needs := _needs(of)) is not None}
    if not found:
        return []
    if (line := next(_acting(tree.body), None)) is not None:
        raise ValueError(
            f"it has reward functions ({', '.join(found)}) and does something when it is imported "
            f"(line {line}): move them to a module of their own"
        )
    module = module_of(file, home)
    return [RewardFunction(module, name, needs) for name, needs in found.items()]


def module_of(file: Path, home: Path) -> str:
    """Return the module that a file is, where it is imported with the project on Python's path.

    Raises ``ValueError`` if no name imports it.
    """
    place = file.parent if file.name == "__init__.py" else file
    parts = place.relative_to(home).with_suffix("").parts
    if not parts or not all(name.isidentifier() for name in parts):
        raise ValueError("a part of its path cannot be a module's name, so it is not imported")
    # What is below src/ is imported without it, if the project is installed.
    for names in [parts[1:], parts] if parts[0] == "src" and len(parts) > 1 else [parts]:
        own = place if len(names) == 1 else place.parents[len(names) - 2]
        # Only of a name without dots: of another one, the package would be imported.
        spec = find_spec(names[0]) or PathFinder.find_spec(names[0], [str(home)])
        found = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if any(Path(path).resolve() == own.resolve() for path in found if path):
            return ".".join(names)
    raise ValueError(f"another module is called {parts[0]}, which is imported in its place")


def _parsed(source: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of texts with unknown escapes
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no Python: {error}") from error


def _needs(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str] | None:
    """Return the columns that a function needs, if it is a reward function."""
    if function.name.startswith("_"):
        return None
    of = function.args
    named = [arg.arg for arg in (*of.args, *of.kwonlyargs)]
    if of.posonlyargs or of.kwarg is None or not {"completions", "completion_ids"} & {*named}:
        return None
    last = of.args[len(of.args) - len(of.defaults) :]
    optional = {arg.arg for arg in last} | {
        arg.arg for arg, default in zip(of.kwonlyargs, of.kw_defaults, strict=True) if default
    }
    return frozenset(named) - optional - _GIVEN


def _acting(body: Iterable[ast.stmt]) -> Iterator[int]:
    """Yield the lines that do more, when a module is imported, than make names."""
    for node in body:
        if isinstance(node, ast.Try):
            yield from _acting([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.If):
            if "__name__" not in ast.unparse(node.test):
                yield from _acting([*node.body, *node.orelse])
        elif isinstance(node, ast.For | ast.While | ast.With | ast.Raise) or _acts(node):
            yield node.lineno


def _acts(node: ast.stmt) -> bool:
    """Tell whether a statement calls something for more than its value."""
    call = getattr(node, "value", None)
    if not isinstance(call, ast.Call):
        return False
    names = ast.unparse(call.func).split(".")
    alone = isinstance(node, ast.Expr) and names[0] not in _HARMLESS
    return alone or names[-1] in _ACTS or names[-1].endswith("Trainer")
