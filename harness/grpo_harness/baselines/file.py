"""One baseline file of a policy and a task type: load it, compare with it, write it.

The files are JSON in git, ``<folder>/<policy>/<task type>.json``, with one problem per line,
sorted, so that a pull request shows a readable diff; its examples are beside it. A file holds two
references: the last recording, for judging runs, and the anchor, for judging later recordings.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from grpo_harness.baselines.examples import Examples, changes, examples_of, read
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Questions, Tally
from grpo_harness.gate.bounds import MOST_PROBLEMS, MOST_SAMPLES, RATE
from grpo_harness.policy import Fingerprint
from grpo_harness.rules import recorded_bounds
from grpo_harness.text import digest, escape, one_line

SCHEMA: Final = 4
"""Since 4, a file has a checksum, and single rewards and examples always."""

SPEED: Final = "completions_per_second"
"""The key of a baseline's environment that says how fast its completions were drawn."""

_ROUNDING = 1e-6

_AGAIN = "restore it from git, or remove it and record anew with --grpo-record"

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Samples = Annotated[int, Meta(ge=1, le=MOST_SAMPLES)]
_Counted = tuple[tuple[float, _Samples], ...]


class BaselineError(HarnessError):
    """A baseline is missing, damaged, not comparable or must not be recorded. One line."""


class Record(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    gc=False,  # thousands of them, which cannot be part of a cycle
):
    """The results of one problem: counts and sums over its ``k`` completions.

    ``correct``, ``truncated`` and ``unparsable`` are counts. ``length`` is in tokens,
    ``log_length`` is the sum of the natural logarithms of the lengths. ``prompt`` is a digest of
    the prompt as the policy saw it, ``columns`` one of a row's other columns. ``anchor`` of the
    anchor's ``anchor_k`` completions were correct. ``total`` and ``rewards`` have each value of the
    total reward, and of those of several functions, with how often it occurred. Raises
    ``ValueError`` for counts that do not fit together.
    """

    k: _Samples
    correct: _Count
    truncated: _Count
    unparsable: _Count
    length: _Count
    log_length: float
    reward: float
    prompt: str
    anchor: _Count
    anchor_k: _Samples
    columns: str = ""
    total: _Counted = ()
    rewards: dict[str, _Counted] = {}

    def __post_init__(self) -> None:
        if self.correct + self.truncated + self.unparsable > self.k:
            raise ValueError(f"the counts do not fit into {self.k} completions")
        if self.anchor > self.anchor_k:
            raise ValueError(f"the anchor does not fit into {self.anchor_k} completions")
        if not math.isfinite(self.log_length) or not math.isfinite(self.reward):
            raise ValueError("a sum is not a finite number")
        for values in (self.total, *self.rewards.values()):
            if sum(times for _, times in values) > self.k:
                raise ValueError(f"the rewards are more than {self.k}")
            if not all(math.isfinite(value) for value, _ in values):
                raise ValueError("a reward is not a finite number")
        if self.length < self.k:
            raise ValueError("the length is less than a token each")
        # For a given total length, the sum of logarithms is largest if all lengths are equal, and
        # smallest if all but one are 1.
        least = math.log(self.length - self.k + 1)
        most = self.k * math.log(self.length / self.k)
        if not least - _ROUNDING <= self.log_length <= most + _ROUNDING:
            raise ValueError("the lengths do not fit their logarithms")

    @property
    def tally(self) -> Tally:
        """The numbers that rules compare."""
        return Tally(
            self.k,
            self.correct,
            self.truncated,
            self.unparsable,
            self.log_length / self.k,
            _each(self.total),
            {name: _each(values) for name, values in self.rewards.items()},
        )


def _each(counted: _Counted) -> tuple[float, ...]:
    return tuple(chain.from_iterable(repeat(value, times) for value, times in counted))


class Made(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The origin of a recording: the policy's name, the commit, the time and the reason."""

    policy: str
    commit: str | None
    recorded: str
    reason: str | None


class Anchor(Made, kw_only=True, forbid_unknown_fields=True):
    """The recording that later ones must not fall below; ``digest`` is that of its counts."""

    fingerprint: str
    accuracy: float
    digest: str = ""


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """The number of problems kept from an older file, and the digest of that file."""

    problems: _Count
    digest: str


class Header(Made, kw_only=True, forbid_unknown_fields=True):
    """Everything in a baseline file except the problems.

    ``planned`` problems were asked. Two measurements can be compared only if their ``conditions``
    and their bounds, ``gate``, are equal. ``change`` says what is other than in the ``parent``, the
    file before this one. ``problem_set`` and the three means reveal lines that
    were edited by hand, and ``checksum`` any other change. ``examples`` is the digest of the
    examples, if there are any.
    """

    schema: Literal[4] = SCHEMA
    task_type: str
    fingerprint: Fingerprint
    conditions: dict[str, Any]
    gate: dict[str, Any]
    planned: Annotated[int, Meta(ge=1, le=MOST_PROBLEMS)]
    seeds: list[int]
    environment: dict[str, Any]
    anchor: Anchor
    parent: str | None = None
    change: str | None = None
    kept_from: Kept | None = None
    examples: str = ""
    problem_set: str = ""
    accuracy: float = math.nan
    mean_reward: float = math.nan
    mean_length: float = math.nan
    checksum: str = ""


@dataclass(frozen=True)
class Baseline:
    """One baseline file: its header, its records by problem id, its SHA-256 ``digest``."""

    path: Path
    header: Header
    records: Mapping[str, Record]
    digest: str
    _scored: dict[int, tuple[Questions, list[str] | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _selected: dict[int, tuple[Questions, list[Tally]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def policy(self) -> str:
        """The name of the policy that was recorded."""
        return self.header.policy

    @property
    def speed(self) -> float | None:
        """The completions that were drawn in a second, if that is known."""
        value = self.header.environment.get(SPEED)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    def same_policy(self, fingerprint: Fingerprint) -> bool:
        """Tell whether a policy is the recorded one, by fingerprint."""
        return self.header.fingerprint == fingerprint

    def select(self, questions: Questions) -> list[Tally]:
        """Return the numbers of the problems asked, in their order.

        Raises ``BaselineError`` when the two cannot be compared: another task version, prompt,
        tokenizer, chat template, reward, sampling setting or bound, or a problem that was not
        recorded.
        """
        if id(questions) not in self._selected:
            self._selected[id(questions)] = questions, self._of(questions)
        return list(self._selected[id(questions)][1])

    def _of(self, questions: Questions) -> list[Tally]:
        missing = [problem for problem in questions.ids if problem not in self.records]
        known = {record.prompt for record in self.records.values()}
        asked = zip(questions.ids, questions.prompts, strict=True)
        same = [name for name, p in asked if name in missing and prompt_digest(p) in known]
        if same:
            raise BaselineError(
                f"not comparable with {self.path}: of the {len(questions.ids)} problems asked, "
                f"{len(missing)} are not among its {len(self.records)}, and the prompts of "
                f"{len(same)} of them are, with other columns, such as {same[0]}: the data "
                "changed. If that is meant, record a baseline: --grpo-record"
            )
        if changed := self.changes(questions):
            raise BaselineError(
                f"not comparable with {self.path}, which was recorded of {escape(self.policy)}: "
                f"{'; '.join(changed)}. If that is meant, record a baseline: --grpo-record"
            )
        if missing:
            raise BaselineError(
                f"not comparable with {self.path}: of the {len(questions.ids)} problems asked, "
                f"{len(missing)} are not among its {len(self.records)}, the first of them "
                f"{missing[0]}. Ask fewer with --grpo-problems, or record anew: --grpo-record"
            )
        for i in range(len(questions.ids)):
            if what := self._differs(questions, i):
                raise BaselineError(
                    f"not comparable with {self.path}: of problem {questions.ids[i]} the {what} "
                    "not what was recorded. If that is meant, record a baseline: --grpo-record"
                )
        return [self.records[problem].tally for problem in questions.ids]

    def _differs(self, questions: Questions, i: int) -> str:
        """Name what of a recorded problem is not what was recorded, or return an empty text."""
        record = self.records[questions.ids[i]]
        if record.prompt != prompt_digest(questions.prompts[i]):
            return "prompt is"
        return "columns are" if record.columns not in ("", questions.content(i)) else ""

    def changes(self, questions: Questions) -> list[str]:
        """List the conditions that have changed, each with its old and new value.

        Changed rewards are named by what they score differently, if there are examples.
        """
        then = {**self.header.conditions, **flat(self.header.gate)}
        # A rule newer than the recording has no bounds there, and is judged by its own.
        own = bounds_of(questions)
        known = {name: of for name, of in own.items() if name in self.header.gate}
        now = {**conditions(questions), **flat(known)}
        rewards = self._rewards(questions)
        if rewards is not None:
            then["reward"] = now["reward"]
        return (rewards or []) + changed(then, now)

    def _rewards(self, questions: Questions) -> list[str] | None:
        """List how the rewards have changed, or return ``None`` if their digest must tell."""
        if not self.header.examples:
            return None
        if id(questions) not in self._scored:
            self._scored[id(questions)] = questions, self._scored_again(questions)
        return self._scored[id(questions)][1]

    def _scored_again(self, questions: Questions) -> list[str] | None:
        stored = read(self.path, self.header.examples)
        if stored is None:
            return [
                f"the examples {examples_of(self.path)} are not those that were recorded: "
                "restore them from git, or record anew"
            ]
        return changes(
            stored,
            questions,
            {
                name
                for i, name in enumerate(questions.ids)
                if name in self.records and not self._differs(questions, i)
            },
            other_digest=questions.reward != self.header.conditions.get("reward"),
        )


def bounds_of(questions: Questions) -> dict[str, Any]:
    """Return the bounds of the gate, as a baseline stores them; else they are the defaults."""
    return dict(questions.bounds or recorded_bounds())


def conditions(questions: Questions) -> dict[str, Any]:
    """Return, by name, what must be equal for two measurements to be compared."""
    return {
        "task_version": questions.task_type.version,
        "reward": questions.reward,
        "tokenizer": questions.fingerprint.tokenizer,
        "chat_template": questions.fingerprint.chat_template,
        **{f"sampling.{name}": value for name, value in questions.settings.items()},
    }


def flat(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Name each bound of the gate: ``gate.alpha``, ``gate.accuracy.margin`` and so on."""
    return {
        f"gate.{name}" + (f".{key}" if key else ""): bound
        for name, value in bounds.items()
        for key, bound in (value.items() if isinstance(value, dict) else [("", value)])
    }


def path_of(folder: Path, slug: str, task_type: str) -> Path:
    """Return the path of the baseline of a policy on a task type."""
    return folder / slug / f"{task_type}.json"


def exists(path: Path) -> bool:
    """Tell whether a file is there. One that may not be looked for is: loading it says why."""
    try:
        return path.exists()
    except OSError:
        return True


def load(path: Path) -> Baseline:
    """Read a baseline. Raises ``BaselineError`` when it is missing or damaged."""
    try:
        if path.exists() and not path.is_file():
            raise BaselineError(f"the baseline {path} is not a file: remove it, or {_AGAIN}")
        return Baseline(path, *_parsed(path, path.read_bytes()))
    except FileNotFoundError:
        raise BaselineError(f"there is no baseline {path}: record it with --grpo-record") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaselineError(
            f"the baseline {path} cannot be read ({one_line(error)}): {_AGAIN}"
        ) from error


@lru_cache(maxsize=64)
def _parsed(path: Path, file: bytes) -> tuple[Header, Mapping[str, Record], str]:
    """Read the content of a baseline once: the plan, the checks and the summary all ask for it."""
    content = json.loads(file, object_pairs_hook=_once)
    try:
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        seal = checksum(content)
        if older := content.get("schema") in (2, 3):
            _upgrade(content)
        if (schema := content.get("schema")) != SCHEMA:
            raise BaselineError(
                f"the baseline {path} has schema {escape(repr(schema))}, and this version of the "
                f"harness reads {SCHEMA}: {_AGAIN}"
            )
        records = msgspec.convert(content.pop("problems", {}), dict[str, Record])
        header = msgspec.convert(content, Header)
        _check(header, records, path)
        if header.checksum != seal and not older:
            raise ValueError("its content is not what was recorded")
    except (msgspec.MsgspecError, *_DAMAGED) as error:
        raise BaselineError(
            f"the baseline {path} is damaged ({one_line(error)}): {_AGAIN}"
        ) from error
    return header, records, hashlib.sha256(file).hexdigest()


def _upgrade(content: dict[str, Any]) -> None:
    """Convert an older schema: 3 has all of this one, and 2 stored only the bounds of the rates."""
    older, content["schema"] = content["schema"], SCHEMA
    if older == 3:
        return
    alpha, rates = content["gate"].pop("alpha"), dict(content["gate"])
    now = recorded_bounds()
    bounds = {name: rates if now[name] == asdict(RATE) else now[name] for name in now}
    content["gate"] = {**bounds, "alpha": alpha}


def write(
    path: Path, header: Header, records: Mapping[str, Record], kept: Examples | None = None
) -> None:
    """Write a baseline atomically, with digests of ``records``. Raises ``BaselineError``.

    ``kept`` are its examples; without them, those that are there stay.
    """
    # The examples first: after a crash between the two, the older baseline names them as others.
    files = {} if kept is None else {examples_of(path): kept.text}
    header = msgspec.structs.replace(
        header,
        problem_set=_problem_set(records),
        anchor=msgspec.structs.replace(header.anchor, digest=_anchor_digest(records)),
        examples=header.examples if kept is None else digest(kept.text),
        **means(records),
    )
    problems = {name: msgspec.to_builtins(record) for name, record in sorted(records.items())}
    content = msgspec.to_builtins(header)
    content["checksum"] = checksum({**content, "problems": problems})
    head = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True)
    lines = (
        f"  {json.dumps(name)}: {json.dumps(record, sort_keys=True)}"
        for name, record in problems.items()
    )
    text = head.removesuffix("\n}") + ',\n "problems": {\n' + ",\n".join(lines) + "\n }\n}\n"
    try:
        _replace({**files, path: text})
    except OSError as error:
        raise BaselineError(
            f"nothing is recorded: {path} cannot be written ({one_line(error)}): make room there, "
            "or name another folder with --grpo-baselines"
        ) from error


def _replace(texts: Mapping[Path, str]) -> None:
    """Write files, in order, once all of them are on the disk under other names."""
    written: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written[path] = Path(name)
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
        for path, half in written.items():
            half.replace(path)
    except BaseException:
        for half in written.values():
            half.unlink(missing_ok=True)
        raise


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. A duplicate name is an error: a bad merge can leave both sides."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """Return a digest of everything in a baseline file, except this digest."""
    sealed = {name: value for name, value in content.items() if name != "checksum"}
    return digest(json.dumps(sealed, sort_keys=True))


def means(records: Mapping[str, Record]) -> dict[str, float]:
    """Return the header's means over all completions; they reveal edited lines."""
    drawn = sum(record.k for record in records.values())
    sums = {"accuracy": "correct", "mean_reward": "reward", "mean_length": "length"}
    # fsum, because the sum must not depend on the order of the records.
    return {
        mean: math.fsum(getattr(record, name) for record in records.values()) / drawn
        for mean, name in sums.items()
    }


def _check(header: Header, records: Mapping[str, Record], path: Path) -> None:
    """Raise ``ValueError`` if a header does not match its records or its file name."""
    if not records or header.problem_set != _problem_set(records):
        raise ValueError("its problems are not those that were recorded")
    if header.task_type != path.stem:
        raise ValueError(f"it is of the task type {header.task_type!r}")
    if header.anchor.digest != _anchor_digest(records):
        raise ValueError("its anchor is not the one that was recorded")
    for name, mean in means(records).items():
        if (told := getattr(header, name)) != mean:
            raise ValueError(f"{name} is {told!r}, and its problems make it {mean!r}")


def _problem_set(records: Iterable[str]) -> str:
    return digest("\n".join(sorted(records)))


def _anchor_digest(records: Mapping[str, Record]) -> str:
    # Reveals a change of the anchor's counts between two recordings.
    counts = (f"{name} {record.anchor}/{record.anchor_k}" for name, record in records.items())
    return digest("\n".join(sorted(counts)))


def prompt_digest(prompt: str) -> str:
    """Return a digest of a prompt as the policy sees it, short enough for the file."""
    return digest(prompt)[:12]


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the conditions or bounds that are others than before, with both values."""
    return [
        f"{escape(name)} was {short(then.get(name))} and is {short(now.get(name))}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
    ]


def short(value: object) -> str:
    """Return a value for a message: of a digest its beginning."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else escape(text)
