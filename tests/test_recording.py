"""A recording lowers no bar unsaid, loses nothing, and is written whole or not at all."""

import hashlib
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from grpo_harness.baselines import file as baseline
from grpo_harness.baselines.file import BaselineError, load
from grpo_harness.baselines.pruning import Stale, check_restorable, prune, stale
from grpo_harness.baselines.recording import check_recordable, record
from grpo_harness.engines.engine import Sample
from grpo_harness.policy import PolicyName
from grpo_harness.tasks import task_types

GCD = task_types()["gcd"]


@pytest.fixture
def keep(tmp_path, measure, answers):
    """Record the untrained policy at a skill: 128 problems, 16 samples each."""
    seeds = iter(range(100))

    def keep(skill=0.5, n=128, reason=None, change=None, before=None, **how):
        engine = answers(skill=skill, **how)
        evaluations = [measure(next(seeds), n=n, k=8, engine=engine) for _ in range(2)]
        if change:
            evaluations = [change(evaluation) for evaluation in evaluations]
        made = record(tmp_path / "b", evaluations, root=tmp_path, before=before, reason=reason)
        return SimpleNamespace(stored=load(made.path), notes=" ".join(made.notes))

    return keep


def retrained(evaluation, name=None):
    """The same answers from a policy with other weights, and maybe of another name."""
    questions = evaluation.questions
    policy = questions.policy
    fingerprint = replace(policy.fingerprint, weights="0" * 64)
    named = replace(policy.checkpoint, name=PolicyName(name)) if name else policy.checkpoint
    policy = replace(policy, checkpoint=named, fingerprint=fingerprint)
    return replace(evaluation, questions=replace(questions, policy=policy))


def lines(path):
    """The lines of the problems, by id."""
    found = (line for line in path.read_bytes().splitlines() if line.startswith(b'  "gcd-'))
    return {line.split(b'"')[1].decode(): line.removesuffix(b",") for line in found}


class TestAnchor:
    def test_is_the_first_recording(self, keep):
        made = keep()
        anchor = made.stored.header.anchor
        assert made.stored.header.parent is None
        assert anchor.accuracy == made.stored.header.accuracy
        assert all(r.anchor == r.correct for r in made.stored.records.values())
        assert "it is the anchor" in made.notes

    def test_stands_while_recordings_follow_each_other(self, keep):
        first = keep()
        before = first.stored.path.read_bytes()
        second = keep()
        assert second.stored.header.parent == hashlib.sha256(before).hexdigest()
        assert second.stored.header.anchor == first.stored.header.anchor
        for name, kept in second.stored.records.items():
            assert kept.anchor == first.stored.records[name].correct
        assert any(r.anchor != r.correct for r in second.stored.records.values())

    def test_a_lower_accuracy_is_refused_with_the_file_untouched(self, keep):
        path = keep(0.5).stored.path
        before = path.read_bytes()
        with pytest.raises(BaselineError) as error:
            keep(0.35)
        for part in ("nothing is recorded", "tiny on gcd", " points", "--grpo-accept-regression"):
            assert part in str(error.value)
        assert path.read_bytes() == before

    def test_a_slide_in_small_steps_is_stopped_by_the_anchor(self, keep):
        def slide():
            for step in range(1, 40):
                kept = keep(0.5 - 0.005 * step).stored
                assert kept.header.accuracy > first - 0.06

        first = keep(0.5).stored.header.accuracy
        with pytest.raises(BaselineError, match="the anchor's was"):
            slide()

    def test_a_reason_lowers_it_and_is_kept(self, keep):
        keep(0.5)
        made = keep(0.35, reason="shorter answers are worth it")
        assert "the anchor moves down" in made.notes
        assert made.stored.header.reason == "shorter answers are worth it"
        assert made.stored.header.anchor.reason == "shorter answers are worth it"
        after = keep(0.35).stored.header
        assert after.reason is None
        assert after.anchor.reason == "shorter answers are worth it"

    def test_a_reason_without_a_loss_leaves_it(self, keep):
        first = keep(0.5).stored
        made = keep(0.5, reason="to be sure")
        assert "nothing was lowered" in made.notes
        assert made.stored.header.anchor == first.header.anchor

    def test_a_proven_gain_moves_it_up(self, keep):
        keep(0.5)
        made = keep(0.7, change=retrained)
        n = len(made.stored.records)
        assert f"to {made.stored.header.accuracy:.1%} on the {n} problems of both" in made.notes
        assert "the anchor moves up" in made.notes
        assert made.stored.header.anchor.accuracy == made.stored.header.accuracy
        with pytest.raises(BaselineError, match="the anchor's was"):
            keep(0.55, change=retrained)

    def test_other_sampling_settings_do_not_hide_a_loss(self, keep):
        keep(0.5, temperature=0.8)
        with pytest.raises(BaselineError, match="nothing is recorded"):
            keep(0.35, temperature=1.5)
        made = keep(0.5, temperature=1.5)
        assert "temperature was 0.8 and is 1.5" in made.notes

    def test_another_task_version_sets_it_anew(self, keep, monkeypatch):
        keep(0.5)
        monkeypatch.setattr(type(GCD), "version", 2)
        made = keep(0.3)
        assert "the anchor is set anew" in made.notes
        assert made.stored.header.anchor.accuracy == made.stored.header.accuracy

    @pytest.mark.parametrize("damage", [b"", b"{", b"[]"])
    def test_a_file_that_cannot_be_read_is_replaced_only_with_a_reason(self, keep, damage):
        path = keep(0.5).stored.path
        path.write_bytes(damage)
        with pytest.raises(BaselineError, match="whether the accuracy is lower cannot be tested"):
            keep(0.3)
        assert path.read_bytes() == damage
        assert "the anchor is set anew" in keep(0.3, reason="the disk failed").notes

    def test_too_few_problems_do_not_slip_by_untested(self, keep):
        path = keep(0.8).stored.path
        before = path.read_bytes()
        with pytest.raises(BaselineError, match="shares 63 problems"):
            keep(0.1, n=63)
        assert path.read_bytes() == before
        assert "accepted" in keep(0.1, n=63, reason="a smaller suite").notes

    def test_a_policy_that_stands_in_for_another_is_held_to_its_anchor(self, keep):
        configured = keep(0.8).stored

        def checkpoint(evaluation):
            return retrained(evaluation, "checkpoint-500")

        with pytest.raises(BaselineError, match="nothing is recorded"):
            keep(0.2, change=checkpoint, before=configured.path)
        assert not (configured.path.parent.parent / "checkpoint-500").exists()
        made = keep(0.8, change=checkpoint, before=configured.path).stored
        assert made.header.parent == configured.digest
        assert made.header.anchor == configured.header.anchor


class TestPartial:
    def test_other_problems_stay_byte_for_byte(self, keep):
        path = keep(n=128).stored.path
        before = lines(path)
        made = keep(n=64)
        after = lines(path)
        assert list(after) == list(before)
        asked = {problem.id for problem in GCD.problems(64)}
        assert {name for name in after if after[name] != before[name]} <= asked
        assert all(after[name] == before[name] for name in after if name not in asked)
        assert made.stored.header.kept_from.problems == 64
        correct = sum(r.correct for r in made.stored.records.values())
        assert made.stored.header.accuracy == correct / (128 * 16)

    def test_more_problems_join_those_that_stand(self, keep):
        keep(n=64)
        made = keep(n=128)
        assert len(made.stored.records) == 128
        old = {problem.id for problem in GCD.problems(64)}
        for name, kept in made.stored.records.items():
            assert name in old or kept.anchor == kept.correct

    @pytest.mark.parametrize("how", [{"temperature": 1.5}, {"change": retrained}])
    def test_problems_of_another_policy_or_setting_are_not_mixed_in(self, keep, how):
        path = keep(n=128).stored.path
        before = path.read_bytes()
        with pytest.raises(BaselineError, match=r"64 problems that this run did not ask"):
            keep(n=64, **how)
        assert path.read_bytes() == before


class TestStale:
    @pytest.fixture
    def folder(self, keep, tmp_path):
        keep()
        return tmp_path / "b"

    def test_what_is_asked_is_not_stale(self, folder):
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 128) == []

    def test_a_policy_and_a_task_type_that_are_gone(self, folder):
        (entry,) = stale(folder, {"other"}, {"gcd": GCD}, 128)
        assert "neither base nor trained" in str(entry)
        (entry,) = stale(folder, {"tiny"}, {}, 128)
        assert "not a configured task type" in str(entry)
        prune([entry])
        assert not entry.path.exists()

    def test_problems_that_are_no_longer_drawn(self, keep, folder, monkeypatch):
        path = folder / "tiny" / "gcd.json"
        before = lines(path)
        drawn = GCD.problems(130)
        monkeypatch.setattr(type(GCD), "problems", lambda self, n: drawn[2 : n + 2])
        (entry,) = stale(folder, {"tiny"}, {"gcd": GCD}, 128)
        assert entry.problems == {drawn[0].id, drawn[1].id}
        prune([entry])
        after = lines(path)
        assert after == {name: line for name, line in before.items() if name not in entry.problems}
        assert load(path).records.keys() == after.keys()
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 128) == []

    def test_what_is_left_after_a_prune_is_not_stale(self, keep, folder, monkeypatch):
        drawn = GCD.problems(170)
        monkeypatch.setattr(type(GCD), "problems", lambda self, n: drawn[40 : n + 40])
        prune(stale(folder, {"tiny"}, {"gcd": GCD}, 90))
        assert len(load(folder / "tiny" / "gcd.json").records) == 88
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 90) == []
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 64) == []

    def test_a_task_type_that_has_fewer_problems_now_says_so_elsewhere(self, folder, monkeypatch):
        def few(self, n):
            raise ValueError("has no more than 95")

        monkeypatch.setattr(type(GCD), "problems", few)
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 128) == []

    def test_files_of_another_kind_are_left_alone(self, folder):
        (folder / "recipes").mkdir()
        (folder / "recipes" / "nano.json").write_text("{}")
        assert stale(folder, {"tiny"}, {"gcd": GCD}, 128) == []


class TestWriting:
    def test_is_whole_or_not_at_all(self, keep, monkeypatch):
        path = keep().stored.path
        before = path.read_bytes()

        def full_disk(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(baseline.os, "fsync", full_disk)
        with pytest.raises(BaselineError, match=r"cannot be written .*No space left"):
            keep()
        assert path.read_bytes() == before
        assert {p.name for p in path.parent.iterdir()} == {"gcd.json", "gcd.examples.jsonl"}

    def test_is_refused_with_answers_missing(self, tmp_path, measure, answers):
        class Broken:
            def settings(self):
                return {}

            def remarks(self):
                return {}

            def identity(self):
                return {}

            def sample(self, requests, progress=None):
                good = answers().sample(requests)
                return [*good[:-1], Sample("", 0, False, error="no memory")]

        with pytest.raises(BaselineError, match="nothing is recorded"):
            record(tmp_path / "b", [measure(engine=Broken())])
        assert not (tmp_path / "b").exists()

    def test_what_was_written_is_what_is_written_again(self, keep):
        path = keep().stored.path
        stored = load(path)
        before = path.read_bytes()
        baseline.write(path, stored.header, stored.records)
        assert path.read_text() == before.decode()
        assert json.loads(before)["schema"] == baseline.SCHEMA


class TestRecordable:
    @pytest.fixture
    def repository(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for command in (
            ["init", "-q"],
            ["config", "user.email", "a@example.org"],
            ["config", "user.name", "a"],
        ):
            subprocess.run(["git", *command], check=True)
        (tmp_path / "code.py").write_text("a = 1\n")
        subprocess.run(["git", "add", "."], check=True)
        subprocess.run(["git", "commit", "-qm", "code"], check=True)
        return tmp_path

    def test_from_a_clean_tree(self, repository):
        check_recordable(repository / "baselines", repository)

    def test_not_from_a_dirty_one(self, repository):
        (repository / "code.py").write_text("a = 2\n")
        with pytest.raises(BaselineError, match=r"code\.py"):
            check_recordable(repository / "baselines", repository)

    def test_not_with_a_file_that_git_does_not_know(self, repository):
        (repository / "new.py").write_text("")
        with pytest.raises(BaselineError, match=r"new\.py"):
            check_recordable(repository / "elsewhere", repository)

    def test_other_recordings_do_not_count(self, repository):
        (repository / "baselines").mkdir()
        (repository / "baselines" / "gcd.json").write_text("{}")
        check_recordable(repository / "baselines", repository)

    def test_not_when_git_cannot_tell(self, repository, monkeypatch):
        monkeypatch.setenv("PATH", str(repository / "nothing-here"))
        with pytest.raises(BaselineError, match="git cannot read"):
            check_recordable(repository / "baselines", repository)

    def test_outside_of_any_repository(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        check_recordable(tmp_path / "baselines", tmp_path)

    def test_not_in_ci(self, repository, monkeypatch):
        monkeypatch.setenv("CI", "true")
        with pytest.raises(BaselineError, match="not recorded in CI"):
            check_recordable(repository / "baselines", repository)

    def test_not_from_a_dirty_one_started_elsewhere(
        self, repository, tmp_path_factory, monkeypatch
    ):
        (repository / "code.py").write_text("a = 2\n")
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with pytest.raises(BaselineError, match=r"code\.py"):
            check_recordable(repository / "baselines", repository)

    def test_not_when_git_is_told_to_hide_files(self, repository):
        subprocess.run(["git", "config", "status.showUntrackedFiles", "no"], check=True)
        (repository / "new.py").write_text("")
        with pytest.raises(BaselineError, match=r"new\.py"):
            check_recordable(repository / "baselines", repository)

    def test_not_with_a_broken_index(self, repository):
        (repository / ".git" / "index").write_bytes(b"broken")
        with pytest.raises(BaselineError, match="git cannot read"):
            check_recordable(repository / "baselines", repository)

    def test_not_into_the_top_of_the_repository(self, repository):
        with pytest.raises(BaselineError, match="top folder"):
            check_recordable(repository, repository)

    def test_the_folder_is_named_literally(self, repository):
        (repository / "b1").mkdir()
        (repository / "b1" / "code.py").write_text("")
        with pytest.raises(BaselineError, match="b1"):
            check_recordable(repository / "b[1]", repository)


class TestRestorable:
    @pytest.fixture
    def entry(self, keep, tmp_path):
        return Stale(keep().stored.path, "why")

    def test_only_what_git_could_bring_back_is_pruned(self, entry, tmp_path, monkeypatch):
        with pytest.raises(BaselineError, match="could not restore"):
            check_restorable([entry])
        for command in (
            ["init", "-q"],
            ["add", "b"],
            ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "b"],
        ):
            subprocess.run(["git", *command], check=True, cwd=tmp_path)
        check_restorable([entry])
        monkeypatch.setenv("CI", "true")
        with pytest.raises(BaselineError, match="CI"):
            check_restorable([entry])
        monkeypatch.delenv("CI")
        entry.path.write_text("{}")
        with pytest.raises(BaselineError, match="could not restore"):
            check_restorable([entry])


@pytest.mark.parametrize(("skill", "says"), [(0.0, "no completion is correct"), (0.5, None)])
def test_that_accuracy_cannot_drop_is_noted(keep, skill, says):
    assert ("CAUTION" in keep(skill).notes) == (says is not None)
    assert (says or "the first recording") in keep(skill, reason="again").notes or says is None


def test_that_there_are_too_few_problems_to_judge_is_noted(keep):
    assert "CAUTION: 20 problems are too few to judge, the floor is 64" in keep(n=20).notes
    assert "too few to judge" not in keep(n=64, reason="more").notes
