"""Sorting a few integers in ascending order."""

import random
from collections.abc import Mapping
from itertools import islice
from typing import Any

from grpo_harness.tasks.task import Reading, TutorialType, is_int
from grpo_harness.text import first_line, integers


class Sort(TutorialType):
    """Five to nine integers in -50..50."""

    name = "sort"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {"arr": [rng.randint(-50, 50) for _ in range(rng.randint(5, 9))]}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【编程题】对数组进行升序排序：{task['arr']}"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出排序后的数字，用空格分隔，不要解释。"

    def answer(self, task: Mapping[str, Any]) -> list[int]:
        numbers = task["arr"]
        if not isinstance(numbers, list) or not all(map(is_int, numbers)):
            raise ValueError(f"arr is not a list of integers: {numbers!r}")
        return sorted(numbers)

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        answer = self.answer(task)
        # One number past the answer's length already makes the lists differ.
        written = list(islice(integers(first_line(text)), len(answer) + 1))
        if written == answer:
            return "correct"
        return "wrong" if written else "unparsable"
