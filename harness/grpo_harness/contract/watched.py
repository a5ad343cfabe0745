"""Any trainer under the contract: `watch` it, and ask what holds."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_harness.contract import processes
from grpo_harness.contract.exclusions import exclusions, unvaried
from grpo_harness.contract.invariant import INVARIANTS, BrokenInvariantError, NotLookedAtError
from grpo_harness.contract.observer import Observer
from grpo_harness.contract.oracle import Oracle
from grpo_harness.contract.trace import Trace
from grpo_harness.gate.inputs import brief
from grpo_harness.text import one_line

OF_ONE_RUN = (
    "settings_are_the_recipes",
    "rows_are_complete_and_finite",
    "every_problem_has_its_turn",
    "prompts_are_the_templates",
    "what_is_drawn_is_scored_and_trained_on",
    "rollouts_are_the_current_policys",
    "every_draw_has_its_own_random_numbers",
    "rewards_are_the_completions",
    "advantages_are_group_relative",
    "counts_are_those_of_the_completions",
    "the_mask_is_the_completions",
    "log_probabilities_are_the_policys",
    "loss_equals_the_oracles",
    "gradient_equals_the_oracles",
    "figures_of_the_policy_are_the_oracles",
    "on_policy_the_ratio_is_one",
    "gradients_are_clipped_as_asked",
    "every_update_is_adamws",
    "only_updates_move_the_weights",
    "rates_logged_are_the_schedules",
    "what_is_saved_is_what_was_trained",
    "the_checkpoint_is_whole",
)
"""The invariants that every run is asked."""

OF_SEVERAL_PROCESSES = ("every_process_has_the_same_weights",)
"""The invariants that a run of several processes is asked beside these."""

ON_REQUEST = ("weights_move", "constant_reward_changes_nothing")
"""Invariants that hold of some runs: of one with a large rate, of one with a constant reward."""

NAN = "a_nan_is_seen"
"""The invariant of a run in which a NaN was planted."""

OF_TWO_RUNS = (
    "the_same_seed_gives_the_same_rows",
    "another_seed_gives_another_run",
    "accumulation_changes_nothing",
    "negated_reward_negates_the_gradient",
    "resumed_equals_uninterrupted",
)
"""Invariants that compare a run with another, which differs in one setting."""


def watch(
    trainer: GRPOTrainer, *, resume: Path | str | None = None, nan_at: int | None = None
) -> Watched:
    """Return ``trainer`` under the contract: it trains once, when it is first asked what holds.

    It must be a ``GRPOTrainer`` or of a subclass, and not yet trained: build it for a few steps,
    and in full precision. Nothing of it is changed; while it trains, every step is logged, and
    afterwards it is saved in the folder ``watched`` of its output.

    With ``resume`` it continues from that checkpoint. In the step ``nan_at`` (from 1) the model's
    log-probabilities for the loss are replaced by NaN.

    In several processes (``torchrun``, ``accelerate launch``) each watches its own trainer and asks
    it the same; process 0 checks what all have seen, and has the report.

    Raises ``TypeError`` for anything else, and ``ValueError`` for a trainer that has trained, has
    too few prompts for a step, or has its weights spread over processes.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"watch takes a GRPOTrainer, or one of a subclass, not {brief(trainer)}")
    _require_trainable(trainer)
    return Watched(trainer, resume, nan_at)


def _require_trainable(trainer: Any) -> None:
    """Raise ``ValueError`` for a trainer that could be watched in vain only."""
    if trainer.state.global_step:
        raise ValueError(
            f"the trainer has already trained {trainer.state.global_step} steps: build a new one, "
            "and watch it before it trains"
        )
    kind = trainer.accelerator.distributed_type
    if kind in {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}:
        raise ValueError(
            f"{kind.value} spreads the trainer's weights and gradients over processes: watch it "
            "without, where every process has the whole model"
        )
    prompts = trainer.args.generation_batch_size // trainer.args.num_generations
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else prompts
    if rows < prompts:
        raise ValueError(
            f"the data set has {rows} prompts, and a batch of completions asks {prompts}: "
            "no step would be made"
        )


_LEFT_OUT: dict[str, None] = {}


def left_out() -> list[str]:
    """Return what was not looked at since the last call: pytest's summary shows it."""
    lines = list(_LEFT_OUT)
    _LEFT_OUT.clear()
    return lines


class Watched:
    """A trainer under the contract: ``holds`` asks it, ``not_looked_at`` is what it cannot say.

    ``not_looked_at`` has the reason for each invariant that is left out. It is complete when all
    have been asked.
    """

    def __init__(self, trainer: Any, resume: Path | str | None, nan_at: int | None) -> None:
        self.trainer = trainer
        left_out = dict(exclusions(trainer))
        filtered = left_out.pop(NAN, None)
        if nan_at is not None or resume is not None:
            left_out |= dict.fromkeys(OF_ONE_RUN, "a run that is resumed, or has a planted NaN")
            left_out |= {NAN: filtered} if filtered else {}
        self.not_looked_at: dict[str, str] = left_out
        self._resume, self._nan_at = resume, nan_at
        # It has just been seeded: it trains as if it did so at once.
        self._random = _random_state()
        several = trainer.accelerator.num_processes > 1
        self._every = (*OF_ONE_RUN, *(OF_SEVERAL_PROCESSES if several else ()))
        self._seen: tuple[Trace, Oracle | None] | None = None
        self._crash: Exception | None = None
        self._said: dict[str, str] = {}
        self._failed: set[str] = set()

    def holds(
        self, *names: str, but: Mapping[str, str] | None = None, beside: Watched | None = None
    ) -> None:
        """Train, if that was not done yet, and require that the invariants of these ``names`` hold.

        Without names, these are all of one run that apply. Those in ``but``, each with the reason,
        must be broken. Invariants of two runs compare this one with the one ``beside`` it.

        Raises one ``AssertionError`` that lists all that differs and what was not looked at, and
        ``ValueError`` for a name that no invariant has.
        """
        but = dict(but or {})
        for name in (*names, *but):
            self._check(name, beside)
        asked = list(dict.fromkeys((*(names or self._every), *but)))
        run, oracle = self._trained()
        other = None if beside is None else beside._trained()[0]
        if oracle is not None:
            for name in asked:
                self._ask(name, run, other, oracle)
            _LEFT_OUT.update(dict.fromkeys(self._lines()))
        said = processes.shared((self._said, self._failed, self.not_looked_at))
        self._said, self._failed, self.not_looked_at = said
        left_out = self.not_looked_at
        wrong = [
            self._said[name]
            for name in asked
            if self._said.get(name) and (name not in but or name in self._failed)
        ]
        wrong += [
            f"{name} is not looked at: {left_out[name]}"
            for name in asked
            if name in left_out and (name in names or name in but)
        ]
        wrong += [
            f"{name} holds now: remove it from but ({reason})"
            for name, reason in but.items()
            if not self._said.get(name) and name not in left_out
        ]
        if wrong:
            head = f"{type(self.trainer).__name__}: {len(wrong)} of {len(asked)} invariants differ"
            if oracle is None:
                raise AssertionError(f"{head}: process 0 has the report")
            raise AssertionError("\n\n".join([head, *wrong, self.report()]))

    def report(self) -> str:
        """Return what was not looked at: one line for each setting, with its invariants."""
        if not self.not_looked_at:
            return "The contract looked at every invariant of one run."
        head = f"The contract does not look at {len(self.not_looked_at)} of {len(self._every)}:"
        return "\n".join([head, *(f"- {line}" for line in self._lines())])

    def _lines(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for name, why in self.not_looked_at.items():
            by_reason.setdefault(why, []).append(name)
        return [f"{why} ({', '.join(names)})" for why, names in by_reason.items()]

    def _check(self, name: str, beside: Watched | None) -> None:
        """Raise ``ValueError`` unless this run can be asked the invariant of that name."""
        known = (*self._every, *ON_REQUEST, NAN, *OF_TWO_RUNS)
        if name not in known:
            if name in INVARIANTS:
                raise ValueError(f"{name} is of the recipes' runs: no trainer can be asked it")
            close = difflib.get_close_matches(name, known, 1, cutoff=0.0)
            raise ValueError(f"the contract has no invariant {name!r}: the nearest is {close[0]!r}")
        if name in OF_TWO_RUNS and beside is None:
            raise ValueError(f"{name} compares two runs: give the other one, beside=watch(trainer)")
        if name == NAN and self._nan_at is None:
            raise ValueError(f"{name} needs a NaN: plant it with watch(trainer, nan_at=2)")

    def _ask(self, name: str, run: Trace, other: Trace | None, oracle: Oracle) -> None:
        """Ask the invariant of that name; keep what it says."""
        if name in self.not_looked_at or (name in self._said and name not in OF_TWO_RUNS):
            return
        check = INVARIANTS[name]
        others: list[Any] = [other] if name in OF_TWO_RUNS else []
        if "oracle" in inspect.signature(check).parameters:
            others.append(oracle)
        try:
            check(run, *others)
            self._said[name] = ""
        except NotLookedAtError as excluded:
            self.not_looked_at[name] = str(excluded)
        except BrokenInvariantError as broken:
            self._said[name] = str(broken)
        except Exception as error:
            self._failed.add(name)
            self._said[name] = f"{name}: it cannot be checked: {type(error).__name__}: {error}"

    def _trained(self) -> tuple[Trace, Oracle | None]:
        """Train once; return the run of all processes, and, in process 0, its oracle."""
        if self._crash is not None:
            raise AssertionError("the training crashed, as the first check says")
        if self._seen is None:
            try:
                self._seen = self._train()
            except Exception as error:
                self._crash = error
                step = self.trainer.state.global_step + 1
                where = processes.crashed(f"step {step}: {one_line(error)}")
                name = type(self.trainer).__name__
                raise AssertionError(f"the training of {name} crashed in {where}") from error
        return self._seen

    def _train(self) -> tuple[Trace, Oracle | None]:
        trainer = self.trainer
        oracle = Oracle.of_trainer(trainer) if processes.first() else None
        _set_random_state(self._random)
        error = None
        with _logging_every_step(trainer.args):
            seen = Observer(copy.copy(trainer.args), self._nan_at)
            seen.attach(trainer)
            try:
                trainer.train(resume_from_checkpoint=self._resume and str(self._resume))
            except Exception as raised:
                if self._nan_at is None or not seen.steps:
                    raise
                error = raised
            finally:
                seen.leave()
        if not seen.steps:
            raise ValueError("no step was made")
        out = Path(trainer.args.output_dir)
        run = processes.joined(seen.trace(type(trainer).__name__, out, error))
        self.not_looked_at = {**unvaried(run), **self.not_looked_at}
        if error is None:
            run.saved = out / "watched"
            trainer.save_model(str(run.saved))
        return run, oracle


@contextlib.contextmanager
def _logging_every_step(args: Any) -> Iterator[None]:
    """Log every step; else what is logged of steps that share a row could not be told apart."""
    was = args.logging_strategy, args.logging_steps
    args.logging_strategy, args.logging_steps = type(was[0])("steps"), 1
    try:
        yield
    finally:
        args.logging_strategy, args.logging_steps = was


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])
