"""Record a baseline. Accuracy is never lowered without a reason.

If every change records a new baseline, accuracy can slide: a loss of half a point per recording is
never proven, and in the end ten points are lost. So each recording is tested against the previous
one and against the *anchor*. The anchor is the first recording; a proven gain moves it up, and only
a given reason moves it down. Files are written atomically, and only pruning deletes anything.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from grpo_harness.baselines.diff import sentence
from grpo_harness.baselines.examples import keep, read
from grpo_harness.baselines.file import (
    SPEED,
    Anchor,
    Baseline,
    BaselineError,
    Header,
    Kept,
    Record,
    bounds_of,
    conditions,
    exists,
    load,
    path_of,
    prompt_digest,
    write,
)
from grpo_harness.baselines.provenance import environment, git
from grpo_harness.evaluation import Completion, Evaluation, Group, Questions
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.bounds import ALPHA, MINIMUM_PROBLEMS
from grpo_harness.text import escape

SAMPLES = 64
"""Completions per problem that a recording draws: later runs need fewer for it."""

PROBLEMS = 1024
"""Problems that a recording asks, or as many as there are: a plan has no more to choose from."""

SEEDS = 2
"""Run seeds of a recording, so that the luck of a single run is not the reference."""

_ONE_WAY = ("only drop, and a gain stays unseen", "only rise, and a loss stays unseen")

_ACCEPT = "--grpo-record --grpo-accept-regression 'why'"


@dataclass(frozen=True)
class Recording:
    """A file that was written, with notes for the user."""

    path: Path
    notes: tuple[str, ...]


def check_recordable(folder: Path, root: Path) -> None:
    """Raise ``BaselineError`` if recording is not allowed: in CI, or from a dirty tree.

    A recording names its commit, so that commit must contain everything that made it. ``root`` is
    the project's folder. Changes below ``folder`` itself are other recordings and do not count.
    """
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise BaselineError(
            "baselines are not recorded in CI (CI is set): record them by hand and commit them"
        )
    top = git("rev-parse", "--show-toplevel", cwd=root)
    if top is None:
        if any((above / ".git").exists() for above in (root, *root.parents)):
            raise _unreadable(root)
        return
    excluded = []
    if folder.resolve() == Path(top).resolve():
        raise BaselineError(
            f"baselines cannot be kept in the top folder of the repository, {top}, together with "
            "the code that they are recorded from: set [tool.grpo-harness] baselines"
        )
    if folder.resolve().is_relative_to(Path(top).resolve()):
        excluded = ["--", top, f":(exclude,literal){folder.resolve()}"]
    status = git("status", "--porcelain", "--untracked-files=all", *excluded, cwd=root)
    if status is None:
        raise _unreadable(root)
    if status:
        raise BaselineError(
            f"baselines are not recorded from a tree with uncommitted changes, such as "
            f"{status.splitlines()[0].strip()!r}: commit or stash them first"
        )


def _unreadable(root: Path) -> BaselineError:
    return BaselineError(
        f"git cannot read the repository around {root}, so it may have "
        "uncommitted changes: see what `git status` says"
    )


def record(
    folder: Path,
    evaluations: Sequence[Evaluation],
    *,
    root: Path = Path(),
    before: Path | None = None,
    files: int = 1,
    reason: str | None = None,
) -> Recording:
    """Write one baseline, with examples, from ``evaluations`` of one policy and task type.

    The evaluations differ only in their run seed. Problems of an older file that were not asked now
    are kept if they were recorded from the same policy under the same conditions. ``before`` is the
    file that the policy was judged by until now (default: its own). ``root`` is the project's
    folder, and ``files`` the number of files that the run records: they share the risk of a refusal
    by chance. ``reason`` says why the accuracy may be lower than before.

    Raises ``BaselineError`` and leaves the file unchanged when a completion is missing, when
    problems would be lost, and when there is no ``reason`` although the accuracy is proven to be
    lower or cannot be tested.
    """
    first = evaluations[0]
    questions = first.questions
    path = path_of(folder, questions.policy.slug, first.task)
    fresh = {
        group.problem.id: _record([e.groups[i] for e in evaluations], questions, i)
        for i, group in enumerate(first.groups)
    }
    made: dict[str, Any] = {
        "commit": git("rev-parse", "HEAD", cwd=root),
        "policy": first.policy,
        "reason": reason,
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    correct, drawn = (sum(getattr(r, name) for r in fresh.values()) for name in ("correct", "k"))
    anchor = Anchor(**made, fingerprint=str(first.fingerprint), accuracy=correct / drawn)
    parent, notes = _parent(path if exists(path) else before or path, reason)
    if questions.judges_answers and correct in (0, drawn):
        found = "no completion is" if correct == 0 else "every completion is"
        notes.append(f"CAUTION: {found} correct, so accuracy can {_ONE_WAY[correct == 0]}")
    records, kept, planned = fresh, list[str](), first.planned
    if parent is not None:
        kept = _kept(parent, first, fresh) if parent.path == path else []
        if kept:
            planned = max(planned, parent.header.planned)
        changed = parent.changes(questions)
        if changed:
            notes.append(f"recorded under other conditions than before: {'; '.join(changed)}")
        moves, said = _against_parent(parent, first, fresh, ALPHA / (2 * files), reason)
        notes += said
        if not moves:
            anchor = parent.header.anchor
            for name in fresh.keys() & parent.records.keys():  # they keep their anchor
                old = parent.records[name]
                fresh[name] = replace(fresh[name], anchor=old.anchor, anchor_k=old.anchor_k)
        records = {**{name: parent.records[name] for name in kept}, **fresh}
    if len(records) < MINIMUM_PROBLEMS:
        notes.append(
            f"CAUTION: {len(records)} problems are too few to judge, the floor is "
            f"{MINIMUM_PROBLEMS}"
        )
    header = Header(
        **made,
        anchor=anchor,
        fingerprint=first.fingerprint,
        task_type=first.task,
        conditions=conditions(questions),
        seeds=[evaluation.run_seed for evaluation in evaluations],
        planned=planned,
        gate=bounds_of(questions),
        environment={**environment(first.engine), **_speed(evaluations, parent)},
        parent=parent.digest if parent else None,
        # For these problems, only the conditions of the header are valid.
        kept_from=Kept(len(kept), parent.digest) if parent and kept else None,
    )
    # Those of problems that are kept stay, too.
    older = read(path, parent.header.examples) if parent and kept else None
    if parent:
        told = sentence(header, records, parent.header, parent.records)
        header = replace(header, change=told)
        notes.append(f"changed: {told}")
    examples = keep(evaluations, [e for e in older.examples if e.problem in kept] if older else [])
    write(path, header, records, examples)
    return Recording(path, (*notes, *examples.notes))


def _speed(evaluations: Sequence[Evaluation], parent: Baseline | None) -> dict[str, float]:
    """Return how fast completions were drawn: later runs plan by it.

    If none were, it is what the recording before said of the same policy.
    """
    drawn, seconds = sum(e.drawn for e in evaluations), sum(e.seconds for e in evaluations)
    if drawn and seconds:
        return {SPEED: float(f"{drawn / seconds:.3g}")}
    same = parent is not None and parent.same_policy(evaluations[0].fingerprint)
    return {SPEED: parent.speed} if parent and same and parent.speed else {}


def _parent(path: Path, reason: str | None) -> tuple[Baseline | None, list[str]]:
    if not exists(path):
        return None, ["the first recording: it is the anchor"]
    try:
        return load(path), []
    except BaselineError as error:
        if reason is None:
            raise BaselineError(
                f"nothing is recorded: whether the accuracy is lower cannot be tested: {error}. "
                f"If the file is lost, say why that does not matter: {_ACCEPT}"
            ) from error
        return None, [f"the anchor is set anew: {error}"]


def _kept(parent: Baseline, first: Evaluation, fresh: Mapping[str, Record]) -> list[str]:
    """Return the problems of the older file that were not asked now and are kept."""
    kept = [name for name in parent.records if name not in fresh]
    if kept and (parent.changes(first.questions) or not parent.same_policy(first.fingerprint)):
        raise BaselineError(
            f"nothing is recorded: {parent.path} also holds {len(kept)} problems that this run "
            f"did not ask, such as {kept[0]}, and they were recorded of another policy or under "
            "other conditions. Ask them too (--grpo-problems), or remove the file if they are "
            "not wanted; --grpo-prune removes those that the task type no longer draws"
        )
    return kept


def _against_parent(
    parent: Baseline,
    first: Evaluation,
    fresh: Mapping[str, Record],
    alpha: float,
    reason: str | None,
) -> tuple[bool, list[str]]:
    """Test against the previous recording and the anchor; tell whether the anchor moves."""
    if parent.header.conditions.get("task_version") != first.questions.task_type.version:
        return True, ["the task type's version is another one: the anchor is set anew"]
    shared = [name for name in fresh if name in parent.records]
    before = [parent.records[name] for name in shared]
    correct, k = [fresh[name].correct for name in shared], [fresh[name].k for name in shared]
    anchor, recorded = parent.header.anchor, str(parent.header.fingerprint)
    # The anchor first: if the recording falls below both, the message names the anchor.
    references = (
        ("anchor", [r.anchor for r in before], [r.anchor_k for r in before], anchor.fingerprint),
        ("parent", [r.correct for r in before], [r.k for r in before], recorded),
    )
    notes = []
    if len(parent.records) < MINIMUM_PROBLEMS:
        return True, ["the recording before was too small to judge by: a new anchor"]
    if len(shared) < MINIMUM_PROBLEMS:
        untested = (
            f"it shares {len(shared)} problems with {parent.path}, and fewer than "
            f"{MINIMUM_PROBLEMS} do not tell whether the accuracy of {escape(first.policy)} on "
            f"{first.task} is lower"
        )
        if reason is None:
            raise BaselineError(
                f"nothing is recorded: {untested}. Ask more (--grpo-problems), or say why that "
                f"does not matter: {_ACCEPT}"
            )
        return True, [f"{untested}: accepted, and the anchor is set anew"]
    for name, then, k_then, fingerprint in references:
        same = fingerprint == str(first.fingerprint)
        found = gate.judge(correct, k, then, k_then, same_policy=same, alpha=alpha)
        if found.verdict != "FAIL" or found.delta > 0:
            continue
        lowered = (
            f"the accuracy of {escape(first.policy)} on {first.task} is {found.now:.1%}, and "
            f"the {name}'s was {found.then:.1%}: {100 * found.delta:+.1f} points, "
            f"{gate.chance(found.p)}"
        )
        if reason is None:
            raise BaselineError(
                f"nothing is recorded, {parent.path} is as it was: {lowered}. If that loss is "
                f"meant, say so and why: {_ACCEPT}"
            )
        return True, [f"{lowered}: accepted, and the anchor moves down"]
    gain = gate.judge_improvement(correct, k, references[0][1], references[0][2], alpha=alpha)
    if gain.verdict == "PASS":
        notes.append(
            f"a proven gain of {100 * gain.delta:.1f} points, to {gain.now:.1%} on the "
            f"{len(shared)} problems of both: the anchor moves up"
        )
    elif reason is not None:
        notes.append("nothing was lowered: the reason is kept, and the anchor where it was")
    return gain.verdict == "PASS", notes


def _record(groups: Iterable[Group], questions: Questions, i: int) -> Record:
    completions: list[Completion] = [c for group in groups for c in group.completions]
    failed = sum(completion.outcome == "error" for completion in completions)
    if failed:
        raise BaselineError(
            f"nothing is recorded: {failed} of {len(completions)} completions of one problem "
            "could not be drawn or scored; see the report's samples and run it again"
        )
    outcomes = [completion.outcome for completion in completions]
    tally = Group(questions.problems[i], tuple(completions)).tally
    return Record(
        k=len(completions),
        correct=outcomes.count("correct"),
        truncated=outcomes.count("truncated"),
        unparsable=outcomes.count("unparsable"),
        length=sum(completion.tokens for completion in completions),
        log_length=round(sum(math.log(completion.tokens) for completion in completions), 9),
        reward=round(sum(c.reward for c in completions if not math.isnan(c.reward)), 9),
        prompt=prompt_digest(questions.prompts[i]),
        columns=questions.content(i),
        total=_counted(tally.total),
        rewards={name: _counted(values) for name, values in tally.rewards.items()},
        anchor=outcomes.count("correct"),
        anchor_k=len(completions),
    )


def _counted(values: Iterable[float]) -> tuple[tuple[float, int], ...]:
    return tuple(sorted(Counter(values).items()))
