"""What ``report.json`` holds: the one source of the page, the tables, the comment and the exports.

Each class is one kind of JSON object. Numbers that JSON does not have are null. Rates are in 0..1,
lengths in tokens. ``report.schema.json`` is the same as a JSON Schema.
"""

from typing import Any, Final, Literal

import msgspec

from grpo_harness.gate.verdicts import Verdict
from grpo_harness.history.file import Run as EarlierRun
from grpo_harness.rewards.outcome import Outcome
from grpo_harness.rules import Unit

SCHEMA: Final = 3
"""Since 3, a report has every problem and completion, its environment and its settings."""

Status = Literal["running", "finished", "interrupted"]


class _Object(msgspec.Struct, forbid_unknown_fields=True):
    """An object that has all of its keys but those with a default, and no others."""


class Completion(_Object, kw_only=True):
    """One completion.

    ``strict`` tells whether it is exactly the wanted answer. ``reward`` is the total, and
    ``rewards`` has that of each function; null if it does not apply. ``logged`` is what the
    functions logged of it.
    """

    text: str
    tokens: int
    outcome: Outcome
    strict: bool
    reward: float | None
    rewards: dict[str, float | None] = {}
    logged: dict[str, Any] = {}


class Side(_Object, kw_only=True):
    """The numbers of one problem, now or when its baseline was recorded.

    ``correct``, ``truncated`` and ``unparsable`` are counts among the ``k`` completions, ``tokens``
    their mean length, ``reward`` and ``rewards`` their mean rewards.
    """

    k: int
    correct: int
    truncated: int
    unparsable: int
    tokens: float
    reward: float | None
    rewards: dict[str, float | None] = {}


class Kept(_Object, kw_only=True):
    """A completion that was kept when the baseline was recorded."""

    text: str
    outcome: Outcome


class Problem(_Object, kw_only=True):
    """One problem: what was asked and is wanted, both sides' numbers, every completion.

    ``then`` is null without a baseline of the same prompt. ``kept`` are the commonest right and the
    commonest wrong completion of the recording, if they were kept.
    """

    id: str
    prompt: str
    wanted: str | None
    then: Side | None
    now: Side
    kept: list[Kept] = []
    completions: list[Completion]


class Recorded(_Object, kw_only=True):
    """How the baseline of an evaluation was recorded: at which commit, when (UTC), with what.

    ``environment`` has versions, machine and engine, and ``sampling`` what completions were drawn
    with.
    """

    commit: str | None
    recorded: str
    environment: dict[str, Any]
    sampling: dict[str, Any]


class Slice(_Object, kw_only=True):
    """An evaluation on the problems of one value of a column."""

    of: str
    n: int
    accuracy: float | None
    mean_reward: float | None


class Evaluation(_Object, kw_only=True):
    """A policy on a task type: ``n`` of the ``planned`` problems were asked, ``k`` times each.

    ``slug`` is the policy's name in the names of files, such as that of its samples. ``recorded``
    is null without a baseline.
    """

    policy: str
    slug: str
    fingerprint: str
    task_type: str
    n: int
    planned: int
    k: int
    run_seed: int
    sampling: dict[str, Any]
    engine: dict[str, Any]
    accuracy: float | None
    strict_accuracy: float | None
    mean_reward: float | None
    mean_length: float
    metrics: dict[str, float | None]
    outcomes: dict[Outcome, float]
    slices: list[Slice] = []
    problems: list[Problem] = []
    recorded: Recorded | None = None


class Evidence(_Object, kw_only=True):
    """The numbers behind a verdict, as ``grpo_harness.gate.verdicts.Evidence`` has them."""

    verdict: Verdict
    reason: str
    n: int
    k: int
    now: float | None
    then: float | None
    delta: float | None
    lower: float | None
    upper: float | None
    p: float | None
    mde90: float | None
    needed: int | None
    margin: float | None
    minimum: float | None


class Check(_Object, kw_only=True):
    """One judged question. ``changed`` shows the problems that got worse."""

    rule: str
    title: str
    task_type: str
    policy: str
    reference: str
    against: Literal["baseline", "base"]
    verdict: Verdict
    reason: str
    evidence: Evidence | None
    changed: list[str]
    unit: Unit


class Curve(_Object, kw_only=True):
    """A figure along a training: of this run at ``steps``, and of recorded runs at ``then_steps``.

    ``mean`` is that of the recorded runs (``then``), and ``lower`` and ``upper`` their band.
    """

    training: str
    name: str
    steps: list[float]
    now: list[float | None]
    then_steps: list[float]
    then: list[list[float | None]]
    mean: list[float | None]
    lower: list[float | None]
    upper: list[float | None]


class Failure(_Object, kw_only=True):
    """A test that failed or could not be run, and its message."""

    test: str
    said: str


class Tests(_Object, kw_only=True):
    """The tests of the run."""

    passed: int
    failed: list[Failure]
    not_run: list[str]


class Run(_Object, kw_only=True):
    """What was run: policies, sizes, sampling. ``started`` is in UTC, and ``commit`` is git's."""

    base: str
    trained: list[str]
    problems: int | str
    samples: int
    sampling: dict[str, Any]
    baselines: str
    seed: int
    started: str
    seconds: float | None
    commit: str | None


class Content(_Object, kw_only=True):
    """The whole file. ``settings`` is the resolved table ``[tool.grpo-harness]``.

    ``history`` has the runs of the folder of ``--grpo-history``, with this one.
    """

    schema: Literal[3] = SCHEMA
    status: Status
    run: Run
    environment: dict[str, str | None]
    settings: dict[str, Any]
    evaluations: list[Evaluation]
    checks: list[Check]
    curves: list[Curve]
    history: list[EarlierRun] = []
    tests: Tests
    notices: list[str]
