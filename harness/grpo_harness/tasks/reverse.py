"""Writing a string backwards."""

import random
from collections.abc import Mapping
from typing import Any

from grpo_harness.tasks.task import Reading, TutorialType, letters, read_text, str_field


class Reverse(TutorialType):
    """Four to ten lowercase letters."""

    name = "reverse"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {"s": letters(rng, rng.randint(4, 10))}

    def statement(self, task: Mapping[str, Any]) -> str:
        return f"【编程题】把字符串反转：{task['s']}"

    def requirement(self, task: Mapping[str, Any]) -> str:
        return "要求：只输出反转后的字符串，不要解释。"

    def answer(self, task: Mapping[str, Any]) -> str:
        return str_field(task, "s")[::-1]

    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        return read_text(text, self.answer(task))
