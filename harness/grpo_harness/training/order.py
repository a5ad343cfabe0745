"""Which training prompts each step asks: TRL's sampler is seeded."""

import math
from collections.abc import Iterator
from itertools import count

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler


def has_own_order(trainer: type[GRPOTrainer]) -> bool:
    """Tell whether a class of trainers asks problems in another order than TRL's."""
    return trainer._get_train_sampler is not GRPOTrainer._get_train_sampler


def steps(config: GRPOConfig, n: int) -> int:
    """Return how many steps a run on ``n`` rows has."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * _steps_of_an_epoch(config, n))


def asked(config: GRPOConfig, n: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the step and the rows of every generation, for ``n`` rows of one process, without end.

    A generation asks some rows, ``num_generations`` times each, and serves ``steps_per_generation``
    parts of a step, ``num_iterations`` times. At the end of an epoch what is left is not asked.
    """
    at_once = _at_once(config)
    sampler = RepeatSampler(
        range(n), 1, at_once, shuffle=bool(config.shuffle_dataset), seed=config.seed
    )
    parts = _parts(config)
    accumulated = config.gradient_accumulation_steps
    steps = _steps_of_an_epoch(config, n)
    for epoch in count():
        rows = [*sampler]
        for number in range(n // at_once):
            own = rows[number * at_once : (number + 1) * at_once]
            yield epoch * steps + number * parts // accumulated + 1, own


def _at_once(config: GRPOConfig) -> int:
    """Return the rows of a generation."""
    return (config.generation_batch_size or 0) // (config.num_generations or 1)


def _parts(config: GRPOConfig) -> int:
    """Return how many parts of a step a generation serves."""
    return (config.steps_per_generation or 1) * config.num_iterations


def _steps_of_an_epoch(config: GRPOConfig, n: int) -> int:
    parts = n // _at_once(config) * _parts(config)
    return math.ceil(parts / config.gradient_accumulation_steps)
