"""A Ray cluster draws what this machine alone would, whatever happens to its workers."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from grpo_harness.engines import chunks, ray_cluster
from grpo_harness.engines.engine import EngineError, Request, Sampling, sample_seed
from grpo_harness.engines.ray import RayEngine
from grpo_harness.engines.ray_cluster import Cluster
from grpo_harness.engines.ray_worker import Asked, Worker
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.evaluation import ask, evaluate
from grpo_harness.policy.checkpoint import PolicyError
from grpo_harness.policy.policy import load
from grpo_harness.settings import SettingsError, resolve
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import task_types
from tests.projects import OWN_SUITE

ROOT = Path(__file__).parent.parent
SAMPLING = Sampling(max_new_tokens=48)


@pytest.fixture(scope="module")
def nano():
    return load("nano-base")


@pytest.fixture(scope="module")
def requests(nano):
    """512 requests, four chunks, of problems with long and with short answers."""
    problems = [p for name in ("sort", "gcd") for p in task_types()[name].problems(64)]
    return [
        Request(nano.render(p.prompt), sample_seed(3, p.id, number))
        for p in problems
        for number in range(4)
    ]


@pytest.fixture(scope="module")
def alone(nano, requests):
    """What this machine draws without a cluster."""
    with TransformersEngine(nano, SAMPLING, device="cpu") as engine:
        return engine.sample(requests)


def digest():
    """Stands for the digest of the code, which is the same everywhere here."""
    return "code"


def on(cluster, policy, mode="auto"):
    return RayEngine(policy, SAMPLING, cluster, Residents(mode))


# Without a cluster.


def test_without_the_package_the_error_says_what_to_install(nano, requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'grpo-harness\[ray\]'") as raised:
        on(Cluster(device="cpu"), nano).sample(requests)
    assert "\n" not in str(raised.value)


def test_a_run_that_needs_nothing_new_starts_no_cluster(nano, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    engine = on(Cluster(device="cpu"), nano)
    local = TransformersEngine(nano, SAMPLING, device="cpu")
    assert engine.settings() == local.settings()
    assert engine.identity() == {**local.identity(), "engine": "ray"}
    assert engine.sample([]) == []


def test_a_run_that_only_scores_draws_nothing(nano, requests):
    with pytest.raises(EngineError, match="--grpo-rescore loads no weights"):
        on(Cluster(device="cpu"), nano, "none").sample(requests)


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_of_one_machine_is_refused(tmp_path, device):
    with pytest.raises(SettingsError, match=f"engine ray has no device '{device}'"):
        resolve(tmp_path, tmp_path, {"engine": "ray", "device": device})


def test_the_workers_of_xdist_do_not_fight_for_a_cluster(project):
    result = project.runpytest_subprocess("-p", "xdist", "-n", "2", "--grpo-engine", "ray")
    result.stderr.fnmatch_lines(["ERROR: the engine ray already draws on all workers*leave out -n"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_a_worker_draws_only_the_policy_that_was_asked_for(tiny, save_tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "policy")
    asked, requests = Asked.of(load(str(folder))), [Request("a", 1)]

    def said():
        worker = Worker(ray_cluster.Work("cpu", "float32", "auto", digest))
        found = worker.draw(asked, Sampling(max_new_tokens=2), requests)
        assert isinstance(found, PolicyError)
        return str(found)

    shutil.rmtree(folder)
    assert f"there is no folder {folder}: put it where every node" in said()
    save_tiny(folder, seed=9)
    assert f"{asked.fingerprint} where pytest runs: give every node the same files" in said()
    assert os.uname().nodename in said()


# On a cluster of two nodes.


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a CPU each, on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    started.add_node(num_cpus=1)
    started.wait_for_nodes()
    yield started
    started.shutdown()


@pytest.fixture
def cluster(nodes, monkeypatch):
    """The cluster as a run sees it, with both nodes there."""
    while len(nodes.list_all_nodes()) < 2:
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    cluster = Cluster(code=digest)
    yield cluster
    cluster.close()


class Once:
    """A progress that does something to the cluster when the first chunk is done."""

    def __init__(self, action):
        self.action, self.done, self.calls = action, 0, 0

    def __call__(self, n):
        self.done += n
        self.calls += 1
        if self.calls == 1:
            self.action()


def busy(cluster):
    """The process of a worker that is in the middle of a chunk."""
    at_work = [m for m in cluster.members if m.answer is not None and m.at == "chunk"]
    return at_work[0].greeting.pid


@pytest.mark.heavy
def test_the_samples_are_those_of_one_machine(cluster, nano, requests, alone):
    progress = Once(lambda: None)
    engine = on(cluster, nano)
    assert engine.sample(requests, progress) == alone
    assert progress.done == len(requests)
    assert len({member.greeting.pid for member in cluster.members}) == 2
    # In another order, and fewer: other chunks.
    some = [*range(0, 512, 3)][::-1]
    assert engine.sample([requests[i] for i in some]) == [alone[i] for i in some]


@pytest.mark.heavy
def test_the_samples_do_not_depend_on_threads(nano, requests, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        with TransformersEngine(nano, SAMPLING, device="cpu") as engine:
            assert engine.sample(requests[:128]) == alone[:128]
    finally:
        torch.set_num_threads(before)


@pytest.mark.heavy
def test_what_a_killed_worker_had_is_drawn_by_another(cluster, nano, requests, alone):
    engine = on(cluster, nano)
    engine.sample(requests[:256])  # both have loaded the weights
    kill = Once(lambda: os.kill(busy(cluster), signal.SIGKILL))
    assert engine.sample(requests, kill) == alone
    assert kill.done == len(requests)
    assert len(cluster.lost) == 1
    assert len(cluster.members) == 1
    # The next draw starts another in its place.
    assert engine.sample(requests) == alone
    assert len(cluster.members) == 2


@pytest.mark.heavy
def test_what_a_removed_node_had_is_drawn_by_another(cluster, nodes, nano, requests, alone):
    engine = on(cluster, nano)
    engine.sample(requests[:256])
    (other,) = nodes.worker_nodes
    remove = Once(lambda: nodes.remove_node(other, allow_graceful=False))
    assert engine.sample(requests, remove) == alone
    # Another may have drawn what it had before Ray notices.
    since = time.monotonic()
    while not cluster.lost:
        assert time.monotonic() - since < 60
        assert engine.sample(requests[:256]) == alone[:256]
    assert len(cluster.lost) == 1
    assert engine.sample(requests) == alone


@pytest.fixture
def judge(nano, requests, tmp_path):
    """A function that evaluates on an engine, with one store for all; it counts the requests."""
    gcd = task_types()["gcd"]
    store = Store(tmp_path / FILE)

    def judge(engine, asked, progress=None):
        own = engine.sample

        def counted(requests, progress):
            asked.extend(requests)
            return own(requests, progress)

        engine.sample = counted
        questions = ask(nano, gcd, 128, settings=engine.settings())
        return evaluate(questions, engine, k=4, run_seed=7, store=store, progress=progress)

    return judge


@pytest.mark.heavy
def test_a_run_goes_on_where_its_last_worker_was_lost(cluster, nano, requests, judge):
    engine = on(cluster, nano)
    engine.sample(requests[:256])

    def kill_all():
        for member in cluster.members:
            os.kill(member.greeting.pid, signal.SIGKILL)

    asked, again = [], []
    said = (
        r"^no worker of the Ray cluster is left \(.*run again with the same --grpo-seed, which goes"
    )
    with pytest.raises(EngineError, match=said) as raised:
        judge(engine, asked, lambda n: n and kill_all())
    assert len(asked) == 512
    assert len(raised.value.drawn) == 128
    found = judge(on(cluster, nano), again)
    kept = [asked[number] for number in raised.value.drawn]
    assert sorted([*kept, *again], key=repr) == sorted(asked, key=repr)
    # The local engine does not share the store, and says the same.
    local = []
    with TransformersEngine(nano, SAMPLING, device="cpu") as engine:
        assert judge(engine, local).groups == found.groups
    assert len(local) == 512


@pytest.mark.heavy
def test_completions_that_kill_their_workers_are_given_up(cluster, nano, requests, monkeypatch):
    engine = on(cluster, nano)
    # A worker dies whenever it is given a chunk, and each is replaced at once.
    own = Cluster._lose

    def replaced(self, member, handout, policy):
        own(self, member, handout, policy)
        self._staff(2)

    monkeypatch.setattr(Cluster, "_lose", replaced)
    monkeypatch.setattr(ray_cluster.Asked, "of", classmethod(lambda cls, policy: Deadly()))
    with pytest.raises(EngineError, match="lost with 3 workers, one after another") as raised:
        engine.sample(requests[:64])
    assert raised.value.drawn == {}
    assert len(cluster.lost) == 3
    assert chunks.AGAIN == 2


class Deadly:
    """What kills the process that reads it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.heavy
def test_a_slow_worker_holds_nothing_up(cluster, nano, requests, alone):
    engine = on(cluster, nano)
    engine.sample(requests)
    slow, _ = cluster.members
    with tenfold_slower(slow.greeting.pid):
        assert engine.sample(requests) == alone
        assert slow.answer is not None  # another has drawn what it is still at
        assert engine.sample(requests[:128]) == alone[:128]
    assert engine.sample(requests) == alone
    assert cluster.lost == []


class tenfold_slower:  # noqa: N801 - reads as a verb
    """Lets a process run a tenth of the time."""

    def __init__(self, pid):
        self.pid, self.over = pid, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.is_set():
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(0.27)
            os.kill(self.pid, signal.SIGCONT)
            time.sleep(0.03)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.heavy
def test_an_error_of_a_policy_is_one_line_with_its_node(cluster, tiny, tmp_path):
    policy = load(str(shutil.copytree(tiny, tmp_path / "policy")))
    (tmp_path / "policy" / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"^on the node \S+: .*model\.safetensors") as raised:
        on(cluster, policy).sample([Request(f"p{i}", i) for i in range(200)])
    assert "\n" not in str(raised.value)


@pytest.mark.heavy
def test_nodes_with_other_code_are_refused(nodes, nano, requests, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    cluster = Cluster(code=os.getpid)
    try:
        for _ in range(2):  # it is not let in by the second draw either
            with pytest.raises(EngineError, match="has another version of grpo-harness"):
                on(cluster, nano).sample(requests[:8])
    finally:
        cluster.close()


@pytest.mark.heavy
def test_two_policies_with_the_same_weights_are_told(cluster, tiny, tmp_path):
    import safetensors.torch

    copy = shutil.copytree(tiny, tmp_path / "copy")
    file = copy / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(iter(weights))
    weights[name].view(-1)[0] = weights[name].view(-1)[0].nextafter(torch.tensor(9.0))
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    cluster._dtype, residents = "bfloat16", Residents()
    asked = [Request("a", 1)]
    RayEngine(load(str(tiny)), SAMPLING, cluster, residents).sample(asked)
    with pytest.raises(EngineError, match="has the same weights"):
        RayEngine(load(str(copy)), SAMPLING, cluster, residents).sample(asked)


@pytest.mark.heavy
def test_a_cluster_that_is_not_there_is_one_line(nano, requests, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EngineError, match=r"RAY_ADDRESS=127\.0\.0\.1:1 cannot be joined") as raised:
        on(Cluster(code=digest), nano).sample(requests[:8])
    assert "\n" not in str(raised.value)


# As a run.


@pytest.fixture
def own_project(pytester, monkeypatch):
    """A project that judges the embedded pair by the baselines of this repository."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "180")
    pytester.makepyprojecttoml(
        f"""
        [tool.pytest.ini_options]
        addopts = "-p no:benchmark -p no:xdist"

        [tool.grpo-harness]
        tasks = ["gcd", "sort"]
        problems = 64
        baselines = "{ROOT / "baselines"}"
        """
    )
    pytester.makepyfile(test_own=OWN_SUITE)
    return pytester


@pytest.mark.heavy
def test_a_run_says_what_it_says_without_a_cluster(own_project):
    arguments = ("-W", "error", "--grpo-seed", "5")
    local = own_project.runpytest_subprocess(*arguments)
    result = own_project.runpytest_subprocess(*arguments, "--grpo-engine", "ray")
    tables = [
        [line for line in found.outlines if line.startswith(("gcd ", "sort "))]
        for found in (local, result)
    ]
    assert len(tables[0]) == 4
    assert tables[0] == tables[1]
    assert result.ret == local.ret
    again = own_project.runpytest_subprocess(*arguments, "--grpo-engine", "ray", "--grpo-rescore")
    assert [line for line in again.outlines if line.startswith(("gcd ", "sort "))] == tables[0]


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@pytest.mark.heavy
@pytest.mark.parametrize("at", ["raylet", "ray::Worker"])
def test_an_interrupted_run_leaves_no_process(own_project, at):
    """While the cluster starts, and while it draws."""
    own_project.makepyfile(test_own="def test_it_is_drawn(evaluation): pass")
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and their processes.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--grpo-engine=ray", "--grpo-problems=1000"],
        cwd=own_project.path,
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    me, started = psutil.Process(run.pid), []
    while not any(at in name for name in map(_command, started)):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.2)
        started = me.children(recursive=True)
    started = me.children(recursive=True)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, said
    _, left = psutil.wait_procs(started, timeout=20)
    assert left == []
