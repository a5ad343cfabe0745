"""The value of a small Python expression, computed without ever running it as code."""

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from grpo_harness.tasks.task import (
    Reading,
    TutorialType,
    letters,
    read_integer,
    read_text,
    str_field,
)

# A subset of Python: what Python would refuse (a leading zero, a no-break space, a null
# character) has no value here either.
_STRING = r"""(?P<q>['"])(?P<text>[^'"\\\r\n\0\ud800-\udfff]*)(?P=q)"""
_INTEGER = r"[+-]?(?:0|[1-9][0-9]{0,3999})"
_INTEGERS = rf"(?P<numbers>[ \t]*{_INTEGER}(?:[ \t]*,[ \t]*{_INTEGER})*[ \t]*)"


class PyEval(TutorialType):
    """Seven kinds of expression, uniformly.

    The answer comes from matching the expression against a fixed list of forms, with any string or
    integers in them. Other expressions have no answer.
    """

    name = "py_eval"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        s = letters(rng, rng.randint(3, 8))
        forms = (
            lambda: f"len('{s}')",
            lambda: f"'{s}'[::-1]",
            lambda: f"'{s}'.upper()",
            lambda: f"abs({rng.randint(-50, 50)})",
            lambda: f"sum({[rng.randint(-9, 9) for _ in range(3)]})",
            lambda: f"max({rng.randint(-20, 20)}, {rng.randint(-20, 20)})",
            lambda: f"min({rng.randint(-20, 20)}, {rng.randint(-20, 20)})",
        )
        return {"expr": rng.choice(forms)()}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【编程题】求下面 Python 表达式的值：\n{task['expr']}"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出表达式的值，不要解释。"

    def answer(self, task: Mapping[str, Any]) -> int | str:
        expr = str_field(task, "expr").strip(" \t")
        for form, value in _FORMS.items():
            if match := form.fullmatch(expr):
                return value(match)
        raise ValueError(f"not an expression of a known form: {expr!r}")

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        answer = self.answer(task)
        return read_text(text, answer) if isinstance(answer, str) else read_integer(text, answer)


def _numbers(match: re.Match[str]) -> list[int]:
    return [int(number) for number in match["numbers"].split(",")]


def _only(match: re.Match[str]) -> int:
    (number,) = _numbers(match)
    return number


def _several(match: re.Match[str]) -> list[int]:
    numbers = _numbers(match)
    if len(numbers) < 2:
        raise ValueError("max and min of a single integer are not defined")
    return numbers


_FORMS: dict[re.Pattern[str], Callable[[re.Match[str]], int | str]] = {
    re.compile(rf"len\([ \t]*{_STRING}[ \t]*\)"): lambda m: len(m["text"]),
    re.compile(rf"{_STRING}\[::-1\]"): lambda m: m["text"][::-1],
    re.compile(rf"{_STRING}\.upper\([ \t]*\)"): lambda m: m["text"].upper(),
    re.compile(rf"abs\({_INTEGERS}\)"): lambda m: abs(_only(m)),
    re.compile(rf"sum\([ \t]*\[{_INTEGERS}\][ \t]*\)"): lambda m: sum(_numbers(m)),
    re.compile(rf"max\({_INTEGERS}\)"): lambda m: max(_several(m)),
    re.compile(rf"min\({_INTEGERS}\)"): lambda m: min(_several(m)),
}
