"""Reward functions, as TRL calls them."""

import re

from trl.rewards import get_soft_overlong_punishment

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_punish = get_soft_overlong_punishment(max_completion_len=40, soft_punish_cache=20)


def accuracy(completions, solution, **kwargs):
    """1 if the text in the tags is the solution, else 0."""
    found = [ANSWER.search(text) for text in _texts(completions)]
    return [
        float(match is not None and match[1] == right)
        for match, right in zip(found, solution, strict=True)
    ]


def form(completions, **kwargs):
    """1 if the completion is an answer in tags and nothing else, else 0."""
    return [float(ANSWER.fullmatch(text.strip()) is not None) for text in _texts(completions)]


def overlong(completion_ids, **kwargs):
    """0 up to 20 tokens, then less with every token, to -1 at 40."""
    return _punish(completion_ids)


def _texts(completions):
    return [completion[0]["content"] for completion in completions]
