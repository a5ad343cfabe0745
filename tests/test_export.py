"""A report in the formats of other tools: complete, joined, in its place, and read by the tools."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
import pytest

from grpo_harness.cli import main
from grpo_harness.export import every_eval_ever
from grpo_harness.export.scores import ExportError, _mean, clustered_stderr, portable
from grpo_harness.report.schema import Completion, Content, Evaluation, Problem, Side

ROOT = Path(__file__).parents[1]
HALF = "half \ud800 of a pair, a line\u2028break, NUL \x00, <|im_end|> and \U0001f600"
HEAVY = pytest.mark.heavy  # it installs the tool, in an environment of its own

OUTCOMES = ("correct", "wrong", "unparsable", "truncated", "error")


def completion(draw, rewards=("short", "right"), **changes):
    outcome = draw.choice(OUTCOMES)
    scored = {name: draw.choice([0.25, -1.5, 2]) for name in rewards}
    about = {"strict": outcome == "correct" and draw.random() < 0.5, "reward": sum(scored.values())}
    text, tokens = f"answer {draw.random()}", draw.randint(1, 64)
    values = {"text": text, "tokens": tokens, "outcome": outcome, "rewards": scored}
    return Completion(**{**values, **about, **changes})


def evaluation(policy="nano-trained", task="gcd", n=6, k=4, seed=0, groups=None, **changes):
    draw = random.Random(ascii((policy, task, seed)))
    groups = groups or [[completion(draw) for _ in range(k)] for _ in range(n)]
    side = Side(k=k, correct=0, truncated=0, unparsable=0, tokens=1.0, reward=None)
    problems = [
        Problem(
            id=f"{task}-{i}",
            prompt=f"{task} {i}?",
            wanted=str(i) if i % 2 else None,
            then=None,
            now=side,
            completions=list(group),
        )
        for i, group in enumerate(groups)
    ]
    drawn = [each for group in groups for each in group]
    values = {
        "policy": policy,
        "slug": re.sub(r"\W", "-", policy),
        "fingerprint": "f00d",
        "task_type": task,
        "n": len(groups),
        "planned": len(groups),
        "k": k,
        "run_seed": 7,
        "sampling": {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 64, "greedy": False},
        "engine": {"engine": "transformers", "device": "cpu"},
        "accuracy": fmean(each.outcome == "correct" for each in drawn),
        "strict_accuracy": fmean(each.strict for each in drawn),
        "mean_reward": fmean(each.reward for each in drawn if each.reward is not None),
        "mean_length": fmean(each.tokens for each in drawn),
        "metrics": {},
        "outcomes": {o: fmean(each.outcome == o for each in drawn) for o in OUTCOMES},
        "problems": problems,
    }
    return Evaluation(**{**values, **changes})


def content(*evaluations, started="2026-11-29T14:51:53+00:00"):
    run = {
        "base": "b",
        "trained": ["t"],
        "problems": 6,
        "samples": 4,
        "sampling": {},
        "baselines": "baselines",
        "seed": 7,
        "started": started,
        "seconds": 10.5,
        "commit": "c0ffee",
    }
    whole = {
        "schema": 3,
        "status": "finished",
        "run": run,
        "environment": {"python": "3.11", "grpo-harness": "0.1.0", "peft": None},
        "settings": {},
        "evaluations": msgspec.to_builtins(list(evaluations)),
        "checks": [],
        "curves": [],
        "tests": {"passed": 1, "failed": [], "not_run": []},
        "notices": [],
    }
    return msgspec.convert(whole, Content)


def records(folder):
    """Every record below a folder, with its rows."""
    found = []
    for path in sorted(folder.glob("data/*/*/*/*.json")):
        rows = path.with_name(f"{path.stem}_samples.jsonl")
        lines = rows.read_text(encoding="ascii").splitlines() if rows.exists() else []
        found.append((path, json.loads(path.read_text("ascii")), [json.loads(x) for x in lines]))
    return found


def test_the_standard_error_is_that_of_a_cluster_robust_regression():
    import statsmodels.api as sm

    draw = random.Random(1)
    for _ in range(20):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(2, 30))]
        groups = [[draw.gauss(i % 3, 1) for _ in range(size)] for i, size in enumerate(sizes)]
        values = np.concatenate(groups)
        cluster = {"groups": np.repeat(np.arange(len(sizes)), sizes)}
        model = sm.OLS(values, np.ones((len(values), 1)))
        robust = model.fit(cov_type="cluster", cov_kwds=cluster).bse[0]
        assert clustered_stderr(groups) == pytest.approx(robust)


def test_the_standard_error_of_equal_groups_is_that_of_their_means():
    groups = np.random.default_rng(2).normal(size=(40, 8))
    means = groups.mean(axis=1)
    expected = means.std(ddof=1) / math.sqrt(len(means))
    assert clustered_stderr([*map(list, groups), []]) == pytest.approx(expected)
    assert clustered_stderr([[1.0, 0.0], []]) is None


def test_scores_may_be_as_large_as_a_float():
    groups = [[1.0, 0.0], [0.5, 0.25], [1.0, 1.0]]
    large = [[1.7e308 * value for value in group] for group in groups]
    assert clustered_stderr(large) == pytest.approx(1.7e308 * clustered_stderr(groups))
    assert _mean([1.7e308, 1.7e308, 0.0]) == pytest.approx(1.7e308 / 3 * 2)


def test_every_completion_is_a_row_of_each_result_that_it_counts_in(tmp_path):
    draw = random.Random(3)
    groups = [[completion(draw) for _ in range(4)] for _ in range(5)]
    groups[0][0] = completion(draw, reward=None, rewards={"short": None, "right": None})
    whole = content(evaluation(groups=groups), evaluation(policy="org/model_1", task="sort"))
    paths = every_eval_ever.write(whole, tmp_path)
    found = records(tmp_path)
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(found) == 2
    for (path, record, rows), asked in zip(found, whole.evaluations, strict=True):
        results = {each["evaluation_result_id"]: each for each in record["evaluation_results"]}
        names = ["accuracy", "strict_accuracy", "reward", "reward/short", "reward/right", "tokens"]
        assert list(results) == names
        details = record["detailed_evaluation_results"]
        samples = tmp_path / details["file_path"]
        assert samples == path.with_name(f"{path.stem}_samples.jsonl")
        assert hashlib.sha256(samples.read_bytes()).hexdigest() == details["checksum"]
        assert details["total_rows"] == len(rows)
        expected = []
        for problem in asked.problems:
            for epoch, each in enumerate(problem.completions, 1):
                values = {"accuracy": each.outcome == "correct", "reward": each.reward}
                values |= {f"reward/{name}": value for name, value in each.rewards.items()}
                for name, value in values.items():
                    if value is not None:
                        key = (problem.id, str(epoch), name)
                        expected.append((*key, problem.prompt, each.text, value, each.outcome))
        told = [
            (
                row["sample_id"],
                row["metadata"]["epoch"],
                row["evaluation_result_id"],
                row["input"]["raw"],
                *row["output"]["raw"],
                row["evaluation"]["score"],
                row["metadata"]["outcome"],
            )
            for row in rows
        ]
        assert told == expected
        for name, result in results.items():
            own = [r["evaluation"]["score"] for r in rows if r["evaluation_result_id"] == name]
            if own:
                assert result["score_details"]["score"] == pytest.approx(fmean(own))
        for row in rows:
            assert row["evaluation"]["is_correct"] == (row["metadata"]["outcome"] == "correct")
            assert (row["error"] is not None) == (row["metadata"]["outcome"] == "error")
            assert row["evaluation_id"] == record["evaluation_id"]
            assert row["model_id"] == record["model_info"]["id"]


def test_texts_and_numbers_that_json_lacks_are_made_portable(tmp_path):
    draw = random.Random(4)
    odd = completion(draw, text=HALF, reward=math.nan, logged={HALF: [HALF, math.inf]})
    whole = content(evaluation(groups=[[odd], [completion(draw)]], k=1, mean_reward=math.nan))
    [each] = portable(whole).evaluations
    text = each.problems[0].completions[0].text
    assert text == HALF.replace("\ud800", "\\ud800")
    assert each.mean_reward is None
    every_eval_ever.write(whole, tmp_path)
    [(_, record, rows)] = records(tmp_path)
    assert "reward" not in {r["evaluation_result_id"] for r in record["evaluation_results"]}
    assert rows[0]["output"]["raw"] == [text]
    assert json.loads(rows[0]["metadata"][f"logged/{text}"]) == [text, None]


def test_a_length_that_is_no_number_is_one_line(tmp_path):
    with pytest.raises(ExportError, match="not finite"):
        every_eval_ever.write(content(evaluation(mean_length=math.nan)), tmp_path)
    with pytest.raises(ExportError, match="which is no time of ISO 8601"):
        every_eval_ever.write(content(evaluation(), started="soon"), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_an_evaluation_without_samples_is_a_record_without_rows(tmp_path):
    every_eval_ever.write(content(evaluation(problems=[], accuracy=None)), tmp_path)
    [(_, record, rows)] = records(tmp_path)
    assert rows == []
    assert "detailed_evaluation_results" not in record
    assert [each["evaluation_result_id"] for each in record["evaluation_results"]] == [
        "strict_accuracy",
        "reward",
        "tokens",
    ]


NAMES = {
    "nano-trained": "local/nano-trained",
    "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    "out/checkpoint-10/": "local/out-checkpoint-10",
    "/abs/run/checkpoint-10": "local/abs-run-checkpoint-10",
    "../../etc": "local/etc",
    "../x": "local/x",
    "data/x": "local/data-x",
    "con": "local/policy-con",
    "data": "local/policy-data",
    "a/b/c": "local/a-b-c",
    "…": "local/unnamed",
}


@pytest.mark.parametrize("policy", NAMES)
def test_no_name_of_a_policy_leads_out_of_its_folder(policy, tmp_path):
    own = evaluation(policy=policy, slug=policy, n=2)
    every_eval_ever.write(content(own), tmp_path / "out")
    [(path, record, _)] = records(tmp_path / "out")
    assert record["model_info"]["name"] == policy
    assert record["model_info"]["id"] == NAMES[policy]
    folder = tmp_path / "out" / "data" / "grpo-harness"
    assert path.parent == folder / NAMES[policy]
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_only_an_export_of_the_same_run_is_replaced(tmp_path):
    first = every_eval_ever.write(content(evaluation()), tmp_path)
    before = {path: path.read_bytes() for path in first}
    again = every_eval_ever.write(content(evaluation()), tmp_path)
    assert again == first
    assert {path: path.read_bytes() for path in first} == before
    later = content(evaluation(), started="2026-11-30T00:00:00+00:00")
    assert not set(every_eval_ever.write(later, tmp_path)) & set(first)
    assert not set(every_eval_ever.write(content(evaluation(seed=1)), tmp_path)) & set(first)
    assert {path: path.read_bytes() for path in first} == before


def saved(folder, whole):
    folder.mkdir(exist_ok=True)
    text = json.dumps(msgspec.to_builtins(whole))
    (folder / "report.json").write_text(text, encoding="ascii")
    return folder


def test_the_command_prints_the_files(tmp_path, capsys):
    report = saved(tmp_path / "report", content(evaluation()))
    out = tmp_path / "out"
    assert main(["export", "every-eval-ever", str(report), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(map(Path, printed)) == sorted(p for p in out.rglob("*") if p.is_file())


def test_what_is_missing_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    report = saved(tmp_path / "report", content(evaluation()))
    out = tmp_path / "out"
    for arguments, said in (
        (["inspect", str(report), "--out", str(out)], "pip install 'grpo-harness[inspect]'"),
        (["every-eval-ever", str(out), "--out", str(out)], "cannot be read"),
        (["every-eval-ever", str(report), "--out", str(report / "report.json")], "report.json"),
    ):
        assert main(["export", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("grpo-harness export: ")
        assert said in line
    assert not out.exists()


HOSTILE = content(
    evaluation(policy="org/model_1"),
    evaluation(policy="nano/../../trained/x", task="py_eval"),
    evaluation(policy="empty", problems=[], accuracy=None),
    evaluation(
        policy=HALF,
        task="sort",
        k=2,
        mean_reward=0.25,
        sampling={"greedy": True, "max_new_tokens": 8, "stop": [HALF]},
        groups=[
            [
                completion(random.Random(5), text=HALF, reward=math.nan, logged={HALF: HALF}),
                completion(random.Random(6), rewards={"short": None}, reward=0.25),
            ]
        ],
    ),
)


@HEAVY
def test_the_validator_of_every_eval_ever_accepts_the_records(tmp_path):
    # It asks for Python 3.12, but for nothing that 3.11 lacks.
    packages = tmp_path / "packages"
    how = ["--quiet", "--no-deps", "--ignore-requires-python", "--target", str(packages)]
    tool = f"every-eval-ever=={every_eval_ever.SCHEMA}"
    subprocess.run([sys.executable, "-m", "pip", "install", *how, tool], check=True)

    def validated():
        code = "import sys; from every_eval_ever.validate import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "--format", "json", "data/*/*/*/*.json*"]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return ran.returncode, json.loads(ran.stdout)

    paths = every_eval_ever.write(HOSTILE, tmp_path)
    status, told = validated()
    assert status == 0, told
    assert {each["file"] for each in told} == {str(p.relative_to(tmp_path)) for p in paths}
    assert sum(each["line_count"] for each in told) == sum(len(r) for *_, r in records(tmp_path))
    samples = next(path for path in paths if path.suffix == ".jsonl")
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[1:]))
    status, told = validated()
    assert status == 1
    assert any("total_rows does not match" in str(each["errors"]) for each in told)


PROBE = """
import json, sys

from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries
from inspect_ai.log import recompute_metrics

found = []
for info in list_eval_logs(sys.argv[1]):
    log = read_eval_log(info, resolve_attachments=True)
    said = log.model_dump(mode="json", include={"eval", "results", "samples", "status", "stats"})
    said["listed"] = [info.task, info.task_id]
    said["summaries"] = len(read_eval_log_sample_summaries(info.name))
    if log.samples:
        recompute_metrics(log)
    said["again"] = log.results.model_dump(mode="json")
    found.append(said)
print(json.dumps(found))
"""


@HEAVY
def test_inspect_reads_its_logs(tmp_path):
    python = environment_of_inspect(tmp_path / "environment")
    report = saved(tmp_path / "report", HOSTILE)
    out = tmp_path / "logs"

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "harness")}
        ran = subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        return ran.stdout

    export = ("-m", "grpo_harness.cli", "export", "inspect", str(report), "--out", str(out))
    printed = run(*export).splitlines()
    assert sorted(map(str, out.iterdir())) == sorted(printed)
    assert run(*export).splitlines() == printed
    logs = json.loads(run("-c", PROBE, str(out)))
    assert len(logs) == len(printed) == len(HOSTILE.evaluations)
    by_policy = {log["eval"]["model"]: log for log in logs}
    for asked in portable(HOSTILE).evaluations:
        told(by_policy[asked.policy], asked)


def told(log, asked):
    """What a log of inspect_ai says is what the report says."""
    spec, samples = log["eval"], log["samples"] or []
    assert log["status"] == "success"
    assert log["listed"] == [asked.task_type.replace("_", "-"), spec["task_id"]]
    assert log["summaries"] == len(samples) == sum(len(p.completions) for p in asked.problems)
    assert spec["created"] == log["stats"]["started_at"] == "2026-11-29T14:51:53+00:00"
    assert spec["model_args"]["fingerprint"] == asked.fingerprint
    assert spec["config"]["epochs"] == asked.k
    assert spec["revision"]["commit"] == "c0ffee"
    config = spec["model_generate_config"]
    assert config["seed"] == asked.run_seed
    assert config["max_tokens"] == asked.sampling["max_new_tokens"]
    assert config["temperature"] == (0.0 if asked.sampling["greedy"] else 0.8)
    by_id = {(sample["id"], sample["epoch"]): sample for sample in samples}
    for problem in asked.problems:
        for epoch, each in enumerate(problem.completions, 1):
            sample = by_id[problem.id, epoch]
            assert sample["input"] == sample["messages"][0]["content"] == problem.prompt
            assert sample["target"] == (problem.wanted or "")
            assert sample["output"]["choices"][0]["message"]["content"] == each.text
            stop = "max_tokens" if each.outcome == "truncated" else "stop"
            assert sample["output"]["choices"][0]["stop_reason"] == stop
            assert sample["metadata"] == {"outcome": each.outcome, "logged": each.logged}
            assert (sample["error"] is not None) == (each.outcome == "error")
            numbers = {"reward": each.reward, "tokens": each.tokens}
            numbers |= {f"reward/{name}": value for name, value in each.rewards.items()}
            for name, value in numbers.items():
                assert finite(sample["scores"][name]["value"]) == value
            right = {"accuracy": each.outcome == "correct", "strict_accuracy": each.strict}
            for name, value in right.items():
                assert sample["scores"][name]["value"] == ("C" if value else "I")
    figures = metrics(log["results"])
    assert figures.get("accuracy", {}).get("accuracy") == asked.accuracy
    assert figures["reward"]["mean"] == asked.mean_reward
    assert figures["tokens"]["mean"] == asked.mean_length
    if len(asked.problems) > 1:
        again = metrics(log["again"])
        assert again.keys() == figures.keys()
        for name, values in figures.items():
            assert again[name] == pytest.approx(values), name


def metrics(results):
    return {
        score["name"]: {name: of["value"] for name, of in score["metrics"].items()}
        for score in results["scores"]
    }


def finite(value):
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def environment_of_inspect(folder):
    """Make an environment with inspect_ai over the packages of the tests; return its Python.

    inspect_ai asks for an older fsspec and python-dateutil than the locked ones.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout
    shared = [path for path in sys.path if path.endswith("site-packages")]
    assert sysconfig.get_path("purelib") in shared
    Path(own.strip(), "tests.pth").write_text("\n".join(shared) + "\n")
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    kept = [line for line in lock if not line.startswith(("fsspec==", "python-dateutil=="))]
    (folder / "kept.txt").write_text("\n".join(kept))
    how = ["--quiet", "--disable-pip-version-check", "-c", str(folder / "kept.txt")]
    subprocess.run([python, "-m", "pip", "install", *how, "inspect-ai==0.3.285"], check=True)
    return python
