"""What rewards do, tried on right and wrong texts: by this a reward is known."""

import json
import math

from grpo_harness.rewards.calls import RewardError
from grpo_harness.rewards.functions import Batch, Rewards, described
from grpo_harness.tasks import Problem, Source
from grpo_harness.text import digest, escape


def try_on(rewards: Rewards, source: Source) -> None:
    """Score the true answer, or some text, and no text of a problem. Raises ``RewardError``."""
    (problem,) = source.problems(1)
    batch = Batch.of(source, [problem] * 2, [source.wanted(problem) or "I do not know.", ""])
    rewards.score(batch, source.name)


def trials(source: Source) -> list[tuple[Problem, str]]:
    """Return the texts that rewards are tried on: forms of true answers, and texts without one."""
    found = []
    for problem in source.problems(32):
        right = source.wanted(problem)
        texts = (*(() if right is None else _forms(right)), "", "I know", "x" * 300)
        found += [(problem, text) for text in texts]
    return found


def rewards_digest(rewards: Rewards, source: Source) -> str:
    """Digest what rewards do on a source's problems: their scores of right and wrong texts.

    The scores are hashed, not the code: a changed comment changes nothing, and a changed rule does,
    wherever in the code it is. Raises ``RewardError``, also for a reward whose scores differ from
    call to call or that changes what it is given.
    """
    tried = trials(source)
    batch = Batch.of(source, [problem for problem, _ in tried], [text for _, text in tried])
    found = rewards.score(batch, source.name)
    for i, again in enumerate(rewards.score(batch, source.name)):
        for name, first in found[i].items():
            if not alike(first, again[name]):
                raise RewardError(
                    f"{source.name}: the reward {escape(name)}{described(batch, i)} scored the "
                    f"same completion {first} and then {again[name]}: it must not differ from "
                    "call to call"
                )
    if len(rewards.functions) == 1 and rewards.functions[0].weight == 1 and not rewards.correct:
        return digest(json.dumps([value for scores in found for value in scores.values()]))
    how = [[reward.name, reward.weight] for reward in rewards.functions]
    return digest(json.dumps([how, repr(rewards.correct), [list(s.values()) for s in found]]))


def alike(one: float | None, other: float | None) -> bool:
    """Tell whether two scores are equal, but for the last digits of a reward that is a network."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-8)


def _forms(right: str) -> tuple[str, ...]:
    return (
        right,
        f"  {right}\n",
        f"```\n{right}\n```",
        f"```python\n{right}\n```",
        f"答案是 {right}。",
        f"{right} {right}",
        f"'{right}'",
        right.lower(),
        right[::-1],
        f"1{right}",
    )
