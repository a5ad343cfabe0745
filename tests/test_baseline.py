import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_harness.baselines.file import BaselineError, conditions, exists, load, path_of
from grpo_harness.baselines.recording import record
from grpo_harness.evaluation import rounded
from grpo_harness.rewards.functions import Reward, Rewards
from grpo_harness.rewards.rule import reward_func
from grpo_harness.rewards.trials import rewards_digest
from grpo_harness.rules import recorded_bounds
from grpo_harness.tasks import task_types

GCD = task_types()["gcd"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def recorded(tmp_path, measure):
    evaluations = [measure(1), measure(2)]
    return load(record(tmp_path / "b", evaluations, root=tmp_path).path), evaluations


def test_what_was_recorded_is_loaded(recorded, tmp_path):
    stored, evaluations = recorded
    assert stored.path == path_of(tmp_path / "b", "tiny", "gcd")
    for i, group in enumerate(evaluations[0].groups):
        kept = stored.records[group.problem.id]
        groups = [evaluation.groups[i] for evaluation in evaluations]
        assert kept.k == 6
        assert kept.correct == sum(g.count("correct") for g in groups)
        assert kept.truncated == sum(g.count("truncated") for g in groups)
        assert kept.unparsable == sum(g.count("unparsable") for g in groups)
        assert kept.length == sum(c.tokens for g in groups for c in g.completions)
        logs = [g.tally.mean_log_length for g in groups]
        assert kept.tally.mean_log_length == pytest.approx(sum(logs) / 2)
        rewards = sorted(rounded(c.reward) for g in groups for c in g.completions)
        assert sorted(kept.tally.total) == rewards
    assert stored.same_policy(evaluations[0].fingerprint)


def test_a_file_says_what_made_it(recorded):
    header = recorded[0].header
    written = json.loads(recorded[0].path.read_text())
    for name in ("policy", "fingerprint", "seeds", "gate", "environment", "commit", "recorded"):
        assert name in written
    assert header.environment["torch"]
    assert header.environment["engine"] == "answers"
    assert header.conditions["sampling.temperature"] == 0.8
    assert header.parent is None


def test_a_file_is_readable_in_a_diff(recorded):
    lines = recorded[0].path.read_text().splitlines()
    problems = [line for line in lines if line.startswith('  "gcd-')]
    assert len(problems) == 8
    assert problems == sorted(problems)
    assert max(map(len, lines)) < 300


def test_a_subset_of_the_problems_can_be_compared(recorded, measure):
    stored, _ = recorded
    now = measure(run_seed=5, n=3, k=1)
    wanted = [stored.records[group.problem.id].tally for group in now.groups]
    assert stored.select(now.questions) == wanted


def other(evaluation, **parts):
    """The same answers from a policy that is another one in a part of its fingerprint."""
    questions = evaluation.questions
    fingerprint = replace(questions.fingerprint, **parts)
    policy = replace(questions.policy, fingerprint=fingerprint)
    return replace(evaluation, questions=replace(questions, policy=policy))


class TestNotComparable:
    def refused(self, stored, now):
        with pytest.raises(BaselineError, match="not comparable") as error:
            stored.select(now.questions)
        assert "--grpo-record" in str(error.value)
        return str(error.value)

    def test_more_problems_than_were_recorded(self, recorded, measure):
        assert "not among its 8" in self.refused(recorded[0], measure(n=9))

    def test_another_sampling_setting(self, recorded, measure, answers):
        message = self.refused(recorded[0], measure(engine=answers(temperature=1.5)))
        assert "sampling.temperature was 0.8 and is 1.5" in message

    def test_another_task_version(self, recorded, measure, monkeypatch):
        monkeypatch.setattr(type(GCD), "version", 2)
        assert "task_version was 1 and is 2" in self.refused(recorded[0], measure())

    @pytest.mark.parametrize("part", ["tokenizer", "chat_template"])
    def test_another_tokenizer_or_template(self, recorded, measure, part):
        now = measure()
        now = other(now, **{part: "0" * 64})
        assert part in self.refused(recorded[0], now)

    def test_other_columns_of_a_row_of_the_same_id(self, tmp_path, measure, monkeypatch):
        monkeypatch.setattr(type(GCD), "content", lambda self, problem: problem.id)
        now = measure()
        stored = load(record(tmp_path / "b", [now], root=tmp_path).path)
        assert len(stored.select(now.questions)) == 8
        last = now.questions.ids[-1]
        monkeypatch.setattr(type(GCD), "content", lambda self, p: p.id.replace(last, "other"))
        now = replace(now, questions=replace(now.questions))
        assert f"of problem {last} the columns are not" in self.refused(stored, now)

    def test_names_in_a_file_are_escaped(self, recorded, measure):
        stored = recorded[0]
        stored.header.conditions["\x1b[2J\n::error::"] = "\u202e"
        message = self.refused(stored, measure())
        assert not {"\x1b", "\n", "\u202e"} & set(message)
        assert "::error::" not in message

    def test_another_prompt(self, recorded, measure):
        now = measure()
        questions = now.questions
        prompts = ("other words", *questions.prompts[1:])
        now = replace(now, questions=replace(questions, prompts=prompts))
        assert now.groups[0].problem.id in self.refused(recorded[0], now)

    def test_another_reward(self, recorded, measure):
        def kinder(prompts, completions, **_):
            return [score + 1e-3 for score in reward_func(prompts, completions)]

        assert "reward" in self.refused(recorded[0], measure(reward=kinder))

    def test_other_weights_alone_can_be_compared(self, recorded, measure):
        now = measure()
        now = other(now, weights="0" * 64)
        assert len(recorded[0].select(now.questions)) == 8
        assert not recorded[0].same_policy(now.fingerprint)

    @pytest.mark.parametrize(
        ("bound", "value", "says"),
        [
            (("alpha",), 0.05, "gate.alpha was 0.01 and is 0.05"),
            (("accuracy", "margin"), 0.5, "gate.accuracy.margin was 0.05 and is 0.5"),
            (("length", "minimum"), 0.2, "gate.length.minimum was 0.05 and is 0.2"),
        ],
    )
    def test_other_bounds(self, recorded, measure, monkeypatch, bound, value, says):
        weaker = recorded_bounds()
        *path, last = bound
        target = weaker[path[0]] if path else weaker
        target[last] = value
        monkeypatch.setattr("grpo_harness.baselines.file.recorded_bounds", lambda: weaker)
        assert says in self.refused(recorded[0], measure())

    def test_a_new_rule_is_no_other_bound(self, recorded, measure, monkeypatch):
        """The recorded bounds still hold for the others: a new rule is one entry in a table."""
        more = {**recorded_bounds(), "new": {"margin": 0.5, "minimum": 0.1}}
        monkeypatch.setattr("grpo_harness.baselines.file.recorded_bounds", lambda: more)
        assert len(recorded[0].select(measure().questions)) == 8
        more["length"] = {"margin": 0.9, "minimum": 0.2}
        assert "gate.length.minimum" in self.refused(recorded[0], measure())


class TestDamaged:
    def refused(self, path):
        with pytest.raises(BaselineError) as error:
            load(path)
        message = str(error.value)
        assert str(path) in message
        assert "--grpo-record" in message
        return message

    def test_missing(self, tmp_path):
        assert "there is no baseline" in self.refused(tmp_path / "none.json")

    @pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, recorded, share):
        path = recorded[0].path
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert "cannot be read" in self.refused(path)

    @pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"3", b"\xff\xfe", b"<<<<<<< HEAD"])
    def test_something_else(self, recorded, content):
        recorded[0].path.write_bytes(content)
        self.refused(recorded[0].path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("correct", 99),
            ("correct", -1),
            ("correct", 1.5),
            ("k", 0),
            ("k", True),
            ("log_length", "x"),
            ("log_length", None),
            ("reward", float("nan")),
            ("anchor_k", 0),
            ("anchor", 7),
            ("anchor", 2.0),
            ("k", 501),
            ("anchor_k", 501),
            ("length", 5),
            ("log_length", 10**400),
            ("log_length", -1e9),
            ("log_length", 1e6),
        ],
    )
    def test_impossible_numbers(self, recorded, field, value):
        path = recorded[0].path
        content = json.loads(path.read_text())
        next(iter(content["problems"].values()))[field] = value
        path.write_text(json.dumps(content))
        assert "damaged" in self.refused(path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("accuracy", 0.1),
            ("accuracy", "x"),
            ("task_type", "sort"),
            ("planned", True),
            ("planned", 0),
            ("planned", 10**30),
            ("policy", None),
            ("gate", 3),
            ("conditions", []),
            ("seeds", "x"),
            ("fingerprint", {}),
            ("anchor", {"digest": "0"}),
        ],
    )
    def test_impossible_headers(self, recorded, field, value):
        path = recorded[0].path
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        assert "damaged" in self.refused(path)

    def test_counts_that_were_changed_by_hand(self, recorded):
        path = recorded[0].path
        content = json.loads(path.read_text())
        for entry in content["problems"].values():
            entry["correct"] = 0
        path.write_text(json.dumps(content))
        assert "accuracy is" in self.refused(path)

    @pytest.mark.parametrize("line", ['"gcd-', '"accuracy"'])
    def test_both_sides_of_a_merge(self, recorded, line):
        path = recorded[0].path
        lines = path.read_text().splitlines()
        at = next(i for i, text in enumerate(lines) if text.strip().startswith(line))
        path.write_text("\n".join([*lines[: at + 1], *lines[at:]]))
        assert "twice" in self.refused(path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
    def test_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "fifo.json")
        assert "not a file" in self.refused(tmp_path / "fifo.json")
        (tmp_path / "folder.json").mkdir()
        assert "not a file" in self.refused(tmp_path / "folder.json")

    @pytest.mark.parametrize("name", ["exists", "read_bytes"])
    def test_not_to_be_read(self, recorded, monkeypatch, name):
        def denied(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, name, denied)
        assert "cannot be read (PermissionError" in self.refused(recorded[0].path)
        assert exists(recorded[0].path)

    def test_nested_without_end(self, recorded):
        recorded[0].path.write_text("[" * 100_000)
        assert "cannot be read" in self.refused(recorded[0].path)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda content, record: record.update(total=[[-1.0, 6]]),
            lambda content, record: record.update(rewards={"a": [[1.0, 6]]}),
            lambda content, record: record.update(log_length=record["log_length"] - 1e-4),
            lambda content, record: record.update(truncated=record["truncated"] ^ 1),
            lambda content, record: record.update(columns="x"),
            lambda content, record: content.update(examples=""),
            lambda content, record: content["fingerprint"].update(weights="0" * 64),
            lambda content, record: content["anchor"].update(fingerprint="0" * 16),
            lambda content, record: content.pop("checksum"),
        ],
    )
    def test_any_other_change(self, recorded, edit):
        path = recorded[0].path
        content = json.loads(path.read_text())
        edit(content, next(r for r in content["problems"].values() if not r["unparsable"]))
        path.write_text(json.dumps(content))
        assert "damaged" in self.refused(path)

    @pytest.mark.parametrize(
        ("rewards", "says"),
        [
            ({"total": [[1.0, 4], [0.5, 3]]}, "the rewards are more than 6"),
            ({"rewards": {"a": [], "b": [[1.0, 7]]}}, "the rewards are more than 6"),
            ({"total": [[math.nan, 1]]}, "a reward is not a finite number"),
            ({"rewards": {"a": [[-math.inf, 1]]}}, "a reward is not a finite number"),
        ],
    )
    def test_impossible_rewards(self, recorded, rewards, says):
        """Also without a checksum, as in an older file."""
        path = recorded[0].path
        content = {**json.loads(path.read_text()), "schema": 3}
        next(iter(content["problems"].values())).update(rewards)
        path.write_text(json.dumps(content))
        assert says in self.refused(path)

    def test_another_way_to_write_the_same_is_no_damage(self, recorded):
        path = recorded[0].path
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert load(path).records == recorded[0].records

    def test_a_lost_line(self, recorded):
        path = recorded[0].path
        content = json.loads(path.read_text())
        content["problems"].popitem()
        path.write_text(json.dumps(content))
        assert "problems are not those" in self.refused(path)

    def test_an_anchor_that_was_moved_by_hand(self, recorded):
        path = recorded[0].path
        content = json.loads(path.read_text())
        entry = next(iter(content["problems"].values()))
        entry["anchor"] = 1 if entry["anchor"] == 0 else 0
        path.write_text(json.dumps(content))
        assert "anchor is not the one" in self.refused(path)

    def test_the_schema_before_this_is_read(self, recorded):
        path = recorded[0].path
        content = json.loads(path.read_text())
        gate = {"alpha": 0.01, "margin": 0.05, "minimum": 0.01}
        path.write_text(json.dumps({**content, "schema": 2, "gate": gate}))
        assert load(path).header.gate == content["gate"]
        path.write_text(json.dumps({**content, "schema": 2, "gate": {**gate, "margin": 0.2}}))
        assert load(path).header.gate["truncation"]["margin"] == 0.2

    def test_the_schema_of_the_recorded_pair_is_read_with_its_single_rewards(self, recorded):
        """Schema 3 had no single rewards at first: with 4, whoever cannot read them says so."""
        path = recorded[0].path
        content = json.loads(path.read_text())
        assert content["schema"] == 4
        path.write_text(json.dumps({**content, "schema": 3}))
        older = load(path)
        assert older.records == recorded[0].records
        assert older.header == recorded[0].header
        for file in (ROOT / "baselines").glob("nano-*/*.json"):
            assert any(record.total for record in load(file).records.values())

    @pytest.mark.parametrize("gate", [3, {}, {"alpha": "x"}])
    def test_a_damaged_schema_before_this(self, recorded, gate):
        path = recorded[0].path
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2, "gate": gate}))
        if gate == {"alpha": "x"}:
            assert load(path).header.gate["alpha"] == "x"  # named as another bound by `select`
        else:
            assert "damaged" in self.refused(path)

    def test_another_schema(self, recorded):
        path = recorded[0].path
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
        assert "schema 99" in self.refused(path)


def test_the_reward_digest_is_of_what_a_reward_does():
    def same_rule_other_code(*, prompts, completions, **_):
        return [reward_func([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]

    def stricter(*, prompts, completions, **_):
        return [
            -1.0 if " " in c else s
            for c, s in zip(completions, reward_func(prompts, completions), strict=True)
        ]

    for task_type in task_types().values():
        own, same, other = (
            rewards_digest(Rewards((Reward(reward),)), task_type)
            for reward in (reward_func, same_rule_other_code, stricter)
        )
        assert own == same != other


def test_conditions_name_what_must_not_change(measure):
    named = set(conditions(measure().questions))
    assert named == {"task_version", "reward", "tokenizer", "chat_template", "sampling.temperature"}
