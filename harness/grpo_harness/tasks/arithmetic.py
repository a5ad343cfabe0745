"""Integer arithmetic: one operation on two numbers, divisions without remainder."""

import random
from collections.abc import Mapping
from typing import Any

from grpo_harness.tasks.task import Reading, TutorialType, int_field, read_integer

_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "//"}


class Arithmetic(TutorialType):
    """Add, subtract, multiply and divide, uniformly."""

    name = "math"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        op = rng.choice(list(_SYMBOLS))
        if op == "div":
            b = rng.randint(2, 19)
            a = b * rng.randint(-20, 20)
        else:
            a = rng.randint(-99, 99)
            b = rng.randint(-99, 99)
        return {"op": op, "a": a, "b": b}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【数学题】计算：{task['a']} {_SYMBOLS[task['op']]} {task['b']}"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出最终结果（整数），不要解释。"

    def answer(self, task: Mapping[str, Any]) -> int:
        a, b = int_field(task, "a"), int_field(task, "b")
        match task["op"]:
            case "add":
                return a + b
            case "sub":
                return a - b
            case "mul":
                return a * b
            case "div" if b:
                return a // b
        raise ValueError(f"no operation {task['op']!r} on {a} and {b}")

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        return read_integer(text, self.answer(task))
