import hashlib
import json
import multiprocessing

import msgspec
import pytest
from xxhash import xxh3_64_hexdigest

from grpo_harness.engines.engine import Sample
from grpo_harness.store import Store, StoreError, _Line

WHAT = {"policy": "a1", "run_seed": 3}


def sample(text, error=None):
    ids = (*map(ord, text), 2)
    return Sample(text, len(ids), truncated=False, error=error, ids=ids)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "samples")


def test_what_was_added_is_there_again(store):
    with store.open("x", WHAT) as samples:
        assert dict(samples) == {}
        samples.add({("p1", 0): sample("a\nb\u2028c\x00"), ("p1", 1): sample("\ud800")})
        kept = dict(samples)
    with store.open("x", WHAT) as samples:
        assert dict(samples) == kept


def test_other_keys_have_other_samples(store):
    with store.open("x", WHAT) as samples:
        samples.add({("p1", 0): sample("a")})
    for other in ({**WHAT, "run_seed": 4}, {**WHAT, "policy": "b"}):
        with store.open("x", other) as samples:
            assert dict(samples) == {}


def test_a_failed_draw_is_not_kept(store):
    with store.open("x", WHAT) as samples:
        samples.add({("p1", 0): sample("", error="no memory"), ("p2", 0): sample("a")})
        assert samples["p1", 0].error == "no memory"
    with store.open("x", WHAT) as samples:
        assert set(samples) == {("p2", 0)}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_process_that_died_in_a_line_loses_that_line_alone(store, tmp_path, cut):
    with store.open("x", WHAT) as samples:
        samples.add({("p1", 0): sample("a"), ("p2", 0): sample("b")})
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    with store.open("x", WHAT) as samples:
        assert set(samples) == {("p1", 0)}
        samples.add({("p3", 0): sample("c")})
    with store.open("x", WHAT) as samples:
        assert set(samples) == {("p1", 0), ("p3", 0)}
    assert all(json.loads(line) for line in path.read_text().splitlines())


DAMAGE = [b"\xff\xfe\x00binary", b"{}", b"null", b'{"problem": "p2"', b"[" * 100_000, b""]


@pytest.mark.parametrize("line", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_costs_its_sample_alone_and_is_said_once(tmp_path, line):
    with Store(tmp_path).open("x", WHAT) as samples:
        samples.add({(f"p{i}", 0): sample("a") for i in range(3)})
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    store = Store(tmp_path)
    with store.open("x", WHAT) as samples:
        assert set(samples) == {("p0", 0), ("p2", 0)}
        samples.add({("p1", 0): sample("again")})
    assert len(store.notices) == 1
    assert f"1 of the lines in {path}" in store.notices[0]
    again = Store(tmp_path)
    with again.open("x", WHAT) as samples:
        assert set(samples) == {("p0", 0), ("p1", 0), ("p2", 0)}
    assert again.notices == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", -3),
        ("tokens", 99),
        ("ids", [97, 3]),
        ("ids", []),
        ("sample", 1),
        ("problem", "p9"),
        ("text", "b"),
        ("check", ""),
    ],
)
def test_a_line_that_contradicts_itself_is_damaged(tmp_path, field, value):
    with Store(tmp_path).open("x", WHAT) as samples:
        samples.add({("p0", 0): sample("a")})
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}) + "\n")
    with Store(tmp_path).open("x", WHAT) as samples:
        assert dict(samples) == {}


def test_ids_that_do_not_fit_the_tokens_are_damage(tmp_path):
    """Also where the check is right, as an engine's own mistake would leave it."""
    with Store(tmp_path).open("x", WHAT) as samples:
        samples.add({("p0", 0): sample("a"), ("p1", 0): Sample("b", 7, truncated=True)})
    (path,) = tmp_path.glob("*.jsonl")
    line, other = path.read_text().splitlines()
    wrong = _Line(**{**json.loads(line), "ids": (97,)})
    content = {**msgspec.structs.asdict(wrong), "check": wrong.right_check(path.stem[2:])}
    path.write_text(f"{json.dumps(content)}\n{other}\n")
    store = Store(tmp_path)
    with store.open("x", WHAT) as samples:
        assert dict(samples) == {("p1", 0): Sample("b", 7, truncated=True)}
    assert len(store.notices) == 1


def test_samples_of_the_former_format_are_drawn_again_and_not_called_damaged(tmp_path):
    key = hashlib.sha256(json.dumps(WHAT, sort_keys=True).encode()).hexdigest()[:16]
    former = tmp_path / f"x-{key}.jsonl"
    check = xxh3_64_hexdigest(json.dumps([key, "p0", 0, "a", 2, False]).encode())
    line = {"problem": "p0", "sample": 0, "text": "a", "tokens": 2, "truncated": False}
    former.write_text(json.dumps({**line, "check": check}) + "\n")
    store = Store(tmp_path)
    with store.open("x", WHAT) as samples:
        assert dict(samples) == {}
        samples.add({("p0", 0): sample("b")})
    assert store.notices == []
    assert json.loads(former.read_text())["text"] == "a"


def test_a_line_of_another_file_is_damaged(tmp_path):
    """What another policy or another run drew is no sample of this one."""
    for seed in (1, 2):
        with Store(tmp_path).open("x", {"run_seed": seed}) as samples:
            samples.add({("p0", 0): sample(str(seed))})
    one, two = tmp_path.glob("*.jsonl")
    two.write_bytes(one.read_bytes())
    found = []
    for seed in (1, 2):
        with Store(tmp_path).open("x", {"run_seed": seed}) as samples:
            found.append(len(samples))
    assert sorted(found) == [0, 1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match="cannot be read or written") as error,
        Store(tmp_path / "file").open("x", WHAT),
    ):
        pass
    assert "\n" not in str(error.value)


def _add(folder, number):
    with Store(folder).open("x", WHAT) as samples:
        samples.add({(f"p{number}", i): sample("a" * 500) for i in range(20)})


def test_processes_do_not_write_into_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with Store(tmp_path).open("x", WHAT) as samples:
        assert set(samples) == {(f"p{number}", i) for number in range(3) for i in range(20)}
