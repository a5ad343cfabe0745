"""Only checkpoints that the same run wrote, to their end, are ever gone on from."""

import json
from pathlib import Path

import pytest

from grpo_harness.training.unfinished import Unfinished, UnfinishedError, folder_of

RUN = {"config": {"learning_rate": 2e-6, "beta": 0.0}, "processes": 1}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "trained"


def checkpoint(unfinished, step, *, sealed=True):
    folder = unfinished.folder / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of step %d" % step)
    (folder / "shards" / "0.distcp").write_bytes(b"a part")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    if sealed:
        unfinished.seal(folder)
    return folder


def begun(out, run=RUN, steps=(2, 10)):
    unfinished = Unfinished(out, run)
    folders = [checkpoint(unfinished, step) for step in steps]
    assert (unfinished.leave() is None) == (not steps)
    return folders


def test_the_last_checkpoint_is_the_one_of_the_highest_step(out):
    _, tenth = begun(out)
    again = Unfinished(out, RUN)
    assert again.last() == tenth
    assert not again.notices
    assert not list(out.parent.rglob("training_args.bin"))
    assert f"{tenth} is kept" in again.leave()


def test_with_no_checkpoint_nothing_is_left(out):
    unfinished = Unfinished(out, RUN)
    checkpoint(unfinished, 2, sealed=False)
    assert unfinished.leave() is None
    assert not list(out.parent.iterdir())


def rewrite(folder):
    (folder / "model.safetensors").write_bytes(b"weights of step XX")


def add(folder):
    (folder / "optimizer.pt").write_bytes(b"a pickle")


def lose(folder):
    (folder / "shards" / "0.distcp").unlink()


def unseal(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])


def adopt(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "run": "another"}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (rewrite, "model.safetensors is not what was written"),
        (add, "optimizer.pt is not what was written"),
        (lose, "shards/0.distcp is not what was written"),
        (unseal, "not written to its end"),
        (cut_manifest, "not written to its end"),
        (adopt, "another run wrote it"),
    ],
)
def test_checkpoint_that_is_not_whole_or_not_its_own_is_left_out(harm, why, out):
    second, tenth = begun(out)
    harm(tenth)
    again = Unfinished(out, RUN)
    assert again.last() == second
    (notice,) = again.notices
    assert why in notice
    assert not tenth.exists()


def link(path):
    target = path.with_name("elsewhere")
    target.mkdir()
    path.symlink_to(target)


@pytest.mark.parametrize("put", [link, lambda path: path.write_text("not a folder")])
def test_what_only_has_a_checkpoints_name_is_left_out(put, out):
    _, tenth = begun(out)
    put(out.with_name("trained.unfinished") / "checkpoint-11")
    again = Unfinished(out, RUN)
    assert again.last() == tenth
    assert "checkpoint-11 is left out: it is not a folder that a run wrote" in again.notices[0]
    assert not (again.folder / "checkpoint-11").exists()
    assert put is not link or (again.folder / "elsewhere").is_dir()


def test_folder_that_cannot_be_made_is_an_error(out):
    folder_of(out).write_text("a file")
    with pytest.raises(UnfinishedError, match=r"cannot be made .*: name another folder"):
        Unfinished(out, RUN)


def test_another_runs_checkpoints_are_refused_and_the_difference_named(out):
    begun(out)
    other = {**RUN, "config": {**RUN["config"], "beta": 0.04}}
    with pytest.raises(UnfinishedError, match=r"config\.beta was 0\.0, and is 0\.04"):
        Unfinished(out, other)
    Unfinished(out, RUN).remove()
    assert not folder_of(out).exists()


def test_another_run_without_a_checkpoint_gives_way(out):
    killed = Unfinished(out, RUN)
    checkpoint(killed, 2, sealed=False)
    (killed.folder / "completions").mkdir()
    killed._lock.release()
    other = Unfinished(out, {**RUN, "processes": 2})
    assert not [path for path in other.folder.iterdir() if path.is_dir()], "nor completions"
    assert (other.last(), other.notices) == (None, [])


def test_a_run_that_was_killed_as_it_began_is_begun_again(out, monkeypatch):
    """The power fails while the first file is written."""
    write = Path.write_text

    def cut(path, text, **how):
        write(path, text[: len(text) // 2], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        Unfinished(out, RUN)
    monkeypatch.undo()
    assert [path.name for path in folder_of(out).iterdir() if path.suffix != ".lock"]
    again = Unfinished(out, RUN)
    checkpoint(again, 2)
    assert "checkpoint-2 is kept" in again.leave()


def test_folder_of_something_else_is_left_alone(out):
    folder_of(out).mkdir()
    (folder_of(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(UnfinishedError, match="not the folder of an unfinished run"):
        Unfinished(out, RUN)
    assert (folder_of(out) / "thesis.tex").exists()


def test_one_run_at_a_time(out):
    first = Unfinished(out, RUN)
    with pytest.raises(UnfinishedError, match="is in use"):
        Unfinished(out, RUN)
    first.remove()
    Unfinished(out, RUN).remove()
