"""`grpo-harness init` looks at a repository, writes what is valid, and changes nothing."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import grpo_harness.nano
from grpo_harness.cli import main
from grpo_harness.init import data as data_files
from grpo_harness.init import look as looking
from grpo_harness.init.choose import choose
from grpo_harness.init.data import data_in
from grpo_harness.init.rewards import rewards_in
from grpo_harness.init.table import table, text
from grpo_harness.init.write import suite
from grpo_harness.policy import SYSTEM_MESSAGE
from grpo_harness.tasks import task_types
from tests.projects import Team

NANO = Path(grpo_harness.nano.__file__).parent
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
WRITTEN = ["pyproject.toml", "tests/test_policy.py", ".github/workflows/grpo-harness.yml"]

ROW = {"prompt": [{"role": "user", "content": "How much is 3 + 4?"}], "solution": "7"}
REWARDS = """
def accuracy(completions, solution, **kwargs):
    return [float(s in c[0]["content"]) for c, s in zip(completions, solution, strict=True)]


async def short(completion_ids, weight=1.0, **kwargs):
    return [-weight * len(ids) for ids in completion_ids]


def _helper(completions, **kwargs):
    raise AssertionError


def no_reward(completions, solution):
    raise AssertionError
"""
ROUGE = "def rouge(completions, gold, **kwargs):\n    1/0\n"
RECIPE = {
    "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
    "dataset_name": "data/train.jsonl",
    "reward_funcs": ["mine.rewards.short", "mine.rewards.accuracy"],
    "reward_weights": [0.5, 1.0],
    "output_dir": "out",
    "temperature": 0.7,
    "max_completion_length": 48,
    "num_generations": 8,
}


def checkpoint(folder, *signs, of="Qwen2ForCausalLM", **config):
    """Write the files of a whole model that settings and collecting look at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "architectures": [of], **config})
    )
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    for name in ("tokenizer.json", *signs):
        (folder / name).write_text("{}")
    return folder


def adapter(folder, base, kind="CAUSAL_LM"):
    """Write the files of an adapter of PEFT."""
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": base, "peft_type": "LORA", "task_type": kind}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def rows(file, row=ROW, n=80):
    """Write a data set as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({**row, "number": i}) + "\n" for i in range(n)))


def module(file, source=REWARDS):
    """Write a module, and its package."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


def age(folder, seconds):
    """Make the weights in a folder older."""
    for file in folder.glob("*.safetensors"):
        os.utime(file, (time.time() - seconds,) * 2)


class Repository:
    """A made-up repository in git, on which init is run."""

    def __init__(self, pytester, capsys):
        self.pytester, self.capsys, self.path = pytester, capsys, pytester.path
        self.git("init", "--quiet")

    def git(self, *arguments):
        author = ("-c", "user.name=Team", "-c", "user.email=team@example.org")
        done = subprocess.run(
            ["git", *author, *arguments], cwd=self.path, check=True, capture_output=True, text=True
        )
        return done.stdout

    def tracked(self):
        """The paths that git has, or is about to have."""
        listed = self.git("-c", "core.quotePath=false", "ls-files", "-z")
        return listed.split("\0")[:-1]

    def files(self):
        """Every file, with its bytes."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if not path.is_symlink() and path.is_file()
            if path.relative_to(self.path).parts[0] != ".git" and path.suffix != ".pyc"
        }

    def init(self):
        """Run init; return what it said, after what holds of every repository was checked."""
        before = self.files()
        self.capsys.readouterr()
        assert main(["init"]) == 0, self.capsys.readouterr().err
        said, error = self.capsys.readouterr()
        assert not error
        after = self.files()
        for name, content in before.items():
            may_grow = name in ("pyproject.toml", ".gitignore")
            assert after[name].startswith(content) if may_grow else after[name] == content, name
        new = {name for name in after if name not in before}
        assert new <= {*WRITTEN, ".gitignore"}
        for name in new & {WRITTEN[1]}:
            ast.parse(after[name])
        for name in new & {WRITTEN[2]}:
            assert yaml.safe_load(after[name])["jobs"]["policy"]["steps"]
        return said

    def table(self):
        """The table that was written, once pytest has read it and collected the tests."""
        for option in ("--grpo-settings", "--co"):
            done = self.pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:benchmark", option)
            assert done.ret == 0, (option, done.outlines, done.errlines)
            if option == "--co":
                done.stdout.fnmatch_lines(["*test_form*", "*test_reward*"])
        content = tomllib.loads((self.path / "pyproject.toml").read_text(encoding="utf-8"))
        return content["tool"]["grpo-harness"]


@pytest.fixture
def repository(pytester, capsys):
    return Repository(pytester, capsys)


def test_of_nothing_it_writes_a_table_of_the_embedded_pair(repository):
    said = repository.init()
    assert repository.table() == {"trained": "nano-trained", "base": "nano-base"}
    assert {*WRITTEN, ".gitignore"} == {*repository.files()}
    assert "none found: the embedded pair stands for yours" in said
    assert "- name your policies in pyproject.toml: trained and base" in said
    commands = said.split("Next:\n")[1].splitlines()
    (told,) = re.findall(r"^grpo-harness init\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [command.strip() for command in commands] == told.splitlines()


def test_a_second_time_it_changes_nothing(repository):
    repository.init()
    before = repository.files()
    said = repository.init()
    assert repository.files() == before
    assert "pyproject.toml: left alone: it has the table [tool.grpo-harness]" in said
    assert "tests/test_policy.py: left alone: it exists" in said
    repository.git("add", ".")
    repository.git("commit", "--quiet", "-m", "All")
    assert "git add" not in repository.init()


def test_of_one_checkpoint_only_that_is_judged(repository):
    checkpoint(repository.path / "models" / "ours")
    said = repository.init()
    assert repository.table() == {"trained": "models/ours"}
    assert "base      nothing names it" in said
    tests = (repository.path / "tests/test_policy.py").read_text()
    assert "no_loss" not in tests
    listed = repository.pytester.runpytest_inprocess("--co", "-q", "-p", "no:xdist").outlines
    tested = [line for line in listed if "::" in line]
    assert len(tested) == 3 * len(task_types())
    assert all("[trained-" in line for line in tested)
    assert "/models/ours/" in (repository.path / ".gitignore").read_text()
    workflow = (repository.path / WRITTEN[2]).read_text()
    assert "# models/ours is not in git: fetch it here." in workflow


def test_the_newest_that_was_trained_is_judged_against_where_it_began(repository):
    run = repository.path / "runs" / "one"
    for step in (20, 100, 300):
        age(checkpoint(run / f"checkpoint-{step}", "trainer_state.json"), 1000 - step)
    age(checkpoint(repository.path / "models" / "sft"), 5000)
    checkpoint(repository.path / "models" / "other")
    said = repository.init()
    assert repository.table() == {"trained": "runs/one/checkpoint-300", "base": "models/sft"}
    assert "the newest whose files are a training's; also there: " in said
    for other in ("models/other", "runs/one/checkpoint-20", "runs/one/checkpoint-100"):
        assert other in said
    ignored = (repository.path / ".gitignore").read_text().split()
    assert "/runs/one/checkpoint-*/" in ignored
    assert len(ignored) == len({*ignored}) == 5
    assert "test_training_does_no_harm" in (repository.path / "tests/test_policy.py").read_text()


def test_of_equally_new_checkpoints_the_last_step_counts(repository):
    for step in (20, 100, 3):
        age(checkpoint(repository.path / f"checkpoint-{step}"), 0)
        os.utime(repository.path / f"checkpoint-{step}" / "model.safetensors", (1e9, 1e9))
    repository.init()
    assert repository.table()["trained"] == "checkpoint-100"
    assert "/checkpoint-*/" in (repository.path / ".gitignore").read_text().split()


@pytest.mark.parametrize(
    ("base", "named"),
    [("../start", "models/start"), ("models/start", "models/start"), ("Org/M-1", "Org/M-1")],
)
def test_an_adapter_names_its_base(repository, base, named):
    checkpoint(repository.path / "models" / "start")
    adapter(repository.path / "models" / "lora", base)
    adapter(repository.path / "models" / "reward-lora", base, "SEQ_CLS")
    said = repository.init()
    assert repository.table() == {"trained": "models/lora", "base": named}
    assert f"base      {named}: as the files of the trained policy say" in said
    assert (
        "skipped   models/reward-lora: its weights are of SEQ_CLS, which generates nothing" in said
    )
    assert "pip install 'grpo-harness[peft]'\n" in (repository.path / WRITTEN[2]).read_text()


def test_a_data_set_is_judged_by_the_rewards_that_take_its_columns(repository):
    rows(repository.path / "data" / "train.jsonl")
    rows(repository.path / "data" / "test.jsonl")
    module(repository.path / "mine" / "rewards.py")
    module(repository.path / "mine" / "other.py", ROUGE)
    said = repository.init()
    table = repository.table()
    assert table["data"] == {
        "test": {
            "path": "data/test.jsonl",
            "answer": "solution",
            "rewards": ["mine.rewards:accuracy", "mine.rewards:short"],
            "correct": {"reward": "accuracy", "at_least": 1.0},
        }
    }
    assert table["sampling"] == {"max_new_tokens": 256}
    assert "data      data/test.jsonl, of columns prompt, solution, number; also there: " in said
    assert "also there: mine.other:rouge" in said
    assert "- see that accuracy is 1.0 for what is correct, and less else" in said
    tests = (repository.path / "tests/test_policy.py").read_text()
    assert "gate.rewards(" in tests
    assert "gate.accuracy(" in tests


def test_without_a_reward_that_decides_accuracy_is_not_asked(repository):
    rows(repository.path / "dev.jsonl")
    module(repository.path / "scores.py", REWARDS.replace("def accuracy", "def overlap"))
    repository.init()
    assert "correct" not in repository.table()["data"]["dev"]
    tests = (repository.path / "tests/test_policy.py").read_text()
    assert "gate.accuracy(" not in tests
    assert "no_loss" not in tests


@pytest.mark.parametrize("rewards", [None, ROUGE])
def test_a_data_set_without_rewards_is_a_comment(repository, rewards):
    rows(repository.path / "test.jsonl")
    if rewards:
        module(repository.path / "mine.py", rewards)
    said = repository.init()
    assert "data" not in repository.table()
    written = (repository.path / "pyproject.toml").read_text()
    commented = re.findall("^# (.*)$", written, re.MULTILINE)
    assert tomllib.loads("\n".join(commented))["tool"]["grpo-harness"]["data"]["test"]["path"]
    assert "the data set is a comment until then" in said
    assert "and uncomment it" in said


@pytest.mark.parametrize("made", [False, True])
def test_a_recipe_says_base_rewards_weights_and_sampling(repository, made):
    (repository.path / "train.yaml").write_text(yaml.safe_dump(RECIPE))
    (repository.path / "deploy.yaml").write_text("model_name_or_path: a/b\nlearning_rate: 1\n")
    rows(repository.path / "data" / "train.jsonl")
    module(repository.path / "mine" / "rewards.py")
    if made:
        checkpoint(repository.path / "out" / "checkpoint-5", "trainer_state.json")
        rows(repository.path / "data" / "held_out" / "valid.jsonl")
    said = repository.init()
    table = repository.table()
    name = "valid" if made else "train"
    assert table == {
        "trained": "out/checkpoint-5" if made else "out",
        "base": "Qwen/Qwen2-0.5B-Instruct",
        "recipe": "train.yaml",
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 48},
        "data": {
            name: {
                "path": "data/held_out/valid.jsonl" if made else "data/train.jsonl",
                "answer": "solution",
                "rewards": ["mine.rewards:short", "mine.rewards:accuracy"],
                "reward_weights": [0.5, 1.0],
                "correct": {"reward": "accuracy", "at_least": 1.0},
            }
        },
    }
    warned = "- judge by rows that no training sees: data/train.jsonl is what is trained on"
    assert (warned in said) != made
    assert ("- train to out, or name another trained policy" in said) != made


@pytest.mark.parametrize("rewards", ["accuracy_reward", "get_soft_overlong_punishment", None, 3])
@pytest.mark.parametrize("data", ["trl-lib/DeepMath-103K", "mine.data:rows", 3])
def test_a_recipe_alone_is_valid(repository, rewards, data):
    recipe = {**RECIPE, "dataset_name": data, "reward_funcs": rewards, "temperature": -1}
    (repository.path / "grpo.yml").write_text(yaml.safe_dump(recipe))
    said = repository.init()
    table = repository.table()
    assert table.keys() == {"trained", "base", "recipe", "sampling"}
    assert table["sampling"]["temperature"] == 1.0
    assert (f"{data} is no file here" in said) == isinstance(data, str)


def test_of_several_recipes_the_one_of_the_checkpoint_counts(repository):
    for name, out in (("a", "runs/a"), ("b", "runs/b"), ("c", None)):
        of = {**RECIPE, "output_dir": out, "model_name_or_path": f"Org/{name}"}
        (repository.path / f"{name}.yaml").write_text(yaml.safe_dump(of))
    os.utime(repository.path / "b.yaml", (1e9, 1e9))
    checkpoint(repository.path / "runs" / "b" / "final", "training_args.bin")
    said = repository.init()
    table = repository.table()
    assert (table["base"], table["recipe"]) == ("Org/b", "b.yaml")
    assert "recipe    b.yaml; also there: a.yaml, c.yaml" in said


PROJECT = '[project]\nname = "x"\nversion = "1"\n\n[tool.ruff]\nline-length = 90'


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n# the end"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_rest_of_pyproject_stays(repository, end, line_end):
    file = repository.path / "pyproject.toml"
    content = (PROJECT.replace("\n", line_end) + end).encode()
    file.write_bytes(content)
    (repository.path / "requirements.txt").write_text("numpy\n")
    said = repository.init()
    assert "pyproject.toml: added the table [tool.grpo-harness]" in said
    assert repository.table()["trained"] == "nano-trained"
    after = file.read_bytes()
    assert after.startswith(content)
    added = after[len(content) :]
    crlf = b"\r\n" in content
    assert added.count(b"\r\n") == (added.count(b"\n") if crlf else 0)
    assert tomllib.loads(after.decode())["project"] == {"name": "x", "version": "1"}
    install = "pip install grpo-harness -r requirements.txt ."
    assert install in (repository.path / WRITTEN[2]).read_text()


def test_a_table_that_exists_is_never_changed(repository):
    file = repository.path / "pyproject.toml"
    file.write_text('[tool.grpo-harness.gate]\nalpha = 0.02\n[tool.x]\na = """\n[b]"""')
    said = repository.init()
    assert "pyproject.toml: left alone: it has the table [tool.grpo-harness]" in said
    assert "table     pyproject.toml has one, so that nothing is guessed" in said
    assert repository.table() == {"gate": {"alpha": 0.02}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[tool", "pyproject.toml cannot be read: TOMLDecodeError"),
        ("tool = {ruff = {}}", "cannot be added at its end"),
        ("tool = 3", "cannot be added at its end"),
        ("tool.ruff.line-length = 3", None),
        ("[[tool.x]]\na = 1", None),
    ],
)
def test_a_pyproject_that_cannot_be_added_to_is_one_line(repository, content, message):
    file = repository.path / "pyproject.toml"
    file.write_text(content)
    if message is None:
        repository.init()
        assert repository.table()
        return
    assert main(["init"]) == 2
    error = repository.capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert repository.files() == {"pyproject.toml": content.encode()}


@pytest.mark.parametrize("name", ["tests", ".github", ".github/workflows/grpo-harness.yml/x"])
def test_what_is_in_the_way_is_said_before_anything_is_written(repository, name):
    file = repository.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    before = repository.files()
    assert main(["init"]) == 2
    error = repository.capsys.readouterr().err
    assert "is in the way: rename it" in error
    assert error.count("\n") == 1
    assert repository.files() == before


def test_a_test_of_the_same_name_is_left_alone(repository):
    module(repository.path / "tests" / "test_policy.py", "def test_x():\n    pass\n")
    said = repository.init()
    assert "tests/test_policy.py: left alone: it exists" in said
    assert "- tests/test_policy.py asks no gate: write tests as the README does" in said
    assert said.endswith("\n  pytest --grpo-record --grpo-problems 256\n  pytest\n")


def test_a_folder_within_a_project_is_refused(repository, monkeypatch):
    (repository.path / "pyproject.toml").write_text(PROJECT)
    (repository.path / "part").mkdir()
    monkeypatch.chdir(repository.path / "part")
    assert main(["init"]) == 2
    error = repository.capsys.readouterr().err
    assert f"the project's file is {repository.path / 'pyproject.toml'}: run it there" in error
    (repository.path / "part" / "pyproject.toml").touch()
    assert main(["init"]) == 0
    said = repository.capsys.readouterr().out
    assert f"grpo-harness.yml: left out: GitHub reads workflows in {repository.path} only" in said


def test_lines_of_gitignore_are_added_once(repository):
    file = repository.path / ".gitignore"
    file.write_bytes(b"# ours\r\n*.pyc\r\n__pycache__")
    said = repository.init()
    assert ".gitignore: added /report/\n" in said
    assert file.read_bytes() == b"# ours\r\n*.pyc\r\n__pycache__\r\n/report/\r\n"
    assert ".gitignore" not in repository.init().split("Next:")[0]


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "it's",
        'say "x"',
        "größe",
        "模型",
        "a\\b",
        "a\nb",
        "x[1]",
        "50%*?",
        "nano-base",
        "#1",
        "!a",
    ],
)
def test_names_of_any_kind(repository, name):
    checkpoint(repository.path / name / name, "trainer_state.json")
    checkpoint(repository.path / "base")
    rows(repository.path / f"{name} test.jsonl")
    module(repository.path / "mine.py")
    module(repository.path / name / "m.py")
    repository.init()
    table = repository.table()
    assert (repository.path / table["trained"]).samefile(repository.path / name / name)
    ((task, of),) = table["data"].items()
    assert of["path"] == f"{name} test.jsonl"
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", task)
    repository.git("add", ".")
    tracked = repository.tracked()
    assert not [path for path in tracked if "safetensors" in path]
    assert f"{name}/m.py" in tracked


def test_names_that_no_text_can_be_are_said(repository):
    os.mkdir(os.fsencode(repository.path) + b"/run-\xff")  # noqa: PTH102
    checkpoint(repository.path / os.fsdecode(b"run-\xff") / "final", "trainer_state.json")
    rows(repository.path / os.fsdecode(b"\xff.jsonl"))
    rows(repository.path / "~me" / "test.jsonl")
    said = repository.init()
    assert repository.table()["trained"] == "nano-trained"
    assert said.count("its name is not UTF-8") == 2
    assert "skipped   ~me: a name that begins with ~ means a home folder" in said


def test_two_policies_of_one_name_are_no_pair(repository):
    checkpoint(repository.path / "a" / "final", "trainer_state.json", _name_or_path="../../b/final")
    checkpoint(repository.path / "b" / "final")
    said = repository.init()
    assert repository.table() == {"trained": "a/final"}
    assert "nothing names it (b/final is called like the trained policy: rename one)" in said


def test_a_link_is_a_name_that_stays(repository):
    target = checkpoint(repository.path / "runs" / "7" / "checkpoint-10")
    (repository.path / "latest").symlink_to(target)
    (repository.path / "loop").symlink_to(repository.path)
    (repository.path / "nowhere").symlink_to("missing")
    (repository.path / "test.jsonl").symlink_to("missing")
    said = repository.init()
    assert repository.table()["trained"] == "latest"
    assert "also there: runs/7/checkpoint-10" in said
    repository.git("add", ".")
    assert {"latest", "runs"}.isdisjoint(path.split("/")[0] for path in repository.tracked())


@pytest.mark.parametrize(
    "folder", [".git", ".venv", "node_modules", "own-env", "build", "lib/site-packages", "report"]
)
def test_folders_of_others_are_left_out(repository, folder):
    place = repository.path / folder
    checkpoint(place / "model")
    rows(place / "test.jsonl")
    module(place / "mine.py")
    if folder == "own-env":
        (place / "pyvenv.cfg").touch()
    said = repository.init()
    assert "policies  none found" in said
    assert "rewards" not in said
    assert "data" not in said


def test_it_does_not_look_without_end(repository, monkeypatch):
    monkeypatch.setattr(looking, "MOST", 20)
    monkeypatch.setattr(looking, "MOST_FILES", 9)
    for i in range(20):
        (repository.path / f"{i:03}").mkdir()
        rows(repository.path / "000" / f"{i:02}.jsonl", n=1)
    checkpoint(repository.path / "zzz")
    said = repository.init()
    assert "skipped   019: more than 20 folders" in said
    assert "skipped   000: 20 files, of which the first 9 are looked at" in said
    assert "also there: 000/01.jsonl, 000/02.jsonl, 000/03.jsonl, 000/04.jsonl and 4 more" in said
    assert repository.table()["trained"] == "nano-trained"


def test_what_is_damaged_is_skipped_with_a_note(repository):
    checkpoint(repository.path / "cut")
    (repository.path / "cut" / "model.safetensors").write_bytes(b"\x10")
    checkpoint(repository.path / "judge", of="LlamaForSequenceClassification")
    pickled = checkpoint(repository.path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    files = {
        "a.jsonl": '{"prompt": "x"',
        "b.json": '[{"prompt": "x", }]',
        "c.parquet": "PAR1",
        "d.py": "def r(completions, **kwargs):\n  return [",
        "e.yaml": "model_name_or_path: [",
        "f.csv": 'prompt,answer\n"' + "x" * 200_000,
        "g.jsonl": json.dumps({"prompt": "x", "completions": "y"}),
        "h.py": "def r(completions, **kwargs): ...\ntrainer.train()",
        "not-a-name.py": "def r(completions, **kwargs): ...",
        "json.py": "def r(completions, **kwargs): ...",
        "tsconfig.json": "{ // a comment\n}",
        "values.yaml": "{{ a template }}",
    }
    for name, content in files.items():
        (repository.path / name).write_text(content)
    found = looking.look(repository.path)
    why = {name: " ".join(reason.split()) for name, reason in found.skipped}
    assert why.keys() == {"cut", "judge", "pickled", *files} - {"tsconfig.json", "values.yaml"}
    assert "does something when it is imported (line 2)" in why["h.py"]
    assert "another module is called json" in why["json.py"]
    assert "a pickle, which is never loaded" in why["pickled"]
    said = repository.init()
    assert said.count("skipped   ") == 7
    assert "skipped   7 more" in said
    assert repository.table() == {"trained": "nano-trained", "base": "nano-base"}


@pytest.mark.parametrize("file", ["config.json", "recipe.json", "adapter_config.json", "a.yaml"])
@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "null", "3", "{", "[" * 100_000, "\0", "\ud800"),
        '{"architectures": {"x": 1}, "base": [], "model_name_or_path": {}, "reward_funcs": {}}',
        '{"architectures": "x", "base": {"name": {}}, "model_name_or_path": 1, "datasets": [1]}',
        '{"architectures": [3], "base": 3, "model_name_or_path": null, "reward_weights": [{}]}',
        '{"base_model_name_or_path": 3, "task_type": [], "_name_or_path": "\\u0000", '
        '"model_name_or_path": "\\u0000", "grpo_harness": 1, "output_dir": "*"}',
        '{"base_model_name_or_path": "' + "x" * 9000 + '", "model_name_or_path": "~nobody/x", '
        '"num_generations": "x", "temperature": {}, "dataset_name": "\\u0000/x"}',
    ],
)
def test_whatever_a_file_says_there_is_a_table(repository, file, content):
    checkpoint(repository.path / "model" / "x")
    adapter(repository.path / "model" / "y", "model/x")
    for folder in ("model/x", "model/y", "."):
        (repository.path / folder / file).write_text(content, errors="surrogatepass")
    found = looking.look(repository.path)
    choice = choose(found)
    assert tomllib.loads(table(choice, None))["tool"]["grpo-harness"]["trained"]
    compile(suite(choice), "tests", "exec")


def test_what_cannot_be_read_is_skipped_with_a_note(repository):
    # Readable by its mode, and no read of it succeeds, whoever asks.
    (repository.path / "test.jsonl").symlink_to("/proc/self/mem")
    os.mkfifo(repository.path / "dev.jsonl")
    (repository.path / "valid.jsonl").symlink_to("x" * 300)
    closed = repository.path / "eval.jsonl"
    rows(closed)
    closed.chmod(0)
    said = repository.init()
    assert "skipped   test.jsonl: [Errno 5] Input/output error" in said
    assert "dev.jsonl" not in said
    assert "valid.jsonl" not in said
    assert "eval.jsonl" in said
    closed.chmod(0o600)


def test_a_module_is_not_run(repository):
    module(
        repository.path / "mine.py",
        "from pathlib import Path\nx = Path('was_run').touch()\n" + REWARDS,
    )
    rows(repository.path / "test.jsonl")
    said = repository.init()
    assert "mine:accuracy" in said
    assert not (repository.path / "was_run").exists()


def test_huge_files_are_not_read_wholly(repository):
    row = (json.dumps(ROW) + "\n").encode()
    for name in ("test.jsonl", "dev.json", "dev.csv", "big.py", "big.yaml"):
        with (repository.path / name).open("wb") as file:
            file.write(b"prompt,answer\na,b\n" if name.endswith(".csv") else row * 2)
            file.truncate(1 << 40)  # a terabyte, of which nothing else is on disk
    with (repository.path / "long.jsonl").open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(1 << 40)
    module(repository.path / "mine.py")
    before = time.monotonic()
    assert main(["init"]) == 0
    assert time.monotonic() - before < 5
    said = repository.capsys.readouterr().out
    assert "dev.json, of columns prompt, solution; also there: dev.csv, test.jsonl" in said
    assert "skipped   long.jsonl: its first row is longer than 1 MiB" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", [ROW, ROW]),
        ("a.json", ROW),
        ("a.jsonl", ROW),
        ("a.csv", {"question": "1 + 1?", "answer": "2"}),
        ("a.parquet", ROW),
        ("a.parquet", {"question": "1 + 1?", "answer": "2"}),
        ("a.PARQUET", {"prompt": "1 + 1?"}),
    ],
)
def test_columns_are_those_that_the_harness_reads(tmp_path, name, content):
    from grpo_harness.tasks.dataset import DatasetSource

    file = tmp_path / name
    row = content[0] if isinstance(content, list) else content
    if name.lower().endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row] * 2), file)
    elif name.endswith(".csv"):
        file.write_text(f"{','.join(row)}\n" + f"{','.join(row.values())}\n" * 2)
    else:
        lines = json.dumps(content) if isinstance(content, list) else f"{json.dumps(row)}\n" * 2
        file.write_text(lines)
    found = data_in(file, name)
    source = DatasetSource("x", name, tmp_path, prompt=found.prompt, answer=found.answer)
    problem = source.problems(1)[0]
    assert problem.prompt == row[found.prompt]
    assert problem.answer == row.get(found.answer)
    assert set(problem.task) <= set(found.columns) == set(row)


@pytest.mark.parametrize(
    "content",
    [
        *('{"prompt": ""}', '{"prompt": 3}', '{"prompt": []}', '{"prompt": ["x"]}', "[]", "3"),
        *('{"input": "x"}', '{"messages": []}', '{"text": "x"}', '{"question": "x"}'),
    ],
)
def test_other_rows_are_no_data_set(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    assert data_in(tmp_path / "a.jsonl", "a.jsonl") is None
    assert ".jsonl" in data_files.KINDS


SIGNATURES = [
    "completions, **kwargs",
    "completions, solution, **kwargs",
    "prompts, completions, a, b=2, *, c, d=4, **kwargs",
    "completion_ids, *more, c, **others",
    "completions, trainer_state, log_extra, **kwargs",
    "completions",
    "completions, **_",
    "prompts, **kwargs",
    "completions, /, **kwargs",
    "*completions, **kwargs",
    "completions=None, **kwargs",
    "self, completions, **kwargs",
]


@pytest.mark.parametrize("signature", SIGNATURES)
def test_the_columns_a_reward_needs_are_those_without_which_the_call_fails(tmp_path, signature):
    """Python itself says what can be called: all that is found can, and not with a column less."""
    file = tmp_path / "mine.py"
    file.write_text(f"def reward({signature}):\n    return []\n")
    scope = {}
    exec(file.read_text(), scope)  # noqa: S102 - the function above
    given = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

    def works(columns):
        try:
            scope["reward"](**dict.fromkeys(given), **dict.fromkeys(columns))
        except TypeError:
            return False
        return True

    found = rewards_in(file, tmp_path)
    named = re.search(r"(?<!\*)\bcompletion(s|_ids)\b", signature)
    if not found:
        every = {"solution", "a", "b", "c", "d", "self"}
        assert not named or not works(every) or not works(set())
        return
    (reward,) = found
    assert works(reward.needs)
    assert not any(works(reward.needs - {column}) for column in reward.needs)


@pytest.mark.parametrize(
    ("before", "acts"),
    [
        ("trainer = GRPOTrainer(model)", True),
        ("trainer.train()", True),
        ("main()", True),
        ("args = parser.parse_args()", True),
        ("with open('x') as f:\n    y = f.read()", True),
        ("if True:\n    run()", True),
        ("try:\n    run()\nexcept ImportError:\n    pass", True),
        ("if __name__ == '__main__':\n    main()", False),
        ("logging.basicConfig(level=1)", False),
        ("sys.path.append('.')", False),
        ("'''A text.'''", False),
        ("ANSWER = re.compile('x')", False),
        ("try:\n    import x\nexcept ImportError:\n    x = None", False),
        ("class Trainer(GRPOTrainer):\n    def train(self):\n        self.run()", False),
    ],
)
def test_modules_that_act_when_they_are_imported_are_said(tmp_path, before, acts):
    file = tmp_path / "mine.py"
    file.write_text(f"{before}\n\n\ndef reward(completions, **kwargs):\n    return []\n")
    if not acts:
        assert [str(of) for of in rewards_in(file, tmp_path)] == ["mine:reward"]
        return
    with pytest.raises(ValueError, match="does something when it is imported"):
        rewards_in(file, tmp_path)


@pytest.mark.parametrize("installed", [False, True])
def test_modules_below_src_are_named_as_they_are_imported(tmp_path, monkeypatch, installed):
    module(tmp_path / "src" / "packed_for_init" / "rewards.py")
    if installed:
        monkeypatch.syspath_prepend(str(tmp_path / "src"))
    (first, *_) = rewards_in(tmp_path / "src" / "packed_for_init" / "rewards.py", tmp_path)
    whole = "packed_for_init.rewards"
    assert first.module == (whole if installed else f"src.{whole}")


@given(st.text())
def test_any_text_is_read_back_from_the_table(value):
    assert tomllib.loads(f"x = {text(value)}") == {"x": value}


def test_the_workflow_is_the_one_of_the_readme(repository):
    repository.init()
    ours = yaml.safe_load((repository.path / WRITTEN[2]).read_text())["jobs"]["policy"]["steps"]
    blocks = re.findall(r"^```yaml\n(- .*?)^```", README, re.DOTALL | re.MULTILINE)
    steps = [step for block in blocks for step in yaml.safe_load(block)]
    assert len(steps) == 3
    judge = {"run": steps[0]["run"].replace("pytest ", "pytest tests/test_policy.py ", 1)}
    assert ours[-3:] == [judge, *steps[1:]]


@pytest.mark.heavy  # records a baseline of 256 problems, twice 64 completions of each
def test_the_printed_commands_lead_to_a_green_verdict(installed, tmp_path):
    """A team with two checkpoints, a data set and a reward runs what init prints, word for word."""
    team = Team(tmp_path / "team", installed)
    team.folder.mkdir()
    for name in ("base", "trained"):
        left = shutil.ignore_patterns("recipe.json")
        shutil.copytree(NANO / name, team.folder / "checkpoints" / name, ignore=left)
    system = {"role": "system", "content": SYSTEM_MESSAGE}
    asked = [
        {
            "prompt": [system, {"role": "user", "content": problem.prompt}],
            "solution": str(problem.answer),
        }
        for problem in task_types()["gcd"].problems(256)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in asked)
    (team.folder / "test.jsonl").write_text(lines)
    right = REWARDS.replace('s in c[0]["content"]', 's == c[0]["content"].strip()')
    (team.folder / "rewards.py").write_text(right)
    (team.folder / ".gitignore").write_text("checkpoints/")
    subprocess.run(["git", "init", "--quiet"], check=True, cwd=team.folder)
    team.commit("Data and rewards")
    ((status, said),) = team.harness("init")
    assert status == 0, said
    table = tomllib.loads((team.folder / "pyproject.toml").read_text())["tool"]["grpo-harness"]
    assert (table["trained"], table["base"]) == ("checkpoints/trained", "checkpoints/base")
    commands = [line.strip() for line in said.split("Next:\n")[1].splitlines()]
    assert len(commands) == 3
    outputs = []
    for command in commands:
        first, _, rest = command.partition(" ")
        if first == "pytest":
            status, output = team.pytest(*shlex.split(rest))
            assert status == 0, output
            outputs.append(output)
        else:
            identity = "-c user.name=Team -c user.email=team@example.org commit"
            line = command.replace("git commit", f"git {identity}")
            subprocess.run(line, shell=True, check=True, cwd=team.folder)  # noqa: S602
    assert {path.name for path in team.folder.glob("baselines/*/*.json")} == {"test.json"}
    assert not re.search("FAIL|ERROR|not comparable", outputs[1]), outputs[1]
    assert re.search(r"test +checkpoints/trained .*? PASS", outputs[1]), outputs[1]
