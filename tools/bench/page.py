"""Measure the page of a large run: its size, how long it takes to write and to open.

``python -m tools.bench.page`` makes a report of 12 rows with 256 problems and 8 completions each,
and opens its page in a headless Chromium (``make browser``). Repeated, the least time counts.
"""

import os
import random
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from grpo_harness.report.files import write
from grpo_harness.report.report import Report
from grpo_harness.report.schema import Completion, Kept, Problem, Side
from grpo_harness.rewards.outcome import Outcome

ROWS, PROBLEMS, SAMPLES, CHARACTERS = 12, 256, 8, 200
TIMES = 5


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report, began = _report(), time.perf_counter()
        write(report, folder)
        seconds = time.perf_counter() - began
        page = folder / "report.html"
        print(f"{ROWS} rows x {PROBLEMS} problems x {SAMPLES} completions")  # noqa: T201
        print(f"written in {seconds:.2f} s: page {page.stat().st_size / 1e6:.1f} MB")  # noqa: T201
        print(f"opened in {min(_opened(page) for _ in range(TIMES)):.2f} s")  # noqa: T201


def _report() -> Report:
    rng = random.Random(0)
    run = {
        "base": "base",
        "trained": ["trained"],
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "sampling": {},
        "baselines": "baselines",
        "seed": 1,
        "started": "",
        "seconds": 1.0,
        "commit": None,
    }
    tasks = [f"task{number}" for number in range(ROWS)]
    report = Report(run, tasks, ["trained"], "finished")
    for task in tasks:
        report.add(_evaluation(task))
        report.problems["trained", task] = [_problem(rng, f"{task}-{i}") for i in range(PROBLEMS)]
    return report


def _evaluation(task: str) -> dict[str, object]:
    return {
        "kind": "evaluation",
        "policy": "trained",
        "slug": "trained",
        "fingerprint": "",
        "task_type": task,
        "n": PROBLEMS,
        "planned": PROBLEMS,
        "k": SAMPLES,
        "run_seed": 1,
        "sampling": {},
        "engine": {},
        "accuracy": 0.5,
        "strict_accuracy": 0.5,
        "mean_reward": 0.0,
        "mean_length": 50.0,
        "metrics": {},
        "slices": [],
        "outcomes": {"correct": 0.5, "truncated": 0.0},
    }


def _problem(rng: random.Random, name: str) -> Problem:
    completions = [_completion(rng) for _ in range(SAMPLES)]
    right = sum(of.outcome == "correct" for of in completions)
    now = Side(k=SAMPLES, correct=right, truncated=0, unparsable=0, tokens=50.0, reward=0.0)
    then = Side(k=64, correct=rng.randrange(65), truncated=0, unparsable=0, tokens=50, reward=0)
    kept = [Kept(text=_text(rng), outcome="correct"), Kept(text=_text(rng), outcome="wrong")]
    return Problem(
        id=name, prompt=_text(rng), wanted="1", then=then, now=now, kept=kept,
        completions=completions,
    )  # fmt: skip


def _completion(rng: random.Random) -> Completion:
    outcome: Outcome = rng.choice(["correct", "wrong"])
    return Completion(text=_text(rng), tokens=50, outcome=outcome, strict=False, reward=0.0)


def _text(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghij      <&\n", k=CHARACTERS))


def _opened(page: Path) -> float:
    """Return the seconds until a browser has loaded and laid out a page."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get("about:blank")
        began = time.perf_counter()
        browser.get(page.as_uri())  # returns after the page's load event
        browser.execute_script("return document.body.offsetHeight")
        return time.perf_counter() - began
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
