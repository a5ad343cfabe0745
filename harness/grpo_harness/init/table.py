"""What is judged, as a table of pyproject.toml."""

import json
import re
from collections.abc import Sequence

from grpo_harness.init.choose import Choice, Judged
from grpo_harness.settings import TABLE

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def table(choice: Choice, baselines: str | None) -> str:
    """Return the table as TOML; ``baselines`` is the folder of the baselines if not the default."""
    base = "# base = " if choice.base is None else "base = "
    lines = [
        f"[{TABLE}]  # guessed by `grpo-harness init`: see the section Settings of its README",
        f"trained = {text(choice.trained)}",
        base + text(choice.base or "what the training began with"),
    ]
    if choice.recipe:
        lines.append(f"recipe = {text(choice.recipe.path)}")
    if baselines:
        lines.append(f"baselines = {text(baselines)}")
    if choice.sampling:
        lines += ["", f"[{TABLE}.sampling]"]
        lines += [f"{key} = {value}" for key, value in choice.sampling.items()]
    if choice.data:
        mark = "# " if choice.data.lacks else ""
        lines += ["", *(f"{mark}{line}" for line in _data(choice.data))]
    return "\n".join(lines) + "\n"


def text(value: str) -> str:
    """Return a text as a basic string of TOML, which is JSON's but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _texts(values: Sequence[str]) -> str:
    return f"[{', '.join(map(text, values))}]"


def _data(data: Judged) -> list[str]:
    name = data.name if _BARE.fullmatch(data.name) else text(data.name)
    lines = [f"[{TABLE}.data.{name}]", f"path = {text(data.file.path)}"]
    if data.file.prompt != "prompt":
        lines.append(f"prompt = {text(data.file.prompt)}")
    if data.file.answer:
        lines.append(f"answer = {text(data.file.answer)}")
    lines.append(f"rewards = {_texts(data.rewards)}")
    if data.weights:
        lines.append(f"reward_weights = {[*data.weights]}")
    if data.correct:
        lines.append(f"correct = {{ reward = {text(data.correct)}, at_least = 1.0 }}")
    return lines
