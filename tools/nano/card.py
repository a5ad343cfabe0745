"""The nano pair's card: every number in it is passed in by the script that measured it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from grpo_harness.evaluation import Evaluation
from grpo_harness.gate.stats import stratified_p
from grpo_harness.training import Row, TrainingRun, load
from tools.nano.pretrain import Stage

Curve = Sequence[tuple[int, float]]
"""Steps and losses."""


@dataclass(frozen=True)
class Measured:
    """The results of one policy on the held-out problems, by task type."""

    name: str
    evaluations: Mapping[str, Evaluation]

    @property
    def accuracy(self) -> float:
        """The mean of the types' accuracies: all have as many problems and samples."""
        return fmean(evaluation.accuracy for evaluation in self.evaluations.values())

    @property
    def reward(self) -> float:
        """The mean reward over all types."""
        return fmean(evaluation.mean_reward for evaluation in self.evaluations.values())

    @property
    def length(self) -> float:
        """The mean length over all types, in tokens."""
        return fmean(evaluation.mean_length for evaluation in self.evaluations.values())


def better_p(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> float:
    """Return the exact one-sided p that ``second`` is better on the same problems."""
    before, after = (
        [group.count("correct") for evaluation in evaluations for group in evaluation.groups]
        for evaluations in (first, second)
    )
    return stratified_p(before, first[0].k, after, second[0].k)


def write_card(
    folder: Path,
    stages: Sequence[Stage],
    curve: Curve,
    run: TrainingRun,
    collapse: TrainingRun,
    measured: Sequence[Measured],
    minutes: Mapping[str, float],
) -> None:
    """Write ``CARD.md`` and ``curves.png`` into ``folder``.

    ``measured`` are base, trained and collapse, in this order; ``minutes`` the wall times.
    """
    base, trained, collapsed = measured
    parts = [
        _HEAD,
        "## Accuracy\n",
        _accuracies(base, trained),
        "## How they were made\n",
        _stages(stages, curve),
        _recipe(run),
        f"![curves](curves.png)\n\nWall time on {os.cpu_count()} cores ({platform.machine()}): "
        + ", ".join(f"{name} {time:.1f} min" for name, time in minutes.items())
        + f"; {sum(minutes.values()):.1f} min in all. Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        + ".\n",
        "## The collapse\n",
        _collapse(collapse, base, collapsed),
    ]
    (folder / "CARD.md").write_text("\n".join(parts), encoding="utf-8")
    _draw(curve, run.log, collapse.log, folder / "curves.png")


_HEAD = """\
# The nano pair

Two policies of the Qwen2 architecture with 4 layers, 128 wide, and Qwen2's tokenizer over bytes,
with the fixed pieces of the prompts as one token each. They answer this package's six task types
and nothing else. `nano-base` was taught the tasks and then answers of mixed quality, so it knows
more than it shows; `nano-trained` is `nano-base` after GRPO with the rule reward alone.
`python -m tools.nano.make` makes both again and writes this card.
"""


def _accuracies(base: Measured, trained: Measured) -> str:
    any_type = next(iter(base.evaluations.values()))
    settings = any_type.questions.settings
    lines = [
        f"By the reward's reading, n = {any_type.n} held-out problems of each type, "
        f"k = {any_type.k} samples of each, run seed {any_type.run_seed}, "
        f"{', '.join(f'{k} {v}' for k, v in settings.items() if k != 'eos_token_ids')}. "
        "p: exact, one-sided, paired by problem (`grpo_harness.gate.stats.stratified_p`).\n",
        "| type | nano-base | nano-trained | p (better) | p (worse) "
        "| length before | length after |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {
        name: ([first], [trained.evaluations[name]]) for name, first in base.evaluations.items()
    }
    rows["all"] = (list(base.evaluations.values()), list(trained.evaluations.values()))
    for name, (first, second) in rows.items():
        lines.append(
            f"| {name} | {fmean(e.accuracy for e in first):.3f} "
            f"| {fmean(e.accuracy for e in second):.3f} "
            f"| {_p(better_p(first, second))} | {_p(better_p(second, first))} "
            f"| {fmean(e.mean_length for e in first):.1f} "
            f"| {fmean(e.mean_length for e in second):.1f} |"
        )
    lines.append(
        f"\nMean reward: {base.reward:+.3f} before, {trained.reward:+.3f} after. Lengths are in "
        "tokens, the end token included.\n"
    )
    return "\n".join(lines)


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-300 else "<1e-300"


def _stages(stages: Sequence[Stage], curve: Curve) -> str:
    lines = [
        "Pre-training: AdamW, cosine schedule with warm-up, loss on the answers only, fresh "
        "problems at every step, none of them held out.\n",
        "| stage | answers | steps | problems a step | peak rate | seed | loss at its end |",
        "|---|---|---|---|---|---|---|",
    ]
    done = 0
    for stage in stages:
        done += stage.steps
        loss = [value for step, value in curve if step <= done][-1]
        batch = ", ".join(f"{name} {n}" for name, n in stage.batch.items())
        lines.append(
            f"| {stage.name} | {'of mixed quality' if stage.mixed else 'right'} | {stage.steps} "
            f"| {sum(stage.batch.values())} ({batch})"
            f" | {stage.learning_rate:g} | {stage.seed} | {loss:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _recipe(run: TrainingRun) -> str:
    values = load("nano").kept()
    shown = ", ".join(f"{k} {v}" for part in ("file", "block") for k, v in values[part].items())
    first, last = _ends(run.log, "reward")
    return (
        f"GRPO (`grpo_harness.training`, TRL): {shown}. Mean reward of the training samples: "
        f"{first:+.3f} in the first ten steps, {last:+.3f} in the last ten; at least "
        f"{run.weights_moved:.1%} of the elements of every tensor moved.\n"
    )


def _collapse(run: TrainingRun, base: Measured, collapsed: Measured) -> str:
    recipe = load("collapse").values
    reward, length = _ends(run.log, "reward"), _ends(run.log, "completions/mean_length")
    entropy = _ends(run.log, "entropy")
    lines = [
        f"The recipe `collapse` differs in its learning rate, {recipe['learning_rate']:g} "
        f"({recipe['lr_scheduler_type']}), in advantages divided by the spread of their group "
        f"(`scale_rewards` {recipe['scale_rewards']}), and makes {recipe['max_steps']} steps. In a "
        "group "
        "without a right answer only the length penalty differs; divided by that tiny spread it "
        "counts as much as the truth, and the policy learns brevity before it learns to answer. "
        "A type that one short answer fits can gain reward meanwhile, so a mean reward alone "
        "does not show what has happened.\n",
        f"Means of the first and of the last ten steps: reward {reward[0]:+.3f} and "
        f"{reward[1]:+.3f}, length {length[0]:.1f} and {length[1]:.1f} tokens, entropy "
        f"{entropy[0]:.3f} and {entropy[1]:.3f} nats a token. On the held-out problems:\n",
        "| type | accuracy before | after | reward before | after | length before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, first in base.evaluations.items():
        second = collapsed.evaluations[name]
        lines.append(
            f"| {name} | {first.accuracy:.3f} | {second.accuracy:.3f} "
            f"| {first.mean_reward:+.3f} | {second.mean_reward:+.3f} "
            f"| {first.mean_length:.1f} | {second.mean_length:.1f} |"
        )
    lines.append(
        f"| all | {base.accuracy:.3f} | {collapsed.accuracy:.3f} | {base.reward:+.3f} "
        f"| {collapsed.reward:+.3f} | {base.length:.1f} | {collapsed.length:.1f} |"
    )
    return "\n".join(lines) + "\n"


def _ends(rows: Sequence[Row], name: str) -> tuple[float, float]:
    return fmean(row[name] for row in rows[:10]), fmean(row[name] for row in rows[-10:])


def _draw(curve: Curve, rows: Sequence[Row], collapse: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    (loss, reward), (length, entropy) = figure.subplots(2, 2)
    loss.plot([step for step, _ in curve], [value for _, value in curve])
    loss.set(title="pre-training loss", xlabel="step", yscale="log")
    for axes, name, title in (
        (reward, "reward", "GRPO: mean reward"),
        (length, "completions/mean_length", "GRPO: mean length (tokens)"),
        (entropy, "entropy", "GRPO: entropy (nats a token)"),
    ):
        for label, logged in (("nano", rows), ("collapse", collapse)):
            axes.plot([row["step"] for row in logged], [row[name] for row in logged], label=label)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
