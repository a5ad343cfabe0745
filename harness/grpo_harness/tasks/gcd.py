"""The greatest common divisor of two numbers."""

import math
import random
from collections.abc import Mapping
from typing import Any

from grpo_harness.tasks.task import Reading, TutorialType, int_field, read_integer


class Gcd(TutorialType):
    """Both numbers uniform in 1..500."""

    name = "gcd"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {"a": rng.randint(1, 500), "b": rng.randint(1, 500)}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【编程题】给定 a={task['a']}，b={task['b']}，输出 gcd(a,b)。"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出一个整数，不要解释。"

    def answer(self, task: Mapping[str, Any]) -> int:
        return math.gcd(int_field(task, "a"), int_field(task, "b"))

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        return read_integer(text, self.answer(task))
