"""A team's own repository: its data, rewards, training and tests, judged by an installed wheel."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.heavy

T, R, D = "pyproject.toml", "our/rewards.py", "our/data.py"


@pytest.fixture(scope="module")
def recorded(own_repository, tmp_path_factory):
    """The repository with its baselines recorded and committed."""
    team = own_repository.copy(tmp_path_factory.mktemp("recorded"))
    status, said = team.pytest("--grpo-record", "--grpo-seed=1")
    assert status == 0, said
    files = {str(path.relative_to(team.folder)) for path in team.folder.glob("baselines/*/*")}
    assert files == {
        f"baselines/{policy}/two-steps.{kind}"
        for policy in ("base", "latest")
        for kind in ("json", "examples.jsonl")
    }
    team.commit("Baselines")
    return team


@pytest.fixture
def team(recorded, tmp_path):
    """A copy of the repository to change."""
    return recorded.copy(tmp_path)


def test_unchanged_it_is_green(recorded):
    status, said = recorded.pytest("--grpo-seed=2", "--grpo-report=report")
    assert status == 0, said
    assert not re.search("FAIL|ERROR|not comparable", said), said
    report = json.loads((recorded.folder / "report" / "report.json").read_text())
    accuracy = {e["policy"]: e["accuracy"] for e in report["evaluations"]}
    assert 0.1 < accuracy["policies/base"] < 0.9
    assert 0.1 < accuracy["checkpoints/latest"] < 0.95
    rules = {check["rule"] for check in report["checks"]}
    assert rules == {
        *("accuracy", "length", "truncation", "unparsable", "reward", "no_loss"),
        *("rewards.accuracy", "rewards.form", "rewards.overlong"),
    }
    lines = (recorded.folder / "report/samples/latest--two-steps.jsonl").read_text()
    for row in map(json.loads, lines.splitlines()):
        scores, text = row["rewards"], row["completion"]
        right = f"<answer>{row['wanted']}</answer>"
        assert scores["accuracy"] == (text.count("<answer>") == 1 and text.endswith(right))
        assert scores["form"] == bool(re.fullmatch(r"(?s)<answer>.*</answer>", text.strip()))
        assert scores["overlong"] == pytest.approx(min(0, (20 - row["tokens"]) / 20))
        assert "</answer>" not in text or text.endswith("</answer>"), "stop ends a completion"


LENIENT = "ANSWER.search(text) or re.search(r'([0-9]+)', text)"
MIXED = """for text in _texts(completions)]
    third = len(found) // 3
    found[:third] = [*found[1:third], *found[: min(third, 1)]]
    return [
"""
SOME = "[None if c == 'farm' else s for s, c in zip(_punish(completion_ids), kwargs['category'])]"
SHUFFLED = """
    table = Dataset.from_list(list(islice(different(random.Random(1)), 400)))
    solutions = random.Random(3).sample(table["solution"][:], 400)
    return table.remove_columns("solution").add_column("solution", solutions)
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        # Seen because the bare solution, the column that `answer` names, is scored too.
        pytest.param(R, "ANSWER.search(text)", LENIENT, "reward", id="a lenient reward"),
        pytest.param(
            *(R, "for text in _texts(completions)]\n    return [\n", MIXED, "reward"),
            id="a third of the rewards shuffled",
        ),
        pytest.param(R, "_punish(completion_ids)", SOME, "reward", id="None for a category"),
        pytest.param(
            T, "[1.0, 0.2, 0.5]", "[1.0, 0.4, 0.5]", "weight of form was 0.2", id="a weight"
        ),
        pytest.param(T, 'stop = ["</answer>"]', "", r"sampling\.stop was", id="stop"),
        pytest.param(
            *(D, "return Dataset.from_list(list(islice(different(random.Random(1)), 400)))"),
            *(SHUFFLED.strip(), "with other columns, .* the data changed"),
            id="a shuffled column",
        ),
        pytest.param(
            *("checkpoints/latest/chat_template.jinja", "assistant", "Assistant"),
            *("chat_template was",),
            id="the chat template",
        ),
    ],
)
def test_a_change_is_named(team, file, old, new, named):
    team.replace(file, old, new)
    status, said = team.pytest()
    assert status == 1, said
    causes = re.findall(r"not comparable with \S+(.*?)If that is meant", said)
    assert causes, said
    assert all(re.search(named, cause) for cause in causes), causes


def test_a_worse_checkpoint_fails(team):
    file = team.folder / "checkpoints" / "latest" / "model.safetensors"
    weights = load_file(file)
    torch.manual_seed(0)
    for name, tensor in weights.items():
        weights[name] = tensor + 1.0 * tensor.std() * torch.randn_like(tensor)
    save_file(weights, file, metadata={"format": "pt"})
    status, said = team.pytest("--grpo-seed=2")
    assert status == 1, said
    for rule in ("accuracy", "reward", "reward accuracy"):
        assert f"FAIL: {rule} of checkpoints/latest on two-steps" in said
    assert "wanted '" in said
    assert "wanted 'None'" not in said
    assert "FAIL: accuracy of policies/base" not in said
    assert "not comparable" not in said
