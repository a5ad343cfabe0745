"""Telling whether a string reads the same backwards."""

import random
import re
from collections.abc import Mapping
from typing import Any

from grpo_harness.tasks.task import Reading, TutorialType, letters, str_field
from grpo_harness.text import first_line

_VERDICT = re.compile("YES|NO", re.IGNORECASE)


class Palindrome(TutorialType):
    """A half of two to four letters, mirrored, or followed by one to three random letters.

    The second kind can be a palindrome by chance, so the answer is always computed.
    """

    name = "palindrome"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        half = letters(rng, rng.randint(2, 4))
        if rng.random() < 0.5:
            return {"s": half + half[::-1]}
        return {"s": half + letters(rng, rng.randint(1, 3))}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【编程题】判断字符串是否回文：{task['s']}"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出 YES 或 NO，不要解释。"

    def answer(self, task: Mapping[str, Any]) -> str:
        s = str_field(task, "s")
        return "YES" if s == s[::-1] else "NO"

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        answer = self.answer(task)
        match = _VERDICT.search(first_line(text))
        if match is None:
            return "unparsable"
        return "correct" if match.group().upper() == answer else "wrong"
