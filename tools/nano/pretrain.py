"""Pre-training of ``nano-base``: a plain torch loop on fresh draws of the task distribution.

There are two kinds of stages. Clean ones teach the tasks: every completion is the true answer. The
mixed one hides part of that: only some completions are the true answer alone (see
:mod:`tools.nano.answers`). The loss is only on the completion, and no prompt that is held out for
evaluation is ever drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo_harness.policy.policy import render
from grpo_harness.tasks import Problem, is_held_out, task_types
from tools.nano.answers import mixed, right
from tools.nano.tokenizer import END, END_ID, PAD_ID, SPOKEN


@dataclass(frozen=True)
class Stage:
    """One stage of pre-training.

    ``mixed`` tells whether the completions are of mixed quality or all correct. ``batch`` is the
    number of problems of each type in a step, ``learning_rate`` the peak of a cosine schedule that
    warms up over ``warm_up`` steps and reaches a twentieth of the peak after ``decay`` steps, which
    may be more than the stage makes.
    """

    name: str
    mixed: bool
    steps: int
    batch: Mapping[str, int]
    learning_rate: float
    warm_up: int
    decay: int
    seed: int


def new_model(seed: int) -> Qwen2ForCausalLM:
    """Make the untrained policy: Qwen2 with 4 layers, 128 wide, about 0.87 M parameters.

    It knows only the tokens that the tasks are made of; :func:`add_bytes` adds the others.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=SPOKEN,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen2ForCausalLM(config)


def add_bytes(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int) -> None:
    """Give ``model`` rows for the bytes that occur only in non-ASCII text.

    The first stages never need them, so their logits are not computed there.
    """
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    stage: Stage,
    progress: Callable[[int, float], None],
) -> None:
    """Train ``model`` in place for one stage; ``progress`` gets each step and its loss."""
    rng = random.Random(stage.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage)
        drawn = [_training_problem(name, rng) for name, n in stage.batch.items() for _ in range(n)]
        taught = [(p, mixed(p, rng) if stage.mixed else right(p)) for p in drawn]
        total = 0.0
        for ids, labels in _batches(tokenizer, taught):
            loss = _loss(model, ids, labels) / len(taught)
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step, total)
    model.eval()


def _schedule(step: int, stage: Stage) -> float:
    if step < stage.warm_up:
        return (step + 1) / stage.warm_up
    done = (step - stage.warm_up) / (stage.decay - stage.warm_up)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def _training_problem(name: str, rng: random.Random) -> Problem:
    task_type = task_types()[name]
    while is_held_out(str((problem := task_type.problem(rng)).prompt)):
        pass
    return problem


def _batches(
    tokenizer: Qwen2Tokenizer, taught: list[tuple[Problem, str]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Sorting problems are three times as long as the rest: separate batches need less padding.
    for long in (False, True):
        pairs = [pair for pair in taught if (pair[0].type == "sort") is long]
        if not pairs:
            continue
        prompts = [render(tokenizer, problem.prompt) for problem, _ in pairs]
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        replies = [answer + END for _, answer in pairs]
        wanted = tokenizer(replies, add_special_tokens=False)["input_ids"]
        width = max(len(a) + len(b) for a, b in zip(asked, wanted, strict=True))
        ids = torch.full((len(pairs), width), PAD_ID)
        labels = torch.full((len(pairs), width), -100)
        for row, (question, reply) in enumerate(zip(asked, wanted, strict=True)):
            end = len(question) + len(reply)
            ids[row, :end] = torch.tensor(question + reply)
            labels[row, len(question) : end] = torch.tensor(reply)
        yield ids, labels


def _loss(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Right padding: a causal model does not see what follows, so no mask is needed.
    logits = model(input_ids=ids).logits[:, :-1]
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    # The root is between a mean per completion (the tokens of a long one count little) and a sum
    # (long completions dominate).
    return (losses.sum(1) / (targets != -100).sum(1).sqrt()).sum()
