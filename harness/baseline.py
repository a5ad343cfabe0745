"""The stored reference of a policy on a task type: load, compare, record.

One JSON file in git for each policy and task type, ``<folder>/<policy>/<task type>.json``, one
problem a line, sorted, so that a change of it can be read in a pull request. A file is written
whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.checkpoint import digest
from harness.errors import HarnessError
from harness.evaluation import Completion, Evaluation, Group, RewardFunction
from harness.policy import Policy
from harness.tasks import TaskType

SCHEMA = 1

SAMPLES = 16
"""Completions per problem that a recording draws."""

SEEDS = 2
"""Run seeds that they are drawn with, so that no single run's luck becomes the reference."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "grpo-harness")


class BaselineError(HarnessError):
    """A baseline that is missing, damaged, not comparable or not to be recorded: one line."""


@dataclass(frozen=True)
class Record:
    """What is kept of one problem: counts among ``k`` completions, sums over them.

    ``length`` is in tokens, ``log_length`` is the sum of their natural logarithms, ``prompt`` is
    a digest of the prompt as the policy saw it.
    """

    k: int
    correct: int
    truncated: int
    unparsable: int
    length: int
    log_length: float
    reward: float
    prompt: str

    @property
    def mean_log_length(self) -> float:
        """The mean natural logarithm of the length in tokens."""
        return self.log_length / self.k


@dataclass(frozen=True)
class Baseline:
    """One file: the records by problem id, and the header that says what they were made with."""

    path: Path
    header: Mapping[str, Any]
    records: Mapping[str, Record]

    @property
    def policy(self) -> str:
        """The name of the policy that was recorded."""
        return str(self.header["policy"])

    def same_policy(self, evaluation: Evaluation) -> bool:
        """Tell whether the evaluated policy is the recorded one, by fingerprint."""
        return bool(self.header["fingerprint"] == asdict(evaluation.fingerprint))

    def select(self, evaluation: Evaluation, reward: RewardFunction) -> list[Record]:
        """Return the records of the evaluation's problems, in its order.

        Raises ``BaselineError`` when the two cannot be compared: another task version, prompt,
        tokenizer, chat template, reward or sampling setting, or a problem that was not recorded.
        """
        then, now = self.header["conditions"], conditions(evaluation, reward)
        changes = [
            f"{name} was {_short(then.get(name))} and is {_short(now.get(name))}"
            for name in sorted({*now, *then})
            if now.get(name) != then.get(name)
        ]
        if changes:
            raise BaselineError(
                f"not comparable with {self.path}, which was recorded of {self.policy}: "
                f"{'; '.join(changes)}. If that is meant, record a baseline: --grpo-record"
            )
        missing = [g.problem.id for g in evaluation.groups if g.problem.id not in self.records]
        if missing:
            raise BaselineError(
                f"not comparable with {self.path}: of the {evaluation.n} problems asked, "
                f"{len(missing)} are not among its {len(self.records)}, the first of them "
                f"{missing[0]}. Ask fewer with --grpo-problems, or record anew: --grpo-record"
            )
        records = [self.records[group.problem.id] for group in evaluation.groups]
        for record, group, prompt in zip(
            records, evaluation.groups, evaluation.prompts, strict=True
        ):
            if record.prompt != digest(prompt)[:12]:
                raise BaselineError(
                    f"not comparable with {self.path}: the policy sees problem "
                    f"{group.problem.id} in other words than when that was recorded. If that is "
                    "meant, record a baseline: --grpo-record"
                )
        return records


def conditions(evaluation: Evaluation, reward: RewardFunction) -> dict[str, Any]:
    """Return what must be equal for two measurements to be compared, by name."""
    return {
        "task_version": evaluation.task_type.version,
        "reward": reward_digest(evaluation.task_type, reward),
        "tokenizer": evaluation.fingerprint.tokenizer,
        "chat_template": evaluation.fingerprint.chat_template,
        **{f"sampling.{name}": value for name, value in evaluation.settings.items()},
    }


def reward_digest(task_type: TaskType, reward: RewardFunction) -> str:
    """Digest what a reward does on a task type: its scores of right and wrong answers.

    The scores are hashed and not the source, so that a reworded comment changes nothing and a
    changed rule does, wherever in the code it hides.
    """
    prompts, completions = [], []
    for problem in task_type.problems(32):
        right = task_type.canonical(problem.task)
        for text in (
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
            "",
            "I know",
            "x" * 300,
        ):
            prompts.append(problem.prompt)
            completions.append(text)
    scores = reward(prompts=prompts, completions=completions)
    return digest(json.dumps([None if score is None else float(score) for score in scores]))


def path_of(folder: Path, slug: str, task_type: str) -> Path:
    """Return where the baseline of a policy on a task type is kept."""
    return folder / slug / f"{task_type}.json"


def load(path: Path) -> Baseline:
    """Read a baseline. Raises ``BaselineError`` when it is missing or damaged."""
    again = "record it with --grpo-record, or restore it from git"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaselineError(f"there is no baseline {path}: {again}") from None
    except (OSError, ValueError) as error:
        raise BaselineError(f"the baseline {path} cannot be read ({error}): {again}") from error
    try:
        if (schema := content.pop("schema")) != SCHEMA:
            raise BaselineError(
                f"the baseline {path} has schema {schema!r}, and this version of the harness "
                f"reads {SCHEMA}: record it with --grpo-record"
            )
        records = {name: Record(**entry) for name, entry in content.pop("problems").items()}
        for name, record in records.items():
            _check(name, record)
        if content["problem_set"] != _problem_set(records):
            raise ValueError("its problems are not those that were recorded")
        for key, kind in (("policy", str), ("fingerprint", dict), ("conditions", dict)):
            if not isinstance(content[key], kind):
                raise ValueError(f"{key} is {content[key]!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaselineError(
            f"the baseline {path} is damaged ({type(error).__name__}: {error}): {again}"
        ) from error
    return Baseline(path, content, records)


def check_recordable(folder: Path) -> None:
    """Raise ``BaselineError`` where nothing may be recorded: in CI, and from a dirty tree.

    A recording names the commit that it was made from, so that commit must hold everything that
    made it. Changes below ``folder`` itself are other recordings, and do not count.
    """
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise BaselineError(
            "baselines are not recorded in CI (CI is set): record them by hand and commit them"
        )
    top = _git("rev-parse", "--show-toplevel")
    here = Path.cwd()
    if top is None and any((above / ".git").exists() for above in (here, *here.parents)):
        raise BaselineError(
            f"git cannot read the repository around {here}, so nothing tells whether it has "
            "uncommitted changes: see what `git status` says"
        )
    inside = top is not None and folder.resolve().is_relative_to(top)
    excluded = ["--", top, f":(exclude){folder.resolve()}"] if top and inside else []
    status = _git("status", "--porcelain", *excluded)
    if status:
        raise BaselineError(
            f"baselines are not recorded from a tree with uncommitted changes, such as "
            f"{status.splitlines()[0].strip()!r}: commit or stash them first"
        )


def record(
    folder: Path,
    policy: Policy,
    evaluations: Sequence[Evaluation],
    *,
    reward: RewardFunction,
    gate: Mapping[str, float],
) -> Path:
    """Write the baseline that ``evaluations`` of one policy and task type make together.

    They differ in their run's seed alone. Raises ``BaselineError`` when a completion is missing.
    """
    first = evaluations[0]
    path = path_of(folder, first.slug, first.task_type.name)
    records = {}
    for i, group in enumerate(first.groups):
        groups = [evaluation.groups[i] for evaluation in evaluations]
        records[group.problem.id] = _record(groups, first.prompts[i])
    completions = sum(record.k for record in records.values())
    previous = path.read_bytes() if path.exists() else None
    header = {
        "policy": first.policy,
        "fingerprint": asdict(first.fingerprint),
        "task_type": first.task_type.name,
        "conditions": conditions(first, reward),
        "problem_set": _problem_set(records),
        "seeds": [evaluation.run_seed for evaluation in evaluations],
        "accuracy": sum(record.correct for record in records.values()) / completions,
        "mean_reward": sum(record.reward for record in records.values()) / completions,
        "mean_length": sum(record.length for record in records.values()) / completions,
        "gate": dict(gate),
        "environment": environment(policy),
        "commit": _git("rev-parse", "HEAD"),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": hashlib.sha256(previous).hexdigest() if previous else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, _written(header, records))
    return path


def environment(policy: Policy) -> dict[str, Any]:
    """Return what a policy ran on: versions, hardware class, number format."""
    hardware = platform.machine()
    if policy.device.type == "cuda":
        import torch

        hardware = torch.cuda.get_device_name(policy.device)
    return {
        "python": platform.python_version(),
        "hardware": hardware,
        "device": policy.device.type,
        "dtype": str(policy.dtype).removeprefix("torch."),
        **{name: _version(name) for name in _LIBRARIES},
    }


def _record(groups: Iterable[Group], prompt: str) -> Record:
    completions: list[Completion] = [c for group in groups for c in group.completions]
    failed = sum(completion.outcome == "error" for completion in completions)
    if failed:
        raise BaselineError(
            f"nothing is recorded: {failed} of {len(completions)} completions of one problem "
            "could not be drawn or scored; see the report's samples and run it again"
        )
    outcomes = [completion.outcome for completion in completions]
    return Record(
        k=len(completions),
        correct=outcomes.count("correct"),
        truncated=outcomes.count("truncated"),
        unparsable=outcomes.count("unparsable"),
        length=sum(completion.tokens for completion in completions),
        log_length=round(sum(math.log(completion.tokens) for completion in completions), 9),
        reward=round(sum(completion.reward for completion in completions), 9),
        prompt=digest(prompt)[:12],
    )


def _check(name: str, record: Record) -> None:
    counts = (record.k, record.correct, record.truncated, record.unparsable, record.length)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"a count of {name} is not a whole number")
    if not record.k >= 1 or record.correct + record.truncated + record.unparsable > record.k:
        raise ValueError(f"the counts of {name} do not fit into {record.k} completions")
    if not all(
        isinstance(total, int | float) and math.isfinite(total)
        for total in (record.log_length, record.reward)
    ):
        raise ValueError(f"a sum of {name} is not a finite number")


def _problem_set(records: Iterable[str]) -> str:
    return digest("\n".join(sorted(records)))


def _written(header: Mapping[str, Any], records: Mapping[str, Record]) -> str:
    head = json.dumps({"schema": SCHEMA, **header}, indent=1, sort_keys=True, ensure_ascii=True)
    lines = (
        f"  {json.dumps(name)}: {json.dumps(asdict(record), sort_keys=True)}"
        for name, record in sorted(records.items())
    )
    return head.removesuffix("\n}") + ',\n "problems": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _write_whole(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository: there is no commit to name
    return run.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
