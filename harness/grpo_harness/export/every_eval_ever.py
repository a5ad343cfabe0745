"""Every Eval Ever's records: one for each policy on each task type, with its samples beside it.

The format is schema 0.3.0 of https://evalevalai.com: ``ID.json`` has the results, and
``ID_samples.jsonl`` a line for each completion and result. They lie where the project's datastore
has them, in ``data/grpo-harness/DEVELOPER/MODEL``.
"""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from grpo_harness.atomic import replace
from grpo_harness.export.scores import (
    NO_COMPLETION,
    Score,
    file_name,
    identity,
    portable,
    scores,
    started,
)
from grpo_harness.report.schema import Completion, Content, Evaluation
from grpo_harness.text import digest

SCHEMA: Final = "0.3.0"

_LIBRARY = "grpo-harness"

_METRICS = {
    "accuracy": {"metric_unit": "proportion", "min_score": 0, "max_score": 1},
    "strict_accuracy": {"metric_unit": "proportion", "min_score": 0, "max_score": 1},
    "tokens": {"metric_unit": "tokens", "min_score": 0, "max_score": "Infinity"},
}
_REWARD = {"metric_unit": "points", "min_score": "-Infinity", "max_score": "Infinity"}

_SUMMED = ("strict_accuracy", "tokens")
"""Results without rows of their own: the others' rows tell them too."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|data|unknown", re.IGNORECASE)
"""Names that the datastore, or Windows, does not have for folders."""


def write(content: Content, folder: Path) -> list[Path]:
    """Write the evaluations of a report as records with their samples, and return all paths.

    The id of a record is a digest of the evaluation and its run, so that a record of another is
    never replaced. Raises ``ExportError``.
    """
    content = portable(content)
    written = []
    for evaluation in content.evaluations:
        record = _record(content, evaluation)
        key = uuid.UUID(identity(content.run, evaluation)[:32], version=4)
        place = Path("data", _LIBRARY, *record["model_info"]["id"].split("/"))
        files = {}
        if lines := _lines(_rows(evaluation, record)):
            samples = place / f"{key}_samples.jsonl"
            record["detailed_evaluation_results"] = {
                "format": "jsonl",
                "file_path": samples.as_posix(),
                "hash_algorithm": "sha256",
                "checksum": digest(lines),
                "total_rows": lines.count("\n"),
            }
            files[samples] = lines
        files[place / f"{key}.json"] = _lines([record])
        (folder / place).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            replace(folder / path, text)
            written.append(folder / path)
    return written


def _lines(values: Iterable[Any]) -> str:
    """Return values as JSON Lines, in ASCII: some texts have line breaks of other kinds."""
    return "".join(f"{json.dumps(value, allow_nan=False)}\n" for value in values)


def _record(content: Content, evaluation: Evaluation) -> dict[str, Any]:
    begun = started(content.run)
    model = _model(evaluation)
    served = evaluation.engine.get("engine") == "server"
    # The record is made of the run's own report: the same report makes the same record.
    seconds = str(begun.timestamp() + (content.run.seconds or 0))
    return {
        "schema_version": SCHEMA,
        "evaluation_id": f"{evaluation.task_type}/{model}/{seconds}",
        "evaluation_timestamp": begun.isoformat(),
        "retrieved_timestamp": seconds,
        "source_metadata": {
            "source_name": _LIBRARY,
            "source_type": "evaluation_run",
            "source_organization_name": "local",
            "evaluator_relationship": "first_party",
            "additional_details": _texts({"commit": content.run.commit, "seed": content.run.seed}),
        },
        "eval_library": {
            "name": _LIBRARY,
            "version": content.environment.get(_LIBRARY) or "unknown",
            "additional_details": _texts(content.environment),
        },
        "model_info": {
            "name": evaluation.policy,
            "id": model,
            "developer": model.split("/")[0],
            "additional_details": {
                "deployment_type": "unknown" if served else "self_deployed",
                "model_availability": "unknown",
                "fingerprint": evaluation.fingerprint,
                **_texts(evaluation.engine),
            },
        },
        "evaluation_results": [_result(content, evaluation, score) for score in scores(evaluation)],
    }


def _model(evaluation: Evaluation) -> str:
    """Return the policy as ``DEVELOPER/MODEL``: its id on the Hugging Face Hub, or a local one."""
    parts = evaluation.policy.split("/")
    if len(parts) == 2 and all(p == file_name(p) and not _RESERVED.fullmatch(p) for p in parts):
        return evaluation.policy
    name = file_name(evaluation.slug)
    return f"local/policy-{name}" if _RESERVED.fullmatch(name) else f"local/{name}"


def _result(content: Content, evaluation: Evaluation, score: Score) -> dict[str, Any]:
    sampling = evaluation.sampling
    asked = {
        "temperature": 0.0 if sampling.get("greedy") else sampling.get("temperature"),
        "top_p": sampling.get("top_p"),
        "top_k": sampling.get("top_k"),
        "max_tokens": sampling.get("max_new_tokens"),
    }
    sizes = {"problems": evaluation.n, "samples": evaluation.k, "seed": evaluation.run_seed}
    found: dict[str, Any] = {"score": score.mean, "details": _texts(sizes)}
    if score.stderr is not None:
        found["uncertainty"] = {
            "standard_error": {"value": score.stderr, "method": "analytic, clustered by problem"},
            "num_samples": evaluation.n * evaluation.k,
        }
    if score.name == "accuracy":
        found["details"] |= _texts(evaluation.outcomes | _verdicts(content, evaluation))
    return {
        "evaluation_result_id": score.name,
        "evaluation_name": evaluation.task_type,
        "source_data": {"dataset_name": evaluation.task_type, "source_type": "other"},
        "metric_config": {
            "metric_id": score.name if score.name == "accuracy" else f"{_LIBRARY}.{score.name}",
            "metric_name": score.name,
            "lower_is_better": score.name == "tokens",
            "score_type": "continuous",
            **_METRICS.get(score.name, _REWARD),
        },
        "score_details": found,
        "generation_config": {
            "generation_args": {name: value for name, value in asked.items() if value is not None},
            "additional_details": _texts(sampling),
        },
    }


def _verdicts(content: Content, evaluation: Evaluation) -> dict[str, str]:
    return {
        f"verdict: {check.title}": f"{check.verdict}: {check.reason}"
        for check in content.checks
        if (check.policy, check.task_type) == (evaluation.policy, evaluation.task_type)
    }


def _rows(evaluation: Evaluation, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each completion and each result that it counts in."""
    shared = {
        "schema_version": SCHEMA,
        "evaluation_id": record["evaluation_id"],
        "model_id": record["model_info"]["id"],
        "evaluation_name": evaluation.task_type,
        "interaction_type": "single_turn",
        "answer_attribution": [],
    }
    measured = scores(evaluation)
    for problem in evaluation.problems:
        reference = [] if problem.wanted is None else [problem.wanted]
        asked = {
            **shared,
            "sample_id": problem.id,
            "sample_hash": digest(problem.prompt + "".join(reference)),
            "input": {"raw": problem.prompt, "reference": reference},
        }
        for epoch, completion in enumerate(problem.completions, start=1):
            values = {score.name: score.of(completion) for score in measured}
            told = _told(epoch, completion) | values
            counted = [n for n, value in values.items() if value is not None and n not in _SUMMED]
            for name in counted or ["tokens"]:
                yield {
                    **asked,
                    "evaluation_result_id": name,
                    "output": {"raw": [completion.text]},
                    "evaluation": {
                        "score": values[name],
                        "is_correct": completion.outcome == "correct",
                    },
                    "error": NO_COMPLETION if completion.outcome == "error" else None,
                    "metadata": _texts(told),
                }


def _told(epoch: int, completion: Completion) -> dict[str, Any]:
    logged = {f"logged/{name}": value for name, value in completion.logged.items()}
    return {**logged, "epoch": epoch, "outcome": completion.outcome}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as the texts that the schema asks for; null is left out."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }
