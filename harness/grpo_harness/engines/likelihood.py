"""Log-probabilities of texts, by a checkpoint's own weights and by a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from grpo_harness.engines.engine import EngineError, Sampling
from grpo_harness.engines.server import ServerEngine, read_as, run
from grpo_harness.engines.transformers import TransformersEngine

Scores = list[float]
"""The log-probability of each token of a text but the first."""

_FORMS: tuple[dict[str, Any], ...] = (
    {"echo": True, "logprobs": 1, "max_tokens": 1},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt_logprobs": 0, "max_tokens": 1},
)
"""How servers are asked: as OpenAI's, as those that draw no token then, and as vLLM.

First with a token: a server may take 0 for no limit.
"""

_OWN_TEXTS, _CONTRADICTION = 3, 0.5
"""A server's scores are of no use if its own tokens, drawn within so many texts, all have others.

They differ by more than this each.
"""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Entry(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    text: str = ""
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, _Entry] | None] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Scored(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class PromptError(EngineError):
    """A server reads another number of tokens than the policy: ``read`` of ``given``."""

    def __init__(self, read: int, given: int, url: str) -> None:
        super().__init__(f"{url} reads {read} tokens where the policy's tokenizer has {given}")
        self.read, self.given = read, given


def by_weights(engine: TransformersEngine, texts: Sequence[str]) -> list[Scores]:
    """Return the scores of texts by the weights of ``engine``, each read alone."""
    with torch.inference_mode():
        return [_scores(engine, ids) for ids in engine.tokens(texts)]


def _scores(engine: TransformersEngine, ids: Sequence[int]) -> Scores:
    read = torch.tensor([ids], device=engine.model.device)
    spread = engine.model(read).logits[0, :-1].float().log_softmax(-1)
    return [float(score) for score in spread.gather(-1, read[0, 1:, None])[:, 0]]


def likeliest(
    engine: TransformersEngine, prompts: Sequence[str], temperature: float
) -> list[tuple[str, float]]:
    """Return the text of the likeliest token after each prompt, and its probability.

    The probability is that of all tokens with the same text, such as those that end a completion.
    """
    tokenizer, found = engine.policy.tokenizer, []
    special = sorted(set(tokenizer.all_special_ids))
    with torch.inference_mode():
        for ids in engine.tokens(prompts):
            read = torch.tensor([ids], device=engine.model.device)
            spread = (engine.model(read).logits[0, -1].float() / temperature).softmax(-1)
            best = int(spread.argmax())
            text = str(tokenizer.decode([best], skip_special_tokens=True))
            found.append((text, float(spread[best] if text else spread[special].sum())))
    return found


def by_server(engine: ServerEngine, texts: Sequence[str]) -> list[Scores] | None:
    """Return the scores of texts by a server, or ``None`` if it gives none.

    Raises ``PromptError`` if it reads other tokens, and ``EngineError`` if it fails.
    """
    engine.identity()

    async def ask(text: str, form: Mapping[str, Any]) -> Scores | None:
        ids = engine.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        fields = {"temperature": 1.0, "add_special_tokens": False}
        answer = await engine.answered({"prompt": text, **fields, **form})
        read = read_as(answer, _Scored)
        if read is None:
            return None
        choices = read.choices
        scores = _told(choices[0], ids) if len(choices) == 1 else []
        if not scores:
            return None
        drawn = int(form["max_tokens"] if form.get("echo") else 0)
        # A server may leave the drawn token out: then it drew an end.
        if len(scores) not in (len(ids), len(ids) + drawn):
            if read.usage and read.usage.prompt_tokens == len(ids):
                return None  # it has read all, and leaves some tokens out of what it tells
            raise PromptError(len(scores), len(ids), answer.url)
        known = [score for score in scores[1 : len(ids)] if score is not None]
        return known if len(known) == len(ids) - 1 else None

    async def contradicted(form: Mapping[str, Any]) -> bool:
        # A server may tell of each token the score of the one behind it, as llama-cpp-python does.
        # Asked in the middle of texts: at their ends a completion ends too, without a token's text.
        apart = []
        for text in (of[: len(of) * part // 4] for of in texts[:_OWN_TEXTS] for part in (1, 2, 3)):
            answer = await engine.answered(
                {"prompt": text, "temperature": 1.0, "add_special_tokens": False,
                 "logprobs": 1, "max_tokens": 1}
            )  # fmt: skip
            read = read_as(answer, _Scored)
            if read is None or len(read.choices) != 1:
                continue
            (choice,) = read.choices
            own = choice.logprobs.token_logprobs if choice.logprobs else []
            both = engine.policy.tokenizer([text, text + choice.text], add_special_tokens=False)
            before, after = both["input_ids"]
            if len(own) != 1 or own[0] is None or after[:-1] != before:
                continue
            if echoed := await ask(text + choice.text, form):
                apart.append(abs(echoed[-1] - own[0]))
        return bool(apart) and min(apart) > _CONTRADICTION

    async def ask_all() -> list[Scores] | None:
        async with engine.client.open():
            for form in _FORMS:
                if await ask(texts[0], form) is None:
                    continue
                if form.get("echo") and await contradicted(form):
                    return None
                scores = await asyncio.gather(*(ask(text, form) for text in texts))
                if all(of is not None for of in scores):
                    return [of for of in scores if of is not None]
        return None

    return run(ask_all())


def _told(choice: _Choice, ids: Sequence[int]) -> list[float | None]:
    """Return what a server tells of each token of a prompt, and of a drawn one behind it."""
    if choice.prompt_logprobs:
        pairs = zip(choice.prompt_logprobs, [str(i) for i in ids], strict=False)
        told = [of[i].logprob if of and i in of else None for of, i in pairs]
        more = len(choice.prompt_logprobs) - len(told)
        return [*told, *[None] * more]
    return list(choice.logprobs.token_logprobs) if choice.logprobs else []


def drawn_after(engine: ServerEngine, prompts: Sequence[str], temperature: float) -> list[str]:
    """Return the text of one token that a server draws after each prompt, at a temperature."""
    from grpo_harness.engines.engine import Request

    sampling = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=1)
    requests = [Request(prompt, 7919 * number) for number, prompt in enumerate(prompts)]
    return [sample.text for sample in engine.drawing(sampling).sample(requests)]
