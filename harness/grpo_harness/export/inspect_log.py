"""inspect_ai's logs: one ``.eval`` file for each policy on each task type.

They are made by inspect_ai's own API. A problem is a sample, and each of its completions an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_harness.export.scores import (
    NO_COMPLETION,
    ExportError,
    Score,
    file_name,
    identity,
    portable,
    scores,
    started,
)
from grpo_harness.report.schema import Check, Completion, Content, Evaluation, Problem
from grpo_harness.text import escape, one_line

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalResults, EvalSample, EvalSpec

_RIGHT = ("accuracy", "strict_accuracy")
"""The scores that are right or wrong; the others are numbers."""


def write(content: Content, folder: Path) -> list[Path]:
    """Write the evaluations of a report as logs of inspect_ai, and return their paths.

    A log has a name such as inspect_ai gives: time, task, policy and an id. The id is a digest of
    the evaluation and its run, so that a log of another is never replaced. Raises ``ExportError``.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError:
        raise ExportError(
            "logs of inspect_ai need the package inspect_ai: run "
            "`pip install 'grpo-harness[inspect]'`"
        ) from None
    content = portable(content)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for evaluation in content.evaluations:
        try:
            log = _log(content, evaluation)
        except ValueError as error:  # pydantic's own error is one
            raise ExportError(
                f"{escape(evaluation.policy)} on {escape(evaluation.task_type)} is nothing that "
                f"inspect_ai can hold ({one_line(error)})"
            ) from error
        parts = (evaluation.task_type, evaluation.slug, log.eval.task_id)
        name = "_".join(file_name(part).replace("_", "-") for part in parts)
        path = folder / f"{started(content.run):%Y-%m-%dT%H-%M-%S+00-00}_{name}.eval"
        write_eval_log(log, path)
        written.append(path)
    return written


def _log(content: Content, evaluation: Evaluation) -> EvalLog:
    from inspect_ai.log import EvalLog, EvalPlan, EvalPlanStep, EvalStats

    begun = started(content.run)
    ended = begun + timedelta(seconds=content.run.seconds or 0)
    measured = scores(evaluation)
    spec = _spec(content, evaluation, measured)
    return EvalLog(
        status="success",
        eval=spec,
        plan=EvalPlan(steps=[EvalPlanStep(solver="generate")], config=spec.model_generate_config),
        results=_results(evaluation, measured),
        stats=EvalStats(started_at=begun.isoformat(), completed_at=ended.isoformat()),
        samples=[
            _sample(evaluation, problem, epoch, completion, measured)
            for problem in evaluation.problems
            for epoch, completion in enumerate(problem.completions, start=1)
        ],
    )


def _spec(content: Content, evaluation: Evaluation, measured: Sequence[Score]) -> EvalSpec:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalRevision, EvalSpec
    from inspect_ai.model import GenerateConfig

    run, sampling = content.run, evaluation.sampling
    key = identity(run, evaluation)
    return EvalSpec(
        created=started(run).isoformat(),
        task=evaluation.task_type,
        task_id=key[:22],
        eval_id=key[22:44],
        dataset=EvalDataset(
            name=evaluation.task_type,
            samples=evaluation.n,
            sample_ids=[problem.id for problem in evaluation.problems],
            shuffled=False,
        ),
        model=evaluation.policy,
        model_args={"fingerprint": evaluation.fingerprint, **evaluation.engine},
        model_generate_config=GenerateConfig(
            temperature=0.0 if sampling.get("greedy") else sampling.get("temperature"),
            top_p=sampling.get("top_p"),
            top_k=sampling.get("top_k"),
            max_tokens=sampling.get("max_new_tokens"),
            stop_seqs=sampling.get("stop"),
            seed=evaluation.run_seed,
        ),
        config=EvalConfig(epochs=evaluation.k, epochs_reducer=["mean"]),
        revision=EvalRevision(type="git", origin="", commit=run.commit) if run.commit else None,
        packages={name: of for name, of in content.environment.items() if of is not None},
        scorers=[
            {"name": score.name, "metrics": [{"name": f"inspect_ai/{m}"} for m in _metrics(score)]}
            for score in measured
        ],
        metadata={
            "run": {"status": content.status, "seed": run.seed},
            "planned": evaluation.planned,
            "sampling": sampling,
            "outcomes": evaluation.outcomes,
            "metrics": evaluation.metrics,
            "checks": [_check(check) for check in content.checks if _is_of(check, evaluation)],
        },
    )


def _is_of(check: Check, evaluation: Evaluation) -> bool:
    return (check.policy, check.task_type) == (evaluation.policy, evaluation.task_type)


def _check(check: Check) -> dict[str, str]:
    return {
        "title": check.title,
        "against": check.against,
        "verdict": check.verdict,
        "reason": check.reason,
    }


def _metrics(score: Score) -> tuple[str, str]:
    return ("accuracy" if score.name in _RIGHT else "mean", "stderr")


def _results(evaluation: Evaluation, measured: Sequence[Score]) -> EvalResults:
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    drawn = [completion for problem in evaluation.problems for completion in problem.completions]
    return EvalResults(
        total_samples=evaluation.n * evaluation.k,
        completed_samples=sum(completion.outcome != "error" for completion in drawn),
        scores=[
            EvalScore(
                name=score.name,
                scorer=score.name,
                reducer="mean",
                metrics={
                    name: EvalMetric(name=name, value=value)
                    for name, value in zip(_metrics(score), (score.mean, score.stderr), strict=True)
                    if value is not None
                },
            )
            for score in measured
        ],
    )


def _sample(
    evaluation: Evaluation,
    problem: Problem,
    epoch: int,
    completion: Completion,
    measured: Sequence[Score],
) -> EvalSample:
    from inspect_ai.log import EvalError, EvalSample
    from inspect_ai.model import ChatMessageUser, ModelOutput

    cut = completion.outcome == "truncated"
    output = ModelOutput.from_content(
        evaluation.policy, completion.text, "max_tokens" if cut else "stop"
    )
    failed = completion.outcome == "error"
    return EvalSample(
        id=problem.id,
        epoch=epoch,
        input=problem.prompt,
        target=problem.wanted or "",
        messages=[ChatMessageUser(content=problem.prompt), output.message],
        output=output,
        scores={score.name: _score(score, completion) for score in measured},
        metadata={"outcome": completion.outcome, "logged": completion.logged},
        error=EvalError(message=NO_COMPLETION, traceback="", traceback_ansi="") if failed else None,
    )


def _score(score: Score, completion: Completion) -> Any:
    from inspect_ai.scorer import CORRECT, INCORRECT
    from inspect_ai.scorer import Score as InspectScore

    value = score.of(completion)
    if value is None:
        return InspectScore.unscored(explanation="it does not apply")
    if score.name not in _RIGHT:
        return InspectScore(value=value)
    return InspectScore(
        value=CORRECT if value else INCORRECT,
        answer=completion.text,
        explanation=completion.outcome,
    )
