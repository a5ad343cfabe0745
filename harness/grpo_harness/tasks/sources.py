"""Where task types come from: the modules of this folder, and ``.py`` files of your own.

Nothing is registered by hand. A task type is the one subclass of :class:`TaskType` that a module
defines: those of this folder are found by listing it, your own file is loaded by
:func:`load_task_type`.
"""

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from grpo_harness import tasks
from grpo_harness.tasks.task import TaskType
from grpo_harness.text import escape

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")
"""Valid names of task types, which are used in names of files and of tests."""

_NO_TYPES = {"task", "dataset", "sources", "training_set"}


@cache
def _built_in() -> dict[str, TaskType]:
    files = {info.name for info in pkgutil.iter_modules(tasks.__path__)} - _NO_TYPES
    modules = [importlib.import_module(f"{tasks.__name__}.{file}") for file in sorted(files)]
    return {task_type.name: task_type for task_type in map(_only_task_type, modules)}


_own: dict[Path, TaskType] = {}


def task_types() -> dict[str, TaskType]:
    """Return every known task type by name: those of this folder and those loaded since."""
    return {**_built_in(), **{task_type.name: task_type for task_type in _own.values()}}


def load_task_type(source: str) -> TaskType:
    """Return the task type named ``source``, or load the one that a ``.py`` file defines.

    Raises ``ValueError`` when there is no such type or file, when the file does not define exactly
    one, and when its name is invalid or already that of another type. Whatever the file raises is
    passed on.
    """
    if source in task_types():
        return task_types()[source]
    path = Path(source)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"no task type '{escape(source)}': known are {', '.join(task_types())}; a type of "
            "your own is named by the path of its .py file"
        )
    path = path.resolve()
    if path in _own:
        return _own[path]
    name = f"grpo_harness_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs, because a dataclass in the file looks up its own module.
    sys.modules[name] = module
    try:
        # From its text: compiled files are known by size and second, and this one may just have
        # been mended.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))  # noqa: S102
        task_type = _only_task_type(module)
        # Upper and lower case are the same, as in the names of files on some systems.
        if task_type.name.lower() in map(str.lower, task_types()):
            raise ValueError(
                f"{source} defines the task type {task_type.name!r}, which exists already"
            )
    except BaseException:
        del sys.modules[name]
        raise
    _own[path] = task_type
    return task_type


def _only_task_type(module: ModuleType) -> TaskType:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, TaskType)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(
            f"{module.__file__} defines {len(classes)} subclasses of TaskType: it takes exactly one"
        )
    task_type: TaskType = classes[0]()
    name = getattr(task_type, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{module.__file__}: the task type's name is '{escape(str(name))}', and a name is 1 to "
            "64 letters, digits, '_', '-' and '.', with a letter or digit first and no '.' last"
        )
    return task_type
