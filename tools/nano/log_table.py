"""Test the judgement of logs: real runs of nano-base, unchanged and with faults, in a table.

``python -m tools.nano.log_table --runs 40 --out FOLDER`` trains and writes ``LOGS.md``. Finished
runs are kept in ``runs.jsonl``: the same command goes on after an interruption, and judges again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from grpo_harness.logs.judge import RISK, Judgement, judge
from grpo_harness.logs.read import Log
from grpo_harness.logs.recorded import Recorded, summed_up
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.rule import reward_func
from grpo_harness.text import digest
from grpo_harness.training import load, train

GUARDED = load("learn").with_values(n_math=16, n_prog=80, problem_seed=7, max_steps=25)
"""The training that is guarded: its runs differ in their seeds alone."""

RECORDED = (3, 5, 8)
"""Numbers of recorded runs that a run is judged by."""

TIMES = 20
"""Choices of recorded runs, for each judged run and number of recorded ones."""

Reward = Callable[..., Any]


def _third_shuffled(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> Any:
    """Score the completions of a third of the prompts by one another's rewards."""
    rewards = reward_func(prompts, completions)
    of = [i for i, prompt in enumerate(prompts) if int(digest(str(prompt))[:8], 16) % 3 == 0]
    mixed = Random(str(completions)).sample(of, len(of))
    for i, value in zip(of, [rewards[j] for j in mixed], strict=True):
        rewards[i] = value
    return rewards


_third_shuffled.__name__ = reward_func.__name__  # by which it is logged, as what it stands for


@dataclasses.dataclass(frozen=True)
class Fault:
    """An edit of the recipe, or another reward, and the other guards that see it.

    The recorded config of a recipe names every edit of its values.
    """

    changes: Mapping[str, Any]
    reward: Reward = reward_func
    also: str = "recorded config"


_VALUES = GUARDED.values

FAULTS: Mapping[str, Fault] = {
    "unchanged": Fault({}, also=""),
    "rate × 0.1": Fault({"learning_rate": _VALUES["learning_rate"] / 10}),
    "rate × 10": Fault({"learning_rate": _VALUES["learning_rate"] * 10}),
    "temperature 0.5": Fault({"temperature": 0.5}),
    "a third of the rewards shuffled": Fault({}, _third_shuffled, "examples of the baseline"),
    "β = 1": Fault({"beta": 1.0}),
    "completion limit / 3": Fault({"max_completion_length": _VALUES["max_completion_length"] // 3}),
    # On-policy, every ratio is 1 and nothing is clipped: no curve can show it.
    "ε / 10, on-policy": Fault(
        {"epsilon": _VALUES["epsilon"] / 10}, also="recorded config, contract"
    ),
    "the collapse": Fault(
        {"learning_rate": 1e-3, "scale_rewards": "group"}, also="recorded config, learning test"
    ),
}
"""What is done to the training, by name."""


def run(fault: str, seed: int) -> list[Mapping[str, float]]:
    """Train once with a fault and return the rows of the log, without times."""
    recipe = GUARDED.with_values(seed=seed, **FAULTS[fault].changes)
    with tempfile.TemporaryDirectory() as folder, quiet():
        done = train(recipe, Path(folder) / "trained", reward=FAULTS[fault].reward)
    return [{key: v for key, v in row.items() if key != "step_time"} for row in done.log]


def judged(logs: Mapping[str, Sequence[Log]], fault: str, m: int) -> list[Judgement]:
    """Judge every run of a fault by random choices of ``m`` unchanged runs."""
    luck, found = Random(f"{fault} {m}"), []
    sums = {id(log): summed_up(log) for log in logs["unchanged"]}
    for log in logs[fault]:
        others = [other for other in logs["unchanged"] if other is not log]
        for _ in range(TIMES):
            chosen = [sums[id(other)] for other in luck.sample(others, m)]
            found.append(judge(log, Recorded(1, "guarded", chosen)))
            if found[-1].reason:
                raise ValueError(f"{fault}: {found[-1].reason}")
    return found


def write_table(rows: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Write how often each fault was named, and by which figures."""
    logs = {fault: [Log(path, tuple(r)) for r in rows.get(fault, [])] for fault in FAULTS}
    lines = [
        "# The judgement of logs, tested",
        "",
        f"Runs of {_VALUES['max_steps']} steps from nano-base, each with a seed of its own, judged "
        f"by 3, 5 or 8 unchanged runs ({TIMES} random choices a run) at a risk of {RISK:.0%}. The "
        "share "
        "that was judged FAIL, which for unchanged runs is a false alarm; the figures are those "
        "most often outside their bands, with 5 recorded runs. The last column has the other "
        "guards "
        "that see it. Made by `python -m tools.nano.log_table`.",
        "",
        "| fault | runs | FAIL, by 3 | by 5 | by 8 | named by | seen by |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        if not logs[fault] or len(logs["unchanged"]) <= max(RECORDED):
            continue
        found = {m: judged(logs, fault, m) for m in RECORDED}
        shares = [sum(j.verdict == "FAIL" for j in of) / len(of) for of in found.values()]
        names = Counter(f.figure.name for j in found[5] for f in j.findings if f.outside)
        common = ", ".join(f"{name} {n / len(found[5]):.0%}" for name, n in names.most_common(3))
        cells = " | ".join(f"{share:.1%}" for share in shares)
        if fault == "unchanged":
            unproven = [
                f"{sum(j.verdict == 'UNPROVEN' for j in of) / len(of):.0%} by {m}"
                for m, of in found.items()
            ]
        also = FAULTS[fault].also
        lines.append(f"| {fault} | {len(logs[fault])} | {cells} | {common} | {also} |")
    if len(logs["unchanged"]) > max(RECORDED):
        lines += [
            "",
            "So few recorded runs that the band of the gain of reward is wider than the gain are "
            f"UNPROVEN, and not PASS: of the unchanged runs {', '.join(unproven)}.",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines[6:]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.nano.log_table", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=40, help="unchanged runs; of each fault a fifth"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, new or to continue")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "runs.jsonl"
    rows: dict[str, list[list[Mapping[str, float]]]] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []:
        entry = json.loads(line)
        rows.setdefault(entry["fault"], []).append(entry["rows"])
    for number in range(arguments.runs):
        for index, fault in enumerate(FAULTS):
            wanted = fault == "unchanged" or number % 5 == 0
            done = len(rows.setdefault(fault, []))
            if not wanted or done > (number if fault == "unchanged" else number // 5):
                continue
            row = run(fault, 1000 * index + number)
            rows[fault].append(row)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fault": fault, "rows": row}) + "\n")
    write_table(rows, arguments.out / "LOGS.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
