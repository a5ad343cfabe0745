"""Of what is in a repository, what is judged. Each choice is said, with what else is there.

The trained policy is the newest that a training has left its signs in. Its base is what its files
name, or the recipe, or else a checkpoint without such signs. The data set is one that no training
sees, and its rewards are those of the recipe, or of the module with the most that take its columns.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_harness.engines.engine import Sampling
from grpo_harness.init.checkpoints import Checkpoint, policy_named
from grpo_harness.init.data import DataFile
from grpo_harness.init.look import Found
from grpo_harness.init.recipes import RecipeFile
from grpo_harness.policy import PolicyName
from grpo_harness.tasks import task_types
from grpo_harness.text import escape

_NOT_YET = "checkpoints/latest"
_ANY = ["module:function"]
_DECIDES = re.compile("accura|correct", re.IGNORECASE)


@dataclass(frozen=True)
class Judged:
    """A data set with its rewards. ``lacks`` says what it cannot be judged without, if anything."""

    name: str
    file: DataFile
    rewards: Sequence[str]
    weights: Sequence[float] | None = None
    lacks: str = ""

    @property
    def correct(self) -> str | None:
        """The reward that by its name decides what is correct."""
        names = (reward.partition(":")[2] for reward in self.rewards)
        return next((name for name in names if _DECIDES.search(name)), None)


@dataclass
class Choice:
    """What is judged. ``base`` is ``None`` where nothing names what training began with.

    ``data`` is ``None`` for the built-in tasks. ``extras`` are those of the package that are
    needed. ``said`` has a line for each choice, and ``to_do`` what is left to the user.
    """

    trained: str = "nano-trained"
    base: str | None = "nano-base"
    recipe: RecipeFile | None = None
    data: Judged | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)

    @property
    def ready(self) -> Judged | None:
        """The data set, if it can be judged as it is."""
        return self.data if self.data and not self.data.lacks else None


def choose(found: Found, table: Mapping[str, Any] | None = None) -> Choice:
    """Choose what is judged of what was found; or nothing, if the project's ``table`` says it."""
    if table is not None:
        choice = Choice(trained=str(table.get("trained")), base=table.get("base", "nano-base"))
        choice.said.append(("table", "pyproject.toml has one, so that nothing is guessed"))
        return choice
    choice = Choice()
    _choose_policies(found, choice)
    _choose_data(found, choice)
    if recipe := choice.recipe:
        choice.said.append(("recipe", f"{escape(recipe.path)}{_also(found.recipes, recipe)}"))
    choice.sampling = _sampling(choice)
    return choice


def _choose_policies(found: Found, choice: Choice) -> None:
    trained = max(
        found.checkpoints, key=lambda of: (not of.named_base, of.trained, of.age), default=None
    )
    recipe = choice.recipe = _recipe(found, trained)
    if trained:
        choice.trained = trained.path
        which = "whose files are a training's" if trained.trained else "checkpoint"
        why = f"the newest {which}{_also(found.checkpoints, trained)}"
        if trained.adapter:
            choice.extras.append("peft")
            if find_spec("peft") is None:
                choice.to_do.append("for the adapter, run `pip install 'grpo-harness[peft]'`")
    elif recipe:
        out = recipe.text("output_dir") or _NOT_YET
        choice.trained = _NOT_YET if has_magic(out) else out  # several candidates, of none yet
        why = f"where {escape(recipe.path)} trains to; nothing is there yet"
        choice.to_do.append(f"train to {escape(choice.trained)}, or name another trained policy")
    else:
        choice.said.append(("policies", "none found: the embedded pair stands for yours"))
        choice.to_do.append("name your policies in pyproject.toml: trained and base")
        return
    choice.said.append(("trained", f"{escape(choice.trained)}: {why}"))
    choice.base, why = _base(found, choice, trained)
    choice.said.append(("base", why))
    if choice.base is None:
        choice.to_do.append("name the base in pyproject.toml, so that the two are compared")


def _recipe(found: Found, trained: Checkpoint | None) -> RecipeFile | None:
    """Return the newest recipe, or the one whose output the trained policy is."""

    def wrote(recipe: RecipeFile) -> bool:
        out = recipe.text("output_dir")
        return bool(trained and out and trained.folder.is_relative_to(found.home / out))

    return max(found.recipes, key=lambda of: (wrote(of), of.made, of.path), default=None)


def _base(found: Found, choice: Choice, trained: Checkpoint | None) -> tuple[str | None, str]:
    """Return the base of the trained policy, and what is said of it."""
    ways: list[tuple[str | None, str]] = []
    if trained:
        ways.append((trained.base, "as the files of the trained policy say"))
    if recipe := choice.recipe:
        named = policy_named(recipe.text("model_name_or_path") or "", found.home)
        ways.append((named, f"as {escape(recipe.path)} says"))
    raw = trained is not None and trained.trained
    others = [of for of in found.checkpoints if of.named_base or (raw and not of.trained)]
    likely = max(others, key=lambda of: (of.named_base, of.age), default=None)
    ways.append((likely.path if likely else None, "the checkpoint that looks like one"))
    own = PolicyName(choice.trained, found.home)
    unused = ""
    for name, why in ways:
        other = PolicyName(name or "", found.home)
        if name is None or (own.folder and other.folder and own.folder.samefile(other.folder)):
            continue
        if own.slug == other.slug:
            unused = f" ({escape(name)} is called like the trained policy: rename one)"
            continue
        return name, f"{escape(name)}: {why}"
    return None, f"nothing names it{unused}"


def _choose_data(found: Found, choice: Choice) -> None:
    recipe = choice.recipe
    trained_on = {found.home / path for path in _trained_on(recipe)}

    def judged(file: DataFile) -> Judged:
        return Judged(_task_name(file.path), file, *_rewards(found, recipe, file))

    def order(of: Judged) -> tuple[Any, ...]:
        seen, file = found.home / of.file.path in trained_on, of.file
        worse = (bool(of.lacks), seen, not file.held_out, file.answer is None)
        return *worse, -len(of.rewards), file.path

    data = min(map(judged, found.data), key=order, default=None) or _elsewhere(recipe)
    choice.data = data
    if data is None:
        if found.rewards:
            choice.said.append(("rewards", f"{_few(found.rewards)}: not used without a data set"))
        return
    path = escape(data.file.path)
    columns = f", of columns {escape(', '.join(data.file.columns))}" if data.file.columns else ""
    choice.said.append(("data", f"{path}{columns}{_also(found.data, data.file)}"))
    if data.lacks:
        choice.said.append(("rewards", f"{data.lacks}: the data set is a comment until then"))
        choice.to_do.append("name the rewards of the data set in pyproject.toml, and uncomment it")
        return
    others = [of for of in found.rewards if str(of) not in data.rewards]
    also = f"; also there: {_few(others)}" if others else ""
    choice.said.append(("rewards", f"{_few(data.rewards)}{also}"))
    if found.home / data.file.path in trained_on:
        choice.to_do.append(
            f"judge by rows that no training sees: {path} is what is trained on, and what a "
            "training has seen is refused. Name another file as path in pyproject.toml"
        )
    elif not data.file.held_out:
        choice.to_do.append(f"see that no training sees the rows of {path}")
    if data.correct:
        choice.to_do.append(f"see that {data.correct} is 1.0 for what is correct, and less else")


def _trained_on(recipe: RecipeFile | None) -> list[str]:
    """Return the data sets that a recipe trains on, as it names them."""
    if recipe is None:
        return []
    mixture = recipe.values.get("datasets")
    parts = [of for of in mixture if isinstance(of, dict)] if isinstance(mixture, list) else []
    paths = [recipe.text("dataset_name"), *(of.get("path") for of in parts)]
    return [path for path in paths if isinstance(path, str)]


def _elsewhere(recipe: RecipeFile | None) -> Judged | None:
    """Return the data set that a recipe names and that is no file here, such as one of the Hub."""
    for path in _trained_on(recipe):
        assert recipe is not None
        file = DataFile(path, (), "prompt", None)
        lacks = f"{escape(path)} is no file here, whose columns could be seen"
        return Judged(_task_name(path), file, recipe.rewards or _ANY, recipe.weights, lacks)
    return None


def _rewards(
    found: Found, recipe: RecipeFile | None, file: DataFile
) -> tuple[list[str], Sequence[float] | None, str]:
    """Return the rewards of a data set and their weights, and what is lacking."""
    if recipe and recipe.rewards:
        return recipe.rewards, recipe.weights, _lacking(found, recipe, file)
    modules = [
        [str(of) for of in functions if of.needs <= {*file.columns}]
        for _, functions in groupby(found.rewards, key=lambda of: of.module)
    ]
    if most := max(modules, key=len, default=[]):
        return most, None, ""
    lacks = "no reward function takes these columns" if modules else "no reward function found"
    return _ANY, None, lacks


def _lacking(found: Found, recipe: RecipeFile, file: DataFile) -> str:
    """Return why the rewards of a recipe cannot score a data set, if they cannot."""
    needs = {str(of): of.needs for of in found.rewards}
    needs["trl.rewards:think_format_reward"] = frozenset()
    if find_spec("math_verify"):
        for name in ("accuracy_reward", "reasoning_accuracy_reward"):
            needs[f"trl.rewards:{name}"] = frozenset({"solution"})
    for name in recipe.rewards:
        if name not in needs:
            return f"{escape(recipe.path)} names {escape(name)}, which is not found"
        if missing := sorted(needs[name] - {*file.columns}):
            return f"{escape(name)} needs the column {escape(missing[0])}"
    names = {name.partition(":")[2] for name in recipe.rewards}
    twice = len(names) < len(recipe.rewards)
    return f"two rewards of {escape(recipe.path)} have one name" if twice else ""


def _sampling(choice: Choice) -> Mapping[str, Any]:
    """Return how completions are drawn: as in training, as far as that is known."""
    if recipe := choice.recipe:
        drawn: dict[str, Any] = {
            "temperature": recipe.number("temperature") or 1.0,
            "top_p": recipe.number("top_p") or 1.0,
            "max_new_tokens": int(recipe.number("max_completion_length") or 256),
        }
        try:
            Sampling(**drawn)
        except ValueError:
            return {}
        return drawn
    return {"max_new_tokens": 256} if choice.ready else {}  # as many as TRL draws by default


def _task_name(path: str) -> str:
    """Return the name of a data set as a task."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem)[:60].strip("-._") or "data"
    return f"{name}-data" if name in task_types() else name


def _also(every: Iterable[Checkpoint | DataFile | RecipeFile], chosen: object) -> str:
    others = [of.path for of in every if of is not chosen]
    return f"; also there: {_few(others)}" if others else ""


def _few(names: Sequence[object]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(escape(str(name), 80) for name in names[:4]) + more
