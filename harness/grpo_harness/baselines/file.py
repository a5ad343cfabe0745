"""The stored reference of a policy on a task type: load it, compare with it, write it.

One JSON file in git for each policy and task type, ``<folder>/<policy>/<task type>.json``, one
problem a line, sorted, so that a change of it can be read in a pull request. It holds two
references: what was recorded last, which runs are judged by, and the anchor, which recordings are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_harness.engines.engine import MOST_SAMPLES
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Evaluation
from grpo_harness.policy.checkpoint import digest

SCHEMA = 2


_HEADER = {
    "policy": str,
    "task_type": str,
    "fingerprint": dict,
    "conditions": dict,
    "anchor": dict,
    "planned": int,
}
_WITHIN = {
    "fingerprint": ("weights", "tokenizer", "chat_template"),
    "anchor": ("fingerprint", "digest"),
}
_ROUNDING = 1e-6


class BaselineError(HarnessError):
    """A baseline that is missing, damaged, not comparable or not to be recorded: one line."""


@dataclass(frozen=True)
class Record:
    """What is kept of one problem: counts among ``k`` completions, sums over them.

    ``length`` is in tokens, ``log_length`` is the sum of their natural logarithms, ``prompt`` is
    a digest of the prompt as the policy saw it. Of ``anchor_k`` completions of the anchor,
    ``anchor`` were correct.
    """

    k: int
    correct: int
    truncated: int
    unparsable: int
    length: int
    log_length: float
    reward: float
    prompt: str
    anchor: int
    anchor_k: int

    @property
    def mean_log_length(self) -> float:
        """The mean natural logarithm of the length in tokens."""
        return self.log_length / self.k


@dataclass(frozen=True)
class Baseline:
    """One file: the records by problem id, and the header that says what they were made with.

    ``digest`` is the SHA-256 of the file.
    """

    path: Path
    header: Mapping[str, Any]
    records: Mapping[str, Record]
    digest: str

    @property
    def policy(self) -> str:
        """The name of the policy that was recorded."""
        return str(self.header["policy"])

    def same_policy(self, evaluation: Evaluation) -> bool:
        """Tell whether the evaluated policy is the recorded one, by fingerprint."""
        return bool(self.header["fingerprint"] == asdict(evaluation.fingerprint))

    def select(self, evaluation: Evaluation) -> list[Record]:
        """Return the records of all the evaluation's planned problems, in its order.

        Raises ``BaselineError`` when the two cannot be compared: another task version, prompt,
        tokenizer, chat template, reward or sampling setting, or a problem that was not recorded.
        """
        if changed := self.changes(evaluation):
            raise BaselineError(
                f"not comparable with {self.path}, which was recorded of {self.policy}: "
                f"{'; '.join(changed)}. If that is meant, record a baseline: --grpo-record"
            )
        missing = [problem for problem in evaluation.plan if problem not in self.records]
        if missing:
            raise BaselineError(
                f"not comparable with {self.path}: of the {len(evaluation.plan)} problems asked, "
                f"{len(missing)} are not among its {len(self.records)}, the first of them "
                f"{missing[0]}. Ask fewer with --grpo-problems, or record anew: --grpo-record"
            )
        records = [self.records[problem] for problem in evaluation.plan]
        for record, problem, prompt in zip(
            records, evaluation.plan, evaluation.prompts, strict=True
        ):
            if record.prompt != prompt_digest(prompt):
                raise BaselineError(
                    f"not comparable with {self.path}: the policy sees problem {problem} in "
                    "other words than when that was recorded. If that is meant, record a "
                    "baseline: --grpo-record"
                )
        return records

    def changes(self, evaluation: Evaluation) -> list[str]:
        """Name each condition that is another one in ``evaluation``: what it was, what it is."""
        then, now = self.header["conditions"], conditions(evaluation)
        return [
            f"{name} was {_short(then.get(name))} and is {_short(now.get(name))}"
            for name in sorted({*now, *then})
            if now.get(name) != then.get(name)
        ]


def conditions(evaluation: Evaluation) -> dict[str, Any]:
    """Return what must be equal for two measurements to be compared, by name."""
    return {
        "task_version": evaluation.task_type.version,
        "reward": evaluation.reward,
        "tokenizer": evaluation.fingerprint.tokenizer,
        "chat_template": evaluation.fingerprint.chat_template,
        **{f"sampling.{name}": value for name, value in evaluation.settings.items()},
    }


def path_of(folder: Path, slug: str, task_type: str) -> Path:
    """Return where the baseline of a policy on a task type is kept."""
    return folder / slug / f"{task_type}.json"


def load(path: Path) -> Baseline:
    """Read a baseline. Raises ``BaselineError`` when it is missing or damaged."""
    again = "restore it from git, or remove it and record anew with --grpo-record"
    try:
        file = path.read_bytes()
        content = json.loads(file, object_pairs_hook=_once)
    except FileNotFoundError:
        raise BaselineError(f"there is no baseline {path}: record it with --grpo-record") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaselineError(f"the baseline {path} cannot be read ({error}): {again}") from error
    try:
        if (schema := content.pop("schema")) != SCHEMA:
            raise BaselineError(
                f"the baseline {path} has schema {schema!r}, and this version of the harness "
                f"reads {SCHEMA}: {again}"
            )
        records = {name: Record(**entry) for name, entry in content.pop("problems").items()}
        for name, record in records.items():
            _check(name, record)
        if content["problem_set"] != _problem_set(records):
            raise ValueError("its problems are not those that were recorded")
        for key, kind in _HEADER.items():
            if type(content[key]) is not kind:
                raise ValueError(f"{key} is {content[key]!r}")
        for part, keys in _WITHIN.items():
            for key in keys:
                if not isinstance(content[part][key], str):
                    raise ValueError(f"{key} of its {part} is {content[part][key]!r}")
        if content["planned"] < 1:
            raise ValueError(f"planned is {content['planned']}")
        if content["task_type"] != path.stem:
            raise ValueError(f"it is of the task type {content['task_type']!r}")
        if content["anchor"]["digest"] != _anchor_digest(records):
            raise ValueError("its anchor is not the one that was recorded")
        for key, mean in _means(records).items():
            if content[key] != mean:
                raise ValueError(f"{key} is {content[key]!r}, and its problems make it {mean!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BaselineError(
            f"the baseline {path} is damaged ({type(error).__name__}: {error}): {again}"
        ) from error
    return Baseline(path, content, records, hashlib.sha256(file).hexdigest())


def write(path: Path, header: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """Write a baseline, whole or not at all; the digests of ``records`` are put in."""
    header = {
        **header,
        "schema": SCHEMA,
        "problem_set": _problem_set(records),
        "anchor": {**header["anchor"], "digest": _anchor_digest(records)},
        **_means(records),
    }
    head = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=True)
    lines = (
        f"  {json.dumps(name)}: {json.dumps(asdict(record), sort_keys=True)}"
        for name, record in sorted(records.items())
    )
    text = head.removesuffix("\n}") + ',\n "problems": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which no name may stand twice: a merge can leave both sides."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return content


def _means(records: Mapping[str, Record]) -> dict[str, float]:
    """The means over all completions that a header shows, by which lines that changed are told."""
    drawn = sum(record.k for record in records.values())
    sums = {"accuracy": "correct", "mean_reward": "reward", "mean_length": "length"}
    # fsum, because the sum must not depend on the order of the records.
    return {
        mean: math.fsum(getattr(record, name) for record in records.values()) / drawn
        for mean, name in sums.items()
    }


def _check(name: str, record: Record) -> None:
    counts = (
        *(record.k, record.correct, record.truncated, record.unparsable, record.length),
        *(record.anchor_k, record.anchor),
    )
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"a count of {name} is not a whole number")
    if max(record.k, record.anchor_k) > MOST_SAMPLES:
        raise ValueError(f"{name} has more than {MOST_SAMPLES} completions")
    if not record.k >= 1 or record.correct + record.truncated + record.unparsable > record.k:
        raise ValueError(f"the counts of {name} do not fit into {record.k} completions")
    if not record.anchor_k >= max(1, record.anchor):
        raise ValueError(f"the anchor of {name} does not fit into {record.anchor_k} completions")
    if not all(
        isinstance(total, int | float) and math.isfinite(total)
        for total in (record.log_length, record.reward)
    ):
        raise ValueError(f"a sum of {name} is not a finite number")
    if not record.length >= record.k:
        raise ValueError(f"the length of {name} is less than a token each")
    # Of the same length in all, logarithms sum to most where all are as long, and to least where
    # all but one are a token.
    least = math.log(record.length - record.k + 1)
    most = record.k * math.log(record.length / record.k)
    if not least - _ROUNDING <= record.log_length <= most + _ROUNDING:
        raise ValueError(f"the lengths of {name} do not fit their logarithms")


def _problem_set(records: Iterable[str]) -> str:
    return digest("\n".join(sorted(records)))


def _anchor_digest(records: Mapping[str, Record]) -> str:
    # So that the anchor's counts cannot move unnoticed between two recordings.
    counts = (f"{name} {record.anchor}/{record.anchor_k}" for name, record in records.items())
    return digest("\n".join(sorted(counts)))


def prompt_digest(prompt: str) -> str:
    """Digest a prompt as the policy sees it, short enough for a line of the file."""
    return digest(prompt)[:12]


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
