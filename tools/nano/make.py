"""Make the nano pair again: ``python -m tools.nano.make [--out DIR]``, in under an hour.

Pre-training gives ``nano-base``, the recipe ``nano`` of :mod:`grpo_harness.training` makes
``nano-trained`` of it, and the recipe ``collapse`` shows how training can go wrong. Everything is
measured on held-out problems and written into the card. Seeds and two threads are fixed: the same
machine makes the same pair, another machine makes a similar one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import grpo_harness.nano
from grpo_harness.engines.engine import Sampling
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.evaluation import Evaluation, ask, evaluate
from grpo_harness.policy import load
from grpo_harness.store import Store
from grpo_harness.tasks import task_types
from grpo_harness.training import Row, TrainingRun, train
from grpo_harness.training import load as load_recipe
from tools.nano.card import Measured, write_card
from tools.nano.pretrain import Stage, add_bytes, new_model, pretrain
from tools.nano.tokenizer import build_tokenizer

THREADS = 2
INIT_SEED = 0
PROBLEMS, SAMPLES, RUN_SEED = 256, 4, 0

_EVEN = {"math": 46, "gcd": 18, "palindrome": 10, "reverse": 14, "py_eval": 20, "sort": 18}
# Arithmetic and sorting are learned last: the second stage is mostly theirs.
_HARD = {"math": 44, "gcd": 8, "palindrome": 6, "reverse": 12, "py_eval": 12, "sort": 22}

STAGES = (
    Stage("even", False, 1000, _EVEN, learning_rate=2e-3, warm_up=100, decay=2200, seed=1),
    Stage("hard", False, 500, _HARD, learning_rate=1.5e-3, warm_up=30, decay=500, seed=3),
    Stage("mixed", True, 200, _HARD, learning_rate=5e-4, warm_up=20, decay=200, seed=2),
)


def make_base(folder: Path) -> list[tuple[int, float]]:
    """Pre-train ``nano-base`` into ``folder``; return its curve: step and mean loss of 20 steps."""
    tokenizer = build_tokenizer()
    model = new_model(INIT_SEED)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []

    def progress(_: int, loss: float) -> None:
        recent.append(loss)
        if len(recent) == 20:
            curve.append((20 * (len(curve) + 1), sum(recent) / 20))
            recent.clear()
            _say(f"pre-training step {curve[-1][0]}: loss {curve[-1][1]:.3f}")

    for stage in STAGES:
        if stage.mixed:
            add_bytes(model, tokenizer, INIT_SEED)
        pretrain(model, tokenizer, stage, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return curve


def measure(folder: Path, name: str, store: Store) -> Measured:
    """Sample the policy in ``folder`` on the held-out problems of every type."""
    policy = load(str(folder))
    evaluations: dict[str, Evaluation] = {}
    engine = TransformersEngine(policy, Sampling())
    for task_type in task_types().values():
        questions = ask(policy, task_type, PROBLEMS, settings=engine.settings())
        evaluations[task_type.name] = evaluate(
            questions, engine, k=SAMPLES, run_seed=RUN_SEED, store=store
        )
        _say(f"{name} {task_type.name}: accuracy {evaluations[task_type.name].accuracy:.3f}")
    return Measured(name, evaluations)


def train_nano(recipe: str, base: Path, folder: Path) -> TrainingRun:
    """Run the named recipe from the base in ``base``."""

    def progress(row: Row) -> None:
        if row["step"] % 10 == 0:
            _say(f"{recipe} step {row['step']:.0f}: reward {row['reward']:+.3f}")

    chosen = load_recipe(recipe)
    run = train(
        chosen.with_values(model_name_or_path=str(base)), folder, device="cpu", progress=progress
    )
    # The base's name is the temporary path here; replace it by the real name.
    path = folder / "recipe.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["recipe"] = chosen.kept()
    record["base"]["name"] = chosen.policy
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for extra in ("log.json", "curves.csv", "curves.png", "resources.json"):
        (folder / extra).unlink()
    return run


def make(out: Path) -> None:
    """Make both policies and the card, and move them to ``out`` when all of it is done."""
    torch.set_num_threads(THREADS)
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making.", dir=out))
    try:
        curve = make_base(work / "base")
        pretrained = time.monotonic()
        run = train_nano("nano", work / "base", work / "trained")
        trained = time.monotonic()
        collapse = train_nano("collapse", work / "base", work / "collapse")
        measured = [
            measure(work / name, f"nano-{name}" if name != "collapse" else name, Store(work / "s"))
            for name in ("base", "trained", "collapse")
        ]
        minutes = {
            "pre-training": (pretrained - begin) / 60,
            "GRPO": (trained - pretrained) / 60,
            "collapse and measuring": (time.monotonic() - trained) / 60,
        }
        write_card(work, STAGES, curve, run, collapse, measured, minutes)
        for name in ("base", "trained", "CARD.md", "curves.png"):
            _replace(out / name, work / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"made in {(time.monotonic() - begin) / 60:.0f} minutes: {out}")


def _replace(old: Path, new: Path) -> None:
    if old.is_dir():
        shutil.rmtree(old)
    new.replace(old)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and make the pair."""
    parser = argparse.ArgumentParser(prog="python -m tools.nano.make", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(grpo_harness.nano.__file__).parent, help="output folder"
    )
    make(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
