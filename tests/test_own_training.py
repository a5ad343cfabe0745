"""A team's own training under guard: each fault in its recipe, trainer, rewards, log and checkpoint
is named, in its own repository and by an installed wheel.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

pytestmark = pytest.mark.heavy

SEEDS = range(1, 6)
"""Of the recorded runs."""

TRAIN = "train {} --out {} --device cpu"
SUITES = "grpo_harness.suites"
GUARD = [f"{SUITES}.{name}" for name in ("test_recipe", "test_training", "test_training_run")]
LOG_FAULTS = {
    "rate": {"learning_rate": 3.0e-5},
    "cold": {"temperature": 0.5},
    "anchored": {"beta": 1.0},
    "cut": {"max_completion_length": 13},
    "collapse": {"learning_rate": 1.0e-2},
}
"""Changes of the recipe that a curve shows."""

HACKED = {
    "reward_funcs": ["our.rewards.accuracy", "our.rewards.digits"],
    "reward_weights": [0.2, 1.0],
    "learning_rate": 1.0e-4,
    "per_device_train_batch_size": 32,
    "max_steps": 30,
}
DIGITS = '''

def digits(completions, **kwargs):
    """The share of digits: an answer should be a number."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in _texts(completions)]
'''
"""A reward that a bare number earns more of than an answer in tags."""

ADAPTER = {
    "use_peft": True,
    "lora_r": 8,
    "lora_target_modules": "all-linear",
    "learning_rate": 5e-3,
}


def write(team, path, changes):
    """Write the recipe with some changes to a path of the repository."""
    recipe = yaml.safe_load((team.folder / "train.yaml").read_text())
    block = {**recipe["grpo_harness"], **changes.get("grpo_harness", {})}
    file = team.folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**recipe, **changes, "grpo_harness": block}, sort_keys=False))


@pytest.fixture(scope="module")
def guarded(own_repository, tmp_path_factory):
    """The repository with its recipe and five runs recorded, and a run with each fault."""
    team = own_repository.copy(tmp_path_factory.mktemp("guarded"))
    runs = [f"{TRAIN.format('train.yaml', f'runs/seed{n}')} --set seed={n}" for n in SEEDS]
    for fault, changes in LOG_FAULTS.items():
        write(team, f"faults/{fault}/train.yaml", changes)
        runs.append(TRAIN.format(f"faults/{fault}/train.yaml", f"runs/{fault}"))
    runs.append(f"{TRAIN.format('train.yaml', 'runs/first')} --steps 1")
    write(team, "faults/adapter/train.yaml", ADAPTER)
    runs.append(TRAIN.format("faults/adapter/train.yaml", "runs/adapter"))
    runs.append(f"{TRAIN.format('faults/adapter/train.yaml', 'runs/first-adapter')} --steps 1")
    rewards = team.folder / "our" / "rewards.py"
    honest = rewards.read_text()
    rewards.write_text(honest + DIGITS)
    write(team, "faults/hacked/train.yaml", HACKED)
    runs.append(TRAIN.format("faults/hacked/train.yaml", "runs/hacked"))
    with ThreadPoolExecutor() as pool:
        done = [*pool.map(lambda part: team.harness(*part), (runs[::2], runs[1::2]))]
    assert all(status == 0 for part in done for status, _ in part), done
    log = "log " + " ".join(f"runs/seed{n}" for n in SEEDS) + " --record"
    (_, said), (_, told) = made = team.harness("recipes --record", log)
    assert [status for status, _ in made] == [0, 0], (said, told)
    shutil.rmtree(team.folder / "faults")
    rewards.write_text(honest)
    # Without it seconds a step are not judged: what else this machine does would decide.
    (team.folder / "checkpoints" / "latest" / "resources.json").unlink()
    team.commit("The recipe and its runs, recorded")
    return team


@pytest.fixture
def team(guarded, tmp_path):
    """A copy of the repository to change."""
    return guarded.copy(tmp_path)


def failures(said):
    """The message of each failed test of an output in one line, by its parameter."""
    title = r"_{5,} (?:ERROR at setup of )?test_\w+\[(\w+)\] _{5,}"
    found = re.findall(rf"{title} (.*?)(?= _{{5,}} | ={{5,}} )", said)
    return dict(found)


def test_unchanged_it_is_green(guarded):
    recorded = {str(p.relative_to(guarded.folder)) for p in guarded.folder.glob("baselines/*/*")}
    assert recorded == {"baselines/recipes/train.json", "baselines/training/train.json"}
    status, said = guarded.pytest("--pyargs", *GUARD, "-rs")
    assert status == 0, said
    # Five runs of 15 steps may be too few to prove that the reward rose as it should.
    assert re.search(r"\b(5 passed|4 passed.* 1 unproven|1 unproven.* 4 passed)", said), said
    assert "skipped" not in said
    assert "does not look at" not in said
    rows = json.loads((guarded.folder / "checkpoints/latest/log.json").read_text())
    for key in ("rewards/accuracy/mean", "rewards/form/mean", "rewards/overlong/mean"):
        assert len({row[key] for row in rows}) > 1
    assert all(0 < row["completions/different"] <= 1 for row in rows), "the trainer is our own"


RECIPE_FAULTS = {
    "misspelt": ({"temprature": 1.2}, "use temperature"),
    "rate": ({"learning_rate": 3.0e-5}, "learning_rate is 3e-05: it was 0.0003"),
    "cold": ({"temperature": 0.5}, "temperature is 0.5: it was 1.2"),
    "anchored": ({"beta": 1.0}, "beta is 1.0: it was 0.02"),
    "cut": ({"max_completion_length": 13}, "max_completion_length is 13: it was 40"),
    "loss": ({"loss_type": "grpo"}, "loss_type is 'grpo': it was 'dapo'"),
    "weights": ({"reward_weights": [1.0, 1.0, 0.5]}, "reward_weights is [1.0, 1.0, 0.5]: it was"),
    "rewards": (
        {"reward_funcs": ["our.rewards.form"], "reward_weights": [1.0]},
        "reward_funcs is ['our.rewards.form']: it was",
    ),
    "plain": (
        {"grpo_harness": {"trainer": None}},
        "trainer is None: it was 'our.training:Trainer'",
    ),
}
"""Changes of the recipe, and what the recorded config says of each."""


def test_each_change_of_the_recipe_is_named(team):
    was = team.folder / "baselines" / "recipes" / "train.json"
    for fault, (changes, _) in RECIPE_FAULTS.items():
        write(team, f"{fault}.yaml", changes)
        shutil.copy(was, was.with_name(f"{fault}.json"))
    names = [f"{fault}.yaml" for fault in RECIPE_FAULTS]
    team.replace("pyproject.toml", 'recipe = "train.yaml"', f"recipe = {json.dumps(names)}")
    status, said = team.pytest("--pyargs", f"{SUITES}.test_recipe", "--tb=short")
    assert status == 1, said
    named = failures(said)
    assert named.keys() == RECIPE_FAULTS.keys(), said
    for fault, (_, name) in RECIPE_FAULTS.items():
        assert name in named[fault], named[fault]
        if fault not in {"misspelt", "rewards"}:
            assert ";" not in named[fault], f"{fault}: something else is named too"


TRAINERS = '''

class WithoutMean(Trainer):
    """Advantages are not relative to the group's mean."""

    def _calculate_rewards(self, *arguments):
        self.scores = super()._calculate_rewards(*arguments)
        return self.scores

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        totals = (self.scores * self.reward_weights).nansum(1)
        spread = totals.view(-1, self.num_generations).std(1)
        batch["advantages"] = totals / (spread.repeat_interleave(self.num_generations) + 1e-4)
        return batch


class WithoutKL(Trainer):
    """The KL term is logged and has no gradient."""

    def _compute_loss(self, model, inputs):
        beta, self.beta = self.beta, 1e-30
        loss = super()._compute_loss(model, inputs)
        self.beta = beta
        return loss


class WithoutWeight(Trainer):
    """The weight of form is ignored."""

    def _generate_and_score_completions(self, inputs):
        self.reward_weights[1] = 1.0
        return super()._generate_and_score_completions(inputs)


class NoneIsZero(Trainer):
    """A reward of None counts as 0."""

    def _calculate_rewards(self, *arguments):
        return super()._calculate_rewards(*arguments).nan_to_num(0.0)


class WithoutTemperature(Trainer):
    """Log-probabilities ignore the temperature."""

    def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, **_):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1]
        every = logits.log_softmax(-1)
        drawn = every.gather(-1, ids[:, -kept:, None]).squeeze(-1)
        return drawn, -(every.exp() * every).sum(-1), None
'''

REWARDS = '''

def among_answers(completions, solution, **kwargs):
    """As accuracy; a completion that is no answer in tags is not scored."""
    scores = zip(accuracy(completions, solution), form(completions), strict=True)
    return [score if is_answer else None for score, is_answer in scores]


def raises(completions, **kwargs):
    return [1 / (len(text) - len(text)) for text in _texts(completions)]
'''

SOME = {"reward_funcs": ["our.rewards.among_answers"], "reward_weights": [1.0]}
CONTRACT_FAULTS = {
    "mean": ("WithoutMean", {}, "advantages_are_group_relative"),
    "kl": ("WithoutKL", {}, "gradient_equals_the_oracles"),
    "weight": ("WithoutWeight", {}, "advantages_are_group_relative"),
    "unscored": ("NoneIsZero", SOME, "advantages_are_group_relative"),
    "temperature": ("WithoutTemperature", {}, "gradient_equals_the_oracles"),
    "raising": ("Trainer", {"reward_funcs": ["our.rewards.raises"], "reward_weights": [1.0]}, ""),
    "scored": ("Trainer", SOME, None),
}
"""For each recipe the trainer, changes, and the invariant that names the fault; None: no fault."""


def test_each_fault_of_the_trainer_is_named_by_its_invariant(team):
    for file, text in (("our/training.py", TRAINERS), ("our/rewards.py", REWARDS)):
        path = team.folder / file
        path.write_text(path.read_text() + text)
    for fault, (trainer, changes, _) in CONTRACT_FAULTS.items():
        block = {"grpo_harness": {"trainer": f"our.training:{trainer}"}}
        write(team, f"{fault}.yaml", {"per_device_train_batch_size": 32, **changes, **block})
    names = [f"{fault}.yaml" for fault in CONTRACT_FAULTS]
    team.replace("pyproject.toml", 'recipe = "train.yaml"', f"recipe = {json.dumps(names)}")
    status, said = team.pytest("--pyargs", f"{SUITES}.test_training", "--tb=short")
    assert status == 1, said
    named = failures(said)
    assert named.keys() == CONTRACT_FAULTS.keys() - {"scored"}, said
    for fault, (trainer, _, invariant) in CONTRACT_FAULTS.items():
        if invariant:
            assert re.search(rf"{trainer}: \d+ of \d+ invariants differ", named[fault])
            assert f" {invariant}: " in named[fault], named[fault]
    assert "no KL term" in named["kl"]
    assert "ignore the temperature" in named["temperature"]
    assert "division by zero" in named["raising"]
    assert "crashed in step 1" in named["raising"]


LEFT = {
    "rate": "reward form",
    "cold": "entropy",
    "anchored": "kl",
    "cut": "clipped ratio",
    "collapse": "reward",
}
"""The figure by which each fault is named."""


def test_each_fault_in_a_runs_log_is_named(guarded):
    judged = guarded.harness(*(f"log runs/{fault}" for fault in LOG_FAULTS))
    for fault, (status, said) in zip(LOG_FAULTS, judged, strict=True):
        assert status == 1, f"{fault}: {said}"
        assert re.search(rf"^  {LEFT[fault]}: .* the band", said, re.MULTILINE), f"{fault}: {said}"
    ((status, said),) = guarded.harness("log checkpoints/latest")
    assert re.search("^(PASS|UNPROVEN): train against 5 recorded runs$", said, re.MULTILINE), said


def test_a_hacked_reward_is_named(guarded):
    """The share of digits rises, and bare numbers are no answers in tags."""
    test = f"{SUITES}.test_training_run"
    for run, status in (("runs/hacked", 1), ("checkpoints/latest", 0)):
        named = f"--grpo-training={run}", "-k", "without_correctness"
        found, said = guarded.pytest("--pyargs", test, *named, "-p", "no:cacheprovider")
        assert found == status, said
    ((_, said),) = guarded.harness("log runs/hacked --decisive accuracy")
    assert "FAIL: reward without correctness, from the first to the last fifth" in said
    assert re.search(
        r"^  decisive reward: accuracy -0\.[1-9].*\n  the total \+.*\n  digits \+",
        said,
        re.MULTILINE,
    )


def of_the_base(team, run):
    shutil.copy(team.folder / "policies" / "base" / "model.safetensors", run)


def of_the_first_step(team, run):
    shutil.copy(team.folder / "runs" / "first" / "model.safetensors", run)


def of_another_run(team, run):
    shutil.copy(team.folder / "runs" / "collapse" / "model.safetensors", run)


def with_another_tokenizer(team, run):
    """The ids of two pieces of text are swapped."""
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<"], vocabulary["7"] = vocabulary["7"], vocabulary["<"]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_the_adapter_of_the_first_step(team, run):
    shutil.copy(team.folder / "runs" / "first-adapter" / "adapter_model.safetensors", run)


CHECKPOINT_FAULTS = {
    of_the_base: "checkpoints/latest",
    of_the_first_step: "checkpoints/latest",
    of_another_run: "checkpoints/latest",
    with_another_tokenizer: "checkpoints/latest",
    with_the_adapter_of_the_first_step: "runs/adapter",
}
"""What was saved in place of a run's policy."""


def test_each_checkpoint_that_is_not_the_logged_policy_is_named(team):
    for fault, run in CHECKPOINT_FAULTS.items():
        fault(team, shutil.copytree(team.folder / run, team.folder / fault.__name__))
    names = [*(fault.__name__ for fault in CHECKPOINT_FAULTS), "runs/adapter"]
    commands = [f"log {name} --recipe train.yaml" for name in names]
    with ThreadPoolExecutor() as pool:
        done = [*pool.map(lambda part: team.harness(*part), (commands[:3], commands[3:]))]
    told = [said for part in done for _, said in part]
    for name, said in zip(names, told, strict=True):
        verdict = "PASS" if name == "runs/adapter" else "FAIL"
        assert f"{verdict}: {name} against the last steps of its log" in said, f"{name}: {said}"
