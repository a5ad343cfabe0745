"""Some of the recorded completions with their scores: what the rewards were, by what they did.

They are kept beside the baseline, ``<task type>.examples.jsonl``, with one JSON object per line.
The first line tells how scores were weighed; any other has a completion, or a text that rewards are
tried on. The first right and the first wrong completion of a problem are its commonest. A later run
scores them again, before anything is drawn, and names what differs.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from grpo_harness.engines.engine import Sample
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Completion, Evaluation, Questions, scored
from grpo_harness.rewards.outcome import OUTCOMES, Outcome
from grpo_harness.rewards.trials import alike, trials
from grpo_harness.tasks import Source
from grpo_harness.text import digest, escape, shown

MOST_BYTES = 512_000
"""The largest file; trial texts have a quarter of it at most."""

LONGEST = 16_000
"""The longest text that is kept, in bytes."""

MOST = 2_048
"""Completions that are kept, unless more are needed for every score to be among them."""

_COMMONEST = 8
"""The commonest texts of each outcome are kept."""


class Scoring(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How scores were weighed, and a digest of the ``trials`` of the rewards' own digest."""

    correct: str
    trials: str
    weights: dict[str, float]


class Example(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One scored completion, or a ``trial`` text.

    ``scores`` lacks the functions that do not score a completion the same each time.
    """

    problem: str
    text: str
    outcome: Outcome
    scores: dict[str, float | None]
    total: float | None
    trial: bool = False
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Examples:
    """The content of one file. ``notes`` are for who records it."""

    scoring: Scoring
    examples: Sequence[Example]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The file, sorted by problem, with the examples of each in their order."""
        rows = sorted(self.examples, key=lambda example: example.problem)
        return "".join(f"{_line(row)}\n" for row in (self.scoring, *rows))


def examples_of(path: Path) -> Path:
    """Return the path of the examples of a baseline."""
    return path.with_suffix(".examples.jsonl")


def read(path: Path, recorded: str) -> Examples | None:
    """Read the examples of a baseline, or return ``None`` if they are not the ``recorded`` ones."""
    try:
        text = examples_of(path).read_text(encoding="utf-8")
        first, *others = map(json.loads, text.splitlines())
        scoring, rows = msgspec.convert(first, Scoring), msgspec.convert(others, list[Example])
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return None
    return Examples(scoring, rows) if digest(text) == recorded else None


def keep(evaluations: Sequence[Evaluation], older: Iterable[Example] = ()) -> Examples:
    """Choose the examples of a recording; ``older`` ones are of problems that it did not ask.

    Raises ``HarnessError`` if they cannot be scored again.
    """
    questions = evaluations[0].questions
    rewards, asked = questions.rewards, set(questions.ids)
    scoring = Scoring(
        correct=_correct(questions),
        trials=_digest_of_trials(questions.task_type),
        weights={reward.name: reward.weight for reward in rewards.functions},
    )
    blank = Example(problem="", text="", outcome="wrong", scores={}, total=None, trial=True)
    tried = dict.fromkeys((problem.id, text) for problem, text in trials(questions.task_type))
    texts = [replace(blank, problem=name, text=text) for name, text in tried if name in asked]
    room = MOST_BYTES - len(_line(scoring)) - 1
    kept = _fitting(_again(filter(_short, texts), questions), MOST_BYTES // 4)
    room -= sum(len(line) + 1 for line in kept)

    drawn = [
        _example(Example(problem=g.problem.id, text=c.text, outcome=c.outcome, scores={},
                         total=None, ids=c.ids), c)
        for evaluation in evaluations for g in evaluation.groups for c in g.completions
    ]  # fmt: skip
    chosen = _chosen([*filter(_short, drawn), *(e for e in older if not e.trial)], room)
    fresh = [example for example in chosen if example.problem in asked]
    unsteady = {
        name
        for then, now in zip(fresh, _again(fresh, questions), strict=True)
        for name in then.scores
        if not alike(then.scores[name], now.scores[name])
    }
    steady = [
        replace(e, scores={n: s for n, s in e.scores.items() if n not in unsteady})
        for e in (*kept.values(), *chosen)
    ]
    notes = tuple(
        f"the reward {escape(name)} scores a recorded completion differently alone or again: "
        "only its trial digest tells later whether it changed"
        for name in sorted(unsteady)
    )
    return Examples(scoring, steady, notes)


def changes(
    stored: Examples, questions: Questions, same: Collection[str], *, other_digest: bool
) -> list[str] | None:
    """List how the rewards have changed, or return ``None`` if only their digest can tell.

    ``same`` are the problems that are asked as they were; only their examples are scored.
    ``other_digest`` tells that the digest of the rewards is another one: then the trial texts are
    scored too.
    """
    then = [e for e in stored.examples if e.problem in same and (other_digest or not e.trial)]
    try:
        pairs = list(zip(then, _again(then, questions), strict=True))
    except HarnessError as error:
        return [str(error)]
    before = stored.scoring
    weights = {reward.name: reward.weight for reward in questions.rewards.functions}
    called = _called(list(before.weights), list(weights), pairs)
    alone = len(before.weights) == len(weights) == 1
    told = [
        *(f"the reward {escape(name)} was removed" for name in before.weights.keys() - called),
        *(f"the reward {escape(name)} was added" for name in weights.keys() - called.values()),
    ]
    told.sort()
    for old, new in called.items():
        if old != new and not alone:
            told.append(f"the reward {escape(old)} is called {escape(new)} now")
        if (was := before.weights[old]) != weights[new]:
            told.append(
                f"the weight of {escape(new)} was {_number(was)} and is {_number(weights[new])}"
            )
    if before.correct != (correct := _correct(questions)):
        told.append(f"correct was {escape(before.correct)} and is {escape(correct)}")
    for old, new in called.items():
        name = escape(old) + (f", now {escape(new)}," if old != new else "")
        told += _differing(
            f"the reward {name} changed",
            [
                (e, _number(was), _number(was if alike(was, now) else now))
                for e, was, now in (
                    (e, e.scores[old], again.scores[new]) for e, again in pairs if old in e.scores
                )
            ],
        )
    decides = questions.rewards.correct
    if not told:
        told += _differing(
            "outcomes changed",
            [
                (e, e.outcome, now.outcome)
                for e, now in pairs
                if decides is None or decides.reward in e.scores
            ],
        )
    if told or not other_digest:
        return told
    tried = {(problem.id, text) for problem, text in trials(questions.task_type)}
    whole = (e for e in then if e.trial and e.scores.keys() == before.weights.keys())
    if tried <= {(e.problem, e.text) for e in whole}:
        return []  # nothing but the last digits of scores
    unexplained = list(before.weights) == list(weights) and before.trials == _digest_of_trials(
        questions.task_type
    )
    return None if unexplained or not pairs else []


def _again(examples: Iterable[Example], questions: Questions) -> list[Example]:
    """Score examples by the rewards of ``questions``, which ask all their problems."""
    examples = list(examples)
    problems = dict(zip(questions.ids, questions.problems, strict=True))
    samples = [_sample(example) for example in examples]
    groups = scored(questions, [problems[e.problem] for e in examples], samples)
    return [_example(e, g.completions[0]) for e, g in zip(examples, groups, strict=True)]


def _sample(example: Example) -> Sample:
    ids = tuple(example.text.encode()) if example.trial else example.ids
    return Sample(example.text, len(ids) or 1, example.outcome == "truncated", ids=ids)


def _example(example: Example, found: Completion) -> Example:
    return replace(
        example,
        outcome=found.outcome,
        scores=dict(found.rewards),
        total=None if math.isnan(found.reward) else found.reward,
    )


def _chosen(drawn: Iterable[Example], room: int) -> list[Example]:
    """Choose examples for ``room`` bytes: the commonest texts and every score, then others.

    Those are of each problem the commonest right and the commonest wrong text, and then any. A
    later run shows them beside its own: they come first.
    """
    drawn = list(drawn)
    lines = sorted(((_line(e), e) for e in drawn), key=lambda row: (len(row[0]), row[0]))
    ordered = [example for _, example in lines]
    names = sorted({name for example in ordered for name in example.scores})
    queues = [
        *(
            _commonest([e for e in ordered if e.outcome == outcome], lambda e: e.text)[:_COMMONEST]
            for outcome in OUTCOMES
        ),
        *(_commonest(ordered, _score_of(name)) for name in names),
    ]
    wanted = (e for rank in zip_longest(*queues) for e in rank if e is not None)
    others = (e for _, e in sorted(lines, key=lambda row: digest(row[0])))
    commonest = {_line(example): example for example in _of_problems(drawn)}
    found = _fitting(wanted, room, chain(commonest.values(), others))
    return [found[line] for line in sorted(found, key=lambda line: (line not in commonest, line))]


def _of_problems(drawn: Iterable[Example]) -> Iterator[Example]:
    """Yield the commonest right and the commonest wrong text of each problem, as asked."""
    sides: dict[tuple[str, bool], list[Example]] = {}
    for example in drawn:
        sides.setdefault((example.problem, example.outcome == "correct"), []).append(example)
    for problem in dict.fromkeys(problem for problem, _ in sides):
        for right in (True, False):
            if examples := sides.get((problem, right)):
                yield _commonest(examples, lambda e: e.text)[0]


def _commonest(ordered: Sequence[Example], key: Callable[[Example], Any]) -> list[Example]:
    """Return the first example for each value of ``key``, the commonest value first."""
    first: dict[Any, Example] = {}
    for example in ordered:
        first.setdefault(key(example), example)
    times = Counter(map(key, ordered))
    return sorted(first.values(), key=lambda example: -times[key(example)])


def _score_of(name: str) -> Callable[[Example], float | str | None]:
    return lambda example: example.scores.get(name, "none")


def _fitting(
    wanted: Iterable[Example], room: int, others: Iterable[Example] = ()
) -> dict[str, Example]:
    """Return by their lines what fits into ``room`` bytes; ``others`` up to ``MOST`` in all."""
    chosen: dict[str, Example] = {}
    for example, more in chain(((e, False) for e in wanted), ((e, True) for e in others)):
        if more and len(chosen) >= MOST:
            break
        line = _line(example)
        if line not in chosen and len(line) < room:
            chosen[line] = example
            room -= len(line) + 1
    return chosen


def _called(
    before: Sequence[str], now: Sequence[str], pairs: Sequence[tuple[Example, Example]]
) -> dict[str, str]:
    """Return the present name of each reward that is still there, by what it scores."""
    called = {name: name for name in before if name in now}
    new = [name for name in now if name not in called]

    def same(old: str, name: str) -> bool:
        return bool(pairs) and all(
            old in e.scores and alike(e.scores[old], again.scores[name]) for e, again in pairs
        )

    for old in (name for name in before if name not in called):
        alone = len(before) == len(now) == 1
        if found := next((name for name in new if alone or same(old, name)), None):
            called[old] = found
            new.remove(found)
    return called


def _differing(what: str, rows: Sequence[tuple[Example, str, str]]) -> Iterator[str]:
    """Say what differs, by two completions, or else by two of the trial texts."""
    for trial, kind in ((False, "recorded completions"), (True, "trial texts")):
        group = [row for row in rows if row[0].trial == trial]
        found = {e.text: (was, now) for e, was, now in group if was != now}
        if found:
            two = sorted(found, key=lambda text: (len(text), text))[:2]
            texts = ", ".join(f"'{_end(t)}' was {found[t][0]} and is {found[t][1]}" for t in two)
            n = sum(was != now for _, was, now in group)
            yield f"{what}: {texts} ({n} of {len(group)} {kind})"
            return


def _end(text: str) -> str:
    return ("…" if len(text) > 60 else "") + escape(text[-60:])


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return short if float(short := f"{value:g}") == value else repr(value)


def _correct(questions: Questions) -> str:
    correct = questions.rewards.correct
    return "not set" if correct is None else f"{correct.reward} >= {_number(correct.at_least)}"


def _digest_of_trials(source: Source) -> str:
    tried = [[p.id, p.prompt, source.content(p), text] for p, text in trials(source)]
    return digest(json.dumps(tried, default=shown))


def _short(example: Example) -> bool:
    return len(example.text.encode(errors="surrogatepass")) <= LONGEST


def _line(row: msgspec.Struct) -> str:
    return json.dumps(msgspec.to_builtins(row), ensure_ascii=True)
