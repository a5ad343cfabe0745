import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_harness.engines.engine import Sample
from grpo_harness.store import FILE, Key, Store, StoreError, connect
from grpo_harness.upkeep import former, holdings, prune, repair, seconds, shown, size_of

WHAT = {"policy": "a1", "run_seed": 3, "engine": {"class": "m.E", "engine": "e", "dtype": "fp32"}}


def sample(text, error=None):
    ids = (*map(ord, text), 2)
    return Sample(text, len(ids), truncated=False, error=error, ids=ids)


def key(problem, number=0, prompt="?"):
    return Key.of(problem, prompt, number)


def opened(store, **what):
    return store.open("a-policy", "gcd", {**WHAT, **what})


def stored(file, **what):
    with opened(Store(file), **what) as samples:
        return dict(samples)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / FILE


@pytest.fixture
def store(file):
    return Store(file)


TEXTS = st.text(st.characters(exclude_categories=()), max_size=50)  # surrogates and NUL too
SAMPLES = st.builds(
    lambda text, ids, more, truncated: Sample(text, len(ids) or more, truncated, ids=tuple(ids)),
    *(TEXTS, st.lists(st.integers(0, 2**32)), st.integers(1, 2**40), st.booleans()),
)
KEYS = st.builds(Key.of, TEXTS, TEXTS, st.integers(0, 2**40))


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(KEYS, SAMPLES, max_size=5), st.dictionaries(KEYS, SAMPLES, max_size=5))
def test_what_was_added_is_there_again(first, second):
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        with opened(Store(file)) as samples:
            assert dict(samples) == {}
            samples.add(first)
            samples.add(second)
            assert dict(samples) == {**first, **second}
        assert stored(file) == {**first, **second}


@pytest.mark.parametrize(
    "text", ["\0" * 9, "a\0b", "\ud800", "\ude00\ud83d", "é" * 2**20, "\n\u2028"]
)
def test_a_text_comes_back_exactly(store, file, text):
    with opened(store) as samples:
        samples.add({key(text, prompt=text): Sample(text, 7, truncated=True)})
    ((found, back),) = stored(file).items()
    assert found == key(text, prompt=text)
    assert list(map(ord, back.text)) == list(map(ord, text))


@pytest.mark.parametrize(
    "other",
    [
        {"run_seed": 4},
        {"policy": "b"},
        {"engine": {**WHAT["engine"], "class": "m.F"}},
        {"engine": {**WHAT["engine"], "dtype": "bf16"}},
        {"settings": {"temperature": 1.0}},
    ],
    ids=str,
)
def test_other_draws_have_other_samples(store, file, other):
    with opened(store) as samples:
        samples.add({key("p1"): sample("a")})
    assert stored(file, **other) == {}
    with Store(file).open("a-policy", "sort", WHAT) as samples:
        assert dict(samples) == {}
    with Store(file).open("a-renamed-policy", "gcd", WHAT) as samples:
        assert dict(samples) == {key("p1"): sample("a")}


def test_another_prompt_or_number_is_another_sample(store, file):
    with opened(store) as samples:
        samples.add({key("p1", 0, "What?"): sample("a"), key("p1", 1, "What?"): sample("b")})
    found = stored(file)
    assert key("p1", 0, "what?") not in found
    assert found[key("p1", 1, "What?")].text == "b"


def test_a_failed_draw_is_not_kept(store, file):
    with opened(store) as samples:
        samples.add({key("p1"): sample("", error="no memory"), key("p2"): sample("a")})
        assert samples[key("p1")].error == "no memory"
    assert set(stored(file)) == {key("p2")}


def test_a_fresh_run_ignores_and_replaces_what_is_stored(store, file):
    with opened(store) as samples:
        samples.add({key("p1"): sample("old"), key("p2"): sample("old")})
    fresh = Store(file, draws="all", run="r2")
    with opened(fresh) as samples:
        assert dict(samples) == {}
        samples.add({key("p1"): sample("new")})
    # Another worker of the same run, and then another run.
    with opened(Store(file, draws="all", run="r2")) as samples:
        assert dict(samples) == {key("p1"): sample("new")}
    with opened(Store(file, draws="all", run="r3")) as samples:
        assert dict(samples) == {}
    assert stored(file) == {key("p1"): sample("new"), key("p2"): sample("old")}


def test_a_run_that_draws_nothing_writes_nothing(file, tmp_path):
    with opened(Store(file, draws="none")) as samples:
        assert dict(samples) == {}
    assert list(tmp_path.rglob("*")) == []
    with opened(Store(file)) as samples:
        samples.add({key("p1"): sample("a")})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.db*")}
    with opened(Store(file, draws="none")) as samples:
        assert set(samples) == {key("p1")}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.db*")} == before


def test_the_former_format_is_left_alone(store, file):
    old = file.parent / "samples"
    old.mkdir(parents=True)
    (old / "x-0123.jsonl").write_text('{"problem": "p1"}\n')
    (old / "x-0123.lock").write_text("")
    with opened(store) as samples:
        samples.add({key("p1"): sample("a")})
    assert len(stored(file)) == 1
    assert store.notices == []
    assert sorted(path.name for path in former(file)) == ["x-0123.jsonl", "x-0123.lock"]


# --- a process that dies, and several at once ---------------------------------------------------

BATCH = 16


def _write(file, ready):
    """Add batches for ever; each is said when it is committed."""
    with opened(Store(file)) as samples:
        batch = len(samples) // BATCH
        while True:
            samples.add({key(f"p{batch}", i): sample("a" * 300) for i in range(BATCH)})
            ready.send(batch)
            batch += 1


def test_a_kill_at_any_moment_loses_and_doubles_nothing(file):
    context, luck = multiprocessing.get_context("fork"), random.Random(0)
    committed = set()
    for _ in range(25):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_write, args=(file, theirs))
        child.start()
        theirs.close()
        for _ in range(luck.randint(0, 3)):
            committed.add(ours.recv())
        time.sleep(luck.uniform(0.0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while True:
            try:
                committed.add(ours.recv())
            except EOFError:
                break
        found = stored(file)
        batches = {int(one.problem[1:]) for one in found}
        assert committed <= batches
        assert len(found) == BATCH * len(batches)  # a batch is whole
        assert batches == set(range(len(batches)))  # none is drawn twice
        committed = batches
    assert len(committed) > 25
    with closing(connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == (b"ok",)
        (rows,) = database.execute("SELECT count(*) FROM samples").fetchone()
    assert rows == BATCH * len(committed)


def _draw(file, seed, drawn, barrier):
    barrier.wait()
    for task in ("gcd", "sort"):
        with Store(file).open("a-policy", task, {**WHAT, "run_seed": seed}) as samples:
            for start in range(0, 40, 10):
                missing = [i for i in range(start, start + 10) if key("p", i) not in samples]
                samples.add({key("p", i): sample("a" * 500) for i in missing})
                with drawn.get_lock():
                    drawn.value += len(missing)


@pytest.mark.parametrize("seeds", [(1, 1, 1, 1), (1, 2, 3, 4)])
def test_processes_share_what_is_the_same_and_do_not_disturb_each_other(file, seeds):
    context = multiprocessing.get_context("fork")
    drawn, barrier = context.Value("i", 0), context.Barrier(len(seeds))
    workers = [context.Process(target=_draw, args=(file, s, drawn, barrier)) for s in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert drawn.value == 80 * len(set(seeds))  # also the file was made by all of them at once
    for seed in seeds:
        assert set(stored(file, run_seed=seed)) == {key("p", i) for i in range(40)}


# --- bad states: one line, with what to do ------------------------------------------------------


def one_line(error):
    said = str(error.value)
    assert "\n" not in said
    assert str(error.value).count("samples.db") >= 1
    return said


def test_a_full_file_system_is_one_line_and_costs_that_batch_alone(store, file):
    with opened(store) as samples:
        samples.add({key("p1", i): sample("a" * 300) for i in range(50)})
    code = f"""
import resource, signal, sys
from tests.test_store import *
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with opened(Store(Path({str(file)!r}))) as samples:
    samples.add({{key("p2", 0): sample("b")}})
    try:
        samples.add({{key("p3", i): sample("c" * 300) for i in range(500)}})
    except StoreError as error:
        print(error)
    assert key("p3", 0) not in samples
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = run.stdout.splitlines()
    assert "make room" in line
    assert str(file) in line
    assert len(stored(file)) == 51
    with opened(store) as samples:
        samples.add({key("p3", i): sample("c") for i in range(500)})
    assert len(stored(file)) == 551


def test_a_full_store_is_one_line(store, file, monkeypatch):
    with opened(store) as samples:
        samples.add({key("p1"): sample("a")})
        samples._database.execute("PRAGMA max_page_count = 20")
        with pytest.raises(StoreError, match="make room") as error:
            samples.add({key("p2", i): sample("c" * 300) for i in range(500)})
        assert "grpo-harness store --prune --to" in one_line(error)
        samples._database.execute("PRAGMA max_page_count = 20000")
        samples.add({key("p2"): sample("c")})
    assert set(stored(file)) == {key("p1"), key("p2")}


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with (
        pytest.raises(StoreError, match="-o cache_dir=DIR") as error,
        opened(Store(tmp_path / "cache" / FILE)),
    ):
        pass
    one_line(error)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("draws", ["missing", "none"])
def test_a_folder_that_cannot_be_written_is_one_line(store, file, draws):
    with opened(store) as samples:
        samples.add({key("p1"): sample("a")})
    for place in (file.parent, *file.parent.parents):
        if place.is_relative_to("/tmp") and place != Path("/tmp"):  # noqa: S108
            place.chmod(0o755)

    def as_nobody(says):
        os.setuid(65534)
        try:
            with opened(Store(file, draws=draws)):
                says.send("opened")
        except StoreError as error:
            says.send(str(error))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=as_nobody, args=(theirs,))
    child.start()
    said = ours.recv()
    child.join()
    assert child.exitcode == 0
    assert "\n" not in said
    assert "-o cache_dir=DIR" in said
    assert str(file) in said


@pytest.mark.parametrize("version", [2, 99])
def test_a_file_of_another_version_is_one_line(store, file, version):
    with opened(store):
        pass
    with closing(sqlite3.connect(file)) as database:
        database.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(StoreError, match="no store of this version") as error, opened(store):
        pass
    one_line(error)


def test_another_writer_that_never_ends_is_one_line(store, file, monkeypatch):
    monkeypatch.setattr("grpo_harness.store._WAIT", 0.1)
    with opened(store) as samples, closing(connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process has been writing") as error:
            samples.add({key("p1"): sample("a")})
        one_line(error)
        other.execute("ROLLBACK")
        samples.add({key("p1"): sample("a")})
    assert set(stored(file)) == {key("p1")}


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of 200 samples, and what is in it."""
    file = tmp_path_factory.mktemp("whole") / FILE
    samples = {key(f"p{i}", i % 4): sample(f"answer {i} " * 20) for i in range(200)}
    with opened(Store(file)) as of:
        of.add(samples)
    return file.read_bytes(), samples


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 99_999), st.binary(min_size=1, max_size=300)), max_size=4),
    st.sampled_from([1.0, 1.0, 0.5, 0.04]),
)
def test_damage_of_any_bytes_costs_samples_and_changes_none(whole, noises, left):
    content, samples = whole
    damaged = bytearray(content)
    for place, noise in noises:
        start = len(content) * place // 100_000
        damaged[start : start + len(noise)] = noise
    with TemporaryDirectory() as folder:
        _use_damaged(Path(folder) / FILE, damaged[: int(left * len(damaged))], samples)


def _use_damaged(file, content, samples):
    file.write_bytes(content)
    try:
        with opened(Store(file)) as found:
            assert found.items() <= samples.items()
            lacking = samples.keys() - found.keys()
            found.add({key: samples[key] for key in lacking})
            assert dict(found) == samples
        assert stored(file).items() <= samples.items()
    except StoreError as error:
        said = str(error)
    else:
        said = "--repair"
    assert "--repair" in said
    assert "\n" not in said
    kept, aside = repair(file)
    assert aside.exists()
    assert stored(file).items() <= samples.items()
    assert len(stored(file)) == kept
    with opened(Store(file)) as found:
        found.add(samples)
    assert stored(file) == samples


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("tokens", -3), ("tokens", 99), ("ids", b"\x91\x01"), ("ids", b""), ("ids", None)),
        *(("number", 1), ("problem", b"p9"), ("text", b"b"), ("text", None)),
        *(("truncated", 1), ("sum", b""), ("sum", None), ("run", b"x"), ("draw", b"other")),
    ],
)
def test_a_row_that_contradicts_itself_is_drawn_again_and_said_once(file, column, value):
    with opened(Store(file)) as samples:
        samples.add({key("p0"): sample("a"), key("p1"): sample("b")})
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(
            f"UPDATE samples SET {column} = ? WHERE problem = ?",  # noqa: S608
            (value, b"p0"),
        )
    store = Store(file)
    with opened(store) as samples:
        assert dict(samples) == {key("p1"): sample("b")}
        samples.add({key("p0"): sample("again")})
    seen = column != "draw"  # a row of another draw is not looked at
    assert [f"1 of the samples in {file}" in notice for notice in store.notices] == [True] * seen
    again = Store(file)
    with opened(again) as samples:
        assert set(samples) == {key("p0"), key("p1")}
    assert again.notices == []


def test_a_run_that_draws_nothing_removes_no_damaged_row(file):
    with opened(Store(file)) as samples:
        samples.add({key("p0"): sample("a"), key("p1"): sample("b")})
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE samples SET text = ? WHERE problem = ?", (b"", b"p0"))
    before = file.read_bytes()
    with opened(Store(file, draws="none")) as samples:
        assert set(samples) == {key("p1")}
    assert file.read_bytes() == before


def test_a_file_cut_in_half_keeps_what_its_first_half_has(file):
    samples = {key(f"p{i}"): sample("a" * 300) for i in range(400)}
    with opened(Store(file)) as of:
        of.add(samples)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(StoreError, match="--repair"), opened(Store(file)):
        pass
    kept, _ = repair(file)
    assert 100 < kept < 400
    assert stored(file).items() <= samples.items()
    assert len(stored(file)) == kept


def test_a_row_of_another_draw_is_no_sample_of_this_one(file):
    """What another policy or another run drew is not used, even with its check."""
    for seed in (1, 2):
        with opened(Store(file), run_seed=seed) as samples:
            samples.add({key("p0", seed): sample(str(seed))})
    with closing(sqlite3.connect(file)) as database, database:
        draws = database.execute("SELECT draw FROM samples ORDER BY number").fetchall()
        database.execute("UPDATE samples SET draw = ? WHERE number = 1", draws[1])
    assert set(stored(file, run_seed=2)) == {key("p0", 2)}


def test_a_repair_keeps_all_rows_that_other_pages_do_not_need(file):
    """The index is damaged: no sample can be looked up, and all can be read."""
    samples = {key(f"p{i}"): sample("a" * 200) for i in range(500)}
    with opened(Store(file)) as of:
        of.add(samples)
    with closing(connect(file)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'samples' AND type = 'index'"
        ).fetchone()
    content = bytearray(file.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    file.write_bytes(content)
    with pytest.raises(StoreError, match="grpo-harness store --repair"), opened(Store(file)):
        pass
    assert repair(file) == (500, file.with_name("samples.db.damaged"))
    assert stored(file) == samples
    assert holdings(file)[0].policy == "a-policy"


# --- upkeep -------------------------------------------------------------------------------------


def days_ago(file, ages):
    """Store 100 samples for each age in days, by the seed of the same number."""
    for seed, days in ages.items():
        with opened(Store(file), run_seed=seed) as samples:
            samples.add({key("p", i): sample("a" * 2000) for i in range(100)})
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(
                "UPDATE draws SET drawn = ? WHERE json_extract(identity, '$.run_seed') = ?",
                (time.time() - days * 86_400, seed),
            )


def test_a_store_shows_what_it_holds(file):
    days_ago(file, {1: 40, 2: 3})
    with Store(file).open("other\u202e", "gcd", {**WHAT, "policy": "b2"}) as samples:
        samples.add({key("p1"): sample("a")})
    text = shown(file)
    head, _, _, other, ours = text.splitlines()
    assert "201 samples" in head
    assert float(head.split()[-2]) == pytest.approx(file.stat().st_size / 1e6, abs=0.1)
    assert other.split()[:6] == ["other\\u202e", "b2", "e", "fp32", "1", "1"]
    assert other.endswith("0.0 MB  0 minutes ago")
    assert ours.split()[:6] == ["a-policy", "a1", "e", "fp32", "2", "200"]
    assert ours.endswith("3 days to 40 days ago")


def test_a_prune_by_age_deletes_what_is_older_and_gives_its_room_back(file):
    days_ago(file, {1: 40, 2: 20, 3: 3})
    before = file.stat().st_size
    found = prune(file, before=time.time() - seconds("30d"), most=None, dry_run=True)
    assert found[0] == 100
    assert (file.stat().st_size, len(stored(file, run_seed=1))) == (before, 100)
    assert prune(file, before=time.time() - seconds("30d"), most=None, dry_run=False) == found
    assert file.stat().st_size == pytest.approx(found[1], abs=20_000)
    assert file.stat().st_size < 0.75 * before
    assert [len(stored(file, run_seed=seed)) for seed in (1, 2, 3)] == [0, 100, 100]


def test_a_prune_by_size_deletes_the_oldest_first(file):
    days_ago(file, {1: 3, 2: 40, 3: 20, 4: 1})
    most = int(file.stat().st_size * 0.6)
    gone, left = prune(file, before=None, most=most, dry_run=False)
    assert gone == 200
    assert left <= most
    assert file.stat().st_size <= most
    assert [len(stored(file, run_seed=seed)) for seed in (1, 2, 3, 4)] == [100, 0, 0, 100]
    assert prune(file, before=None, most=most, dry_run=False)[0] == 0


def test_a_run_goes_on_while_its_draw_is_pruned(file):
    with opened(Store(file)) as samples:
        samples.add({key("p1"): sample("a")})
        assert prune(file, before=None, most=0, dry_run=False)[0] == 1
        samples.add({key("p2"): sample("b")})
        assert set(samples) == {key("p1"), key("p2")}
    assert set(stored(file)) == {key("p2")}
    assert holdings(file)[0].samples == 1


@pytest.mark.parametrize(
    ("text", "value"), [("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600.0)]
)
def test_ages(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("500MB", 500_000_000), ("2GB", 2 * 10**9), ("1.5k", 1500), ("7", 7), ("1 tb", 10**12)],
)
def test_sizes(text, value):
    assert size_of(text) == value


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((seconds, text) for text in ("30", "d", "-1d", "１d", "1 day")),
        *((size_of, text) for text in ("MB", "-5MB", "5 pages", "")),
    ],
)
def test_what_is_no_age_or_size_is_said(read, text):
    with pytest.raises(ValueError, match="write "):
        read(text)


def test_12288_samples_are_looked_up_in_a_second(file):
    for task in range(12):
        with Store(file).open("p", str(task), WHAT) as samples:
            samples.add({key(f"p{i}", n): sample("a" * 64) for i in range(256) for n in range(4)})
    start, found = time.process_time(), 0
    for task in range(12):
        with Store(file).open("p", str(task), WHAT) as samples:
            found += sum(key(f"p{i}", n) in samples for i in range(256) for n in range(4))
    assert found == 12_288
    assert time.process_time() - start < 1
