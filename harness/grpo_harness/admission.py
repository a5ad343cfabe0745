"""Does a server serve the policy that it is said to serve?

The server's log-probabilities of some dozens of texts must be those of the checkpoint's own
weights, within what half precision changes; and the tokens that it draws at a high temperature
must be as often the likeliest ones as they should be. A server that tells no log-probabilities is
compared by its completions, as a trained policy with its base. What the weights say is recorded
with the baselines, so that later runs need no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from grpo_harness import checks
from grpo_harness.canaries import FOLDER, Canaries, asked_digest, load, write
from grpo_harness.engines.engine import EngineError
from grpo_harness.evaluation import evaluate
from grpo_harness.gate.bounds import MINIMUM_PROBLEMS
from grpo_harness.rules import RULES, Terms
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.engines.likelihood import Scores
    from grpo_harness.engines.server import ServerEngine
    from grpo_harness.engines.transformers import TransformersEngine
    from grpo_harness.policy import Policy
    from grpo_harness.session import Session

_TEXTS = 48
"""Texts that are scored; a third of them in half precision too."""

_TOLERANCE = 2.5
"""So many times what half precision changes is the most that a server may differ."""

_TEMPERATURE, _DRAWS = 2.0, 18
"""The temperature of the tokens that are drawn, and how many after each prompt."""

_SIGMAS = 4.5
"""Standard errors that are no chance: once in 150,000."""

_ALPHA = 0.005
_PROBLEMS, _SAMPLES = 128, 4


@dataclass(frozen=True)
class Admission:
    """Whether a server may draw for a policy, and why."""

    policy: str
    verdict: Literal["PASS", "FAIL", "UNPROVEN"]
    reason: str

    def message(self) -> str:
        """Return the result in a line."""
        return f"{self.verdict}: {escape(self.policy)} as served: {self.reason}"


def admit(session: Session, policy: Policy) -> Admission:
    """Compare a served policy with its checkpoint. Raises ``HarnessError``."""
    from grpo_harness.engines.likelihood import PromptError, by_server
    from grpo_harness.engines.server import ServerEngine

    engine = session.engine(policy)
    if not isinstance(engine, ServerEngine):
        raise EngineError(
            f"{policy.checkpoint} is not served: name its server by --grpo-serve-trained URL or in "
            "[tool.grpo-harness.serve]"
        )

    def found(verdict: Literal["PASS", "FAIL", "UNPROVEN"], reason: str) -> Admission:
        return Admission(policy.name, verdict, reason)

    prompts, texts = _texts(session, policy)
    canaries = _canaries(session, policy, prompts, texts)
    try:
        scores = by_server(engine, texts)
    except PromptError as error:
        how = "cuts prompts" if error.read < error.given else "adds to prompts, or alters them"
        return found("FAIL", f"it {how}: {error}; compare its tokenizer, template and context")
    if scores is None:
        if fault := _temperature(engine, prompts, canaries):
            return found("FAIL", fault)
        return found(*_by_completions(session, engine, session.local(policy), policy))
    fault, said = _by_scores(session, policy, canaries, texts, scores)
    if not fault:
        fault = _context(engine, policy, session) or _temperature(engine, prompts, canaries)
    return found("FAIL", fault) if fault else found("PASS", said)


def record(session: Session, policy: Policy) -> Path:
    """Record what the weights of a policy say, so that it is admitted without them.

    Raises ``HarnessError``.
    """
    prompts, texts = _texts(session, policy)
    path = _path(session, policy)
    write(_measured(session, policy, prompts, texts), path)
    return path


def _path(session: Session, policy: Policy) -> Path:
    return session.settings.baselines / FOLDER / f"{policy.slug}.json"


def _canaries(
    session: Session, policy: Policy, prompts: Sequence[str], texts: Sequence[str]
) -> Canaries:
    """Return what was recorded of a policy's weights, or else what they say now."""
    recorded = load(_path(session, policy))
    asked = asked_digest(prompts, texts)
    if recorded is not None and recorded.are_of(str(policy.fingerprint), asked):
        return recorded
    return _measured(session, policy, prompts, texts)


def _measured(
    session: Session, policy: Policy, prompts: Sequence[str], texts: Sequence[str]
) -> Canaries:
    from grpo_harness.engines.likelihood import by_weights, likeliest

    local = session.local(policy)
    own, few = by_weights(local, texts), texts[: len(texts) // 3]
    with session.local(policy, coarse=True) as coarse:
        noise = _distance(own, by_weights(coarse, few))
    return Canaries(
        fingerprint=str(policy.fingerprint),
        asked=asked_digest(prompts, texts),
        temperature=_TEMPERATURE,
        noise=noise,
        scores=own,
        likeliest=likeliest(local, prompts, _TEMPERATURE),
    )


def _texts(session: Session, policy: Policy) -> tuple[list[str], list[str]]:
    """Return prompts of the run, and texts: each with its true answer behind it."""
    each = math.ceil(_TEXTS / len(session.task_types))
    asked = [session.questions(policy, source) for source in session.task_types]
    pairs = [
        (prompt, prompt + (questions.task_type.wanted(problem) or ""))
        for questions in asked
        for prompt, problem in list(zip(questions.prompts, questions.problems, strict=True))[:each]
    ]
    return [prompt for prompt, _ in pairs], [text for _, text in pairs]


def _distance(ours: Sequence[Scores], theirs: Sequence[Scores]) -> float:
    pairs = chain.from_iterable(zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=False))
    return fmean(abs(a - b) for a, b in pairs)


def _by_scores(
    session: Session,
    policy: Policy,
    canaries: Canaries,
    texts: Sequence[str],
    scores: Sequence[Scores],
) -> tuple[str, str]:
    """Return what is wrong with a server's scores, or an empty text, and what was compared."""
    from grpo_harness.engines.likelihood import by_weights

    own = canaries.scores
    most, distance = _TOLERANCE * canaries.noise + 1e-3, _distance(own, scores)
    said = (
        f"log-probabilities of {sum(map(len, own))} tokens differ by {distance:.2g} on average, "
        f"and half precision explains {most:.2g}"
    )
    if distance <= most:
        return "", said
    for role, number, _ in session.settings.policies():
        other = session.policy(role, number)
        same_tokens = other.fingerprint.tokenizer == policy.fingerprint.tokenizer
        if other.fingerprint.weights == policy.fingerprint.weights or not same_tokens:
            continue
        if _distance(by_weights(session.local(other), texts), scores) <= most:
            return f"it serves {escape(other.name)}: {said}", said
    return (
        f"{said}: it serves another checkpoint, such as a stale or quantized one, or reads other "
        "prompts"
    ), said


def _context(engine: ServerEngine, policy: Policy, session: Session) -> str:
    """Return what is wrong if a server cannot read the longest prompt with its completion."""
    from grpo_harness.engines.likelihood import PromptError, by_server

    asked = (session.questions(policy, source).prompts for source in session.task_types)
    longest = max(chain.from_iterable(asked), key=len)
    word = policy.tokenizer(" 1", add_special_tokens=False)["input_ids"]
    more = session.settings.sampling.max_new_tokens // len(word)
    try:
        scores = by_server(engine, [longest + " 1" * more])
    except PromptError as error:
        return f"it cuts long prompts: {error}; give the server a longer context"
    return "" if scores else "its context is too short for the longest prompt and its completion"


def _temperature(engine: ServerEngine, prompts: Sequence[str], canaries: Canaries) -> str:
    """Return what is wrong if tokens that are drawn are too often, or too rarely, the likeliest."""
    from grpo_harness.engines.likelihood import drawn_after

    temperature, best = canaries.temperature, canaries.likeliest
    drawn = drawn_after(engine, [prompt for prompt in prompts for _ in range(_DRAWS)], temperature)
    hits = [text == best[number // _DRAWS][0] for number, text in enumerate(drawn)]
    chances = [chance for _, chance in best for _ in range(_DRAWS)]
    error = math.sqrt(sum(p * (1 - p) for p in chances))
    if abs(sum(hits) - sum(chances)) <= _SIGMAS * error + 1:
        return ""
    greedy = all(hits) and "it draws greedily: "
    return (
        f"{greedy or ''}at temperature {temperature:g}, {sum(hits)} of {len(hits)} tokens are the "
        f"likeliest, and {sum(chances):.0f} should be: the server ignores or changes temperature, "
        "top_p or another setting, or applies one of its own, such as top_k"
    )


def _by_completions(
    session: Session, engine: ServerEngine, local: TransformersEngine, policy: Policy
) -> tuple[Literal["PASS", "FAIL", "UNPROVEN"], str]:
    """Compare completions of the server with those of the weights, on the smallest tasks."""
    tasks = [task.source for task in session.settings.answered()]
    length = {source.name: len(session.questions(policy, source).prompts[0]) for source in tasks}
    smallest = sorted(tasks, key=lambda source: length[source.name])[:2]
    asked = [len(session.questions(policy, source).problems) for source in smallest]
    if min([_PROBLEMS, *asked]) < MINIMUM_PROBLEMS or not smallest:
        return "UNPROVEN", "it tells no log-probabilities, and no task judges enough answers"
    ours, theirs = (
        [
            evaluate(
                session.questions(policy, source).first(_PROBLEMS),
                of.drawing(session.settings.task(source).sampling),
                k=1 if session.settings.task(source).sampling.greedy else _SAMPLES,
                run_seed=session.run_seed,
                store=session.store,
            )
            for source in smallest
        ]
        for of in (engine, local)
    )
    found = [
        checks.against_base(RULES["no_loss"], ours, theirs, Terms(_ALPHA)),
        checks.against_base(RULES["no_loss"], theirs, ours, Terms(_ALPHA)),
        checks.against_base(RULES["length"], ours, theirs, Terms(_ALPHA)),
    ]
    verdicts = {check.verdict for check in found}
    verdict: Literal["PASS", "FAIL", "UNPROVEN"] = (
        "FAIL" if "FAIL" in verdicts else "PASS" if verdicts == {"PASS"} else "UNPROVEN"
    )
    served, weights = (fmean(e.accuracy for e in side) for side in (ours, theirs))
    tokens = [fmean(e.mean_length for e in side) for side in (ours, theirs)]
    return verdict, (
        "it tells no log-probabilities, so that a small change goes unseen; accuracy of its "
        f"completions is {served:.1%}, and {weights:.1%} by the weights; their length is "
        f"{tokens[0]:.1f} and {tokens[1]:.1f} tokens"
    )
