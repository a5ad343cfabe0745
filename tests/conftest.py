"""A tiny real checkpoint, untrained, for everything that needs a policy and not its skill."""

import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import datasets  # noqa: F401 - imported anew in a test, it would register its types twice
import hypothesis
import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

# Loaded here although no test names them: pytester forgets what a run of its own has imported, and
# would import pandas and half of transformers again for each.
import grpo_harness.engines.shareable
import grpo_harness.engines.transformers
import grpo_harness.report.report
import grpo_harness.session  # noqa: F401
from grpo_harness.engines.engine import Sample
from grpo_harness.evaluation import ask, evaluate
from grpo_harness.policy.policy import load
from grpo_harness.rewards.functions import Reward, Rewards
from grpo_harness.rewards.rule import reward_func
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import task_types
from tests.projects import FILES, OWN_SUITE, Team
from tools.nano.tokenizer import build_tokenizer

ROOT = Path(__file__).parent.parent

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

pytest_plugins = ["pytester"]
collect_ignore = ["own_repository"]  # a repository of its own: see test_own_repository.py


@pytest.fixture(autouse=True)
def outside_ci(monkeypatch):
    """Tests record baselines in scratch folders, which the harness refuses to do in CI."""
    for name in ("CI", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def save_tiny(folder, seed=0, **config):
    """Write an untrained one-layer Qwen2 checkpoint of a given seed and return its folder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **config,
        )
    )
    # Larger weights than the usual initialisation's: the distribution is then far from uniform.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    # What the harness must not let in: a checkpoint's own taste in sampling.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=5.0,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_task_types(monkeypatch):
    """Task types that a test loads from files of its own end with the test."""
    monkeypatch.setattr("grpo_harness.tasks.sources._own", {})


@pytest.fixture(scope="session", name="save_tiny")
def save_tiny_fixture():
    """The function that writes an untrained checkpoint: ``save_tiny(folder, seed=0)``."""
    return save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of an untrained checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("policies") / "tiny")


@pytest.fixture(scope="session")
def tiny_policy(tiny):
    """An untrained policy."""
    return load(str(tiny))


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the untrained checkpoint to break."""
    return shutil.copytree(tiny, tmp_path / "copy")


class Answers:
    """An engine that answers gcd problems by the seed, ``skill`` of them correctly.

    Two runs differ, and each is repeatable.
    """

    def __init__(self, right, skill=0.4, temperature=0.8):
        self.right = right
        self.skill = skill
        self.temperature = temperature

    def settings(self):
        return {"temperature": self.temperature}

    def remarks(self):
        return {}

    def identity(self):
        return {"engine": "answers"}

    def sample(self, requests, progress=None):
        return [
            Sample(
                self.right[r.prompt] if r.seed % 1000 < 1000 * self.skill else "0",
                1 + r.seed % 7,
                r.seed // 1000 % 11 == 0,
            )
            for r in requests
        ]


@pytest.fixture
def answers(tiny_policy):
    """A function that makes an engine of a given skill: ``answers(skill=0.4, temperature=0.8)``."""
    gcd = task_types()["gcd"]
    right = {tiny_policy.render(p.prompt): str(p.answer) for p in gcd.problems(256)}

    return partial(Answers, right)


@pytest.fixture
def measure(tiny_policy, tmp_path, answers):
    """A function that evaluates the untrained policy on gcd with an engine of its own."""

    def measure(run_seed=1, n=8, k=3, engine=None, reward=reward_func):
        engine = engine or answers()
        gcd = task_types()["gcd"]
        questions = ask(
            tiny_policy, gcd, n, settings=engine.settings(), rewards=Rewards((Reward(reward),))
        )
        return evaluate(
            questions,
            engine,
            k=k,
            run_seed=run_seed,
            store=Store(tmp_path / FILE),
            code=str(id(engine)),
        )

    return measure


@pytest.fixture(autouse=True)
def quick_recordings(monkeypatch):
    """Let recordings of these tests draw a quarter of the completions."""
    from grpo_harness.baselines import recording

    monkeypatch.setattr(recording, "SAMPLES", 16)


@pytest.fixture
def project(pytester, save_tiny):
    """A repository of its own with two untrained policies, one task type and one suite."""
    for name, seed in (("base-policy", 1), ("trained-policy", 2)):
        save_tiny(pytester.path / name, seed=seed)
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        addopts = "-p no:benchmark"

        [tool.grpo-harness]
        base = "base-policy"
        trained = "trained-policy"
        tasks = ["palindrome"]
        problems = 64
        samples = 2

        [tool.grpo-harness.gate]
        allow_floor = true

        [tool.grpo-harness.sampling]
        max_new_tokens = 2
        """
    )
    pytester.makepyfile(test_own=OWN_SUITE)
    return pytester


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The Python of an environment into which a wheel is installed, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Of a copy: what an earlier build has left in the checkout would be packed too.
    source = folder / "source"
    for part in ("harness", "suites"):
        left = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / part, source / part, ignore=left)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    python = folder / "venv" / "bin" / "python"
    site = folder / "venv" / "lib" / Path(sysconfig.get_path("purelib")).parent.name
    target = site / "site-packages"
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, stderr=subprocess.DEVNULL)
    # The dependencies are those of this environment; what its .pth files import, such as this
    # checkout, is not found by way of another.
    found = [path for path in sys.path if Path(path).name == "site-packages"]
    (target / "dependencies.pth").write_text("".join(f"{path}\n" for path in found))
    shown = "import grpo_harness; print(grpo_harness.__file__)"
    at = subprocess.run([python, "-c", shown], check=True, capture_output=True, text=True, cwd="/")
    assert str(target) in at.stdout
    return python


@pytest.fixture(scope="session")
def own_repository(installed, tmp_path_factory):
    """A team's own repository in git: its policy is taught, and trained by its recipe."""
    folder = tmp_path_factory.mktemp("team") / "repository"
    shutil.copytree(FILES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    team = Team(folder, installed)
    subprocess.run(["git", "init", "--quiet"], check=True, cwd=folder)
    team.commit("Data, rewards, recipe, training and tests")
    taught = team.python_run("teach.py")
    assert taught.returncode == 0, taught.stderr[-3000:]
    ((status, said),) = team.harness("train train.yaml --out checkpoints/latest --device cpu")
    assert status == 0, said
    return team
