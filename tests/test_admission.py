"""A server is admitted if it serves the policy that it is said to serve, and named if not."""

import subprocess
import sys

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_harness.admission import admit
from grpo_harness.policy.policy import load
from grpo_harness.reruns import Reruns
from grpo_harness.session import Session
from grpo_harness.settings import resolve
from grpo_harness.sizing import Sizing
from grpo_harness.store import FILE, Store
from tests.servers import Server

NONE = (400, {"error": "this server tells no logprobs"})


def no_logprobs(number, body):
    return NONE if {"logprobs", "prompt_logprobs"} & body.keys() else None


@pytest.fixture
def project_of(tmp_path):
    """Make a session in which a server serves the trained policy of the embedded pair."""
    from contextlib import nullcontext

    def project_of(server, tasks=("gcd", "palindrome", "sort"), **options):
        (tmp_path / "pyproject.toml").write_text(
            f"[tool.grpo-harness]\ntasks = {list(tasks)}\nproblems = 128\n"
        )
        settings = resolve(tmp_path, tmp_path, {"serve_trained": [server.url], **options})
        return Session(
            settings=settings,
            sizing=Sizing(settings),
            run_seed=3,
            shares={},
            code="",
            store=Store(tmp_path / FILE),
            reruns=Reruns(tmp_path),
            progress=lambda *_: nullcontext(lambda _: None),
        )

    return project_of


@pytest.fixture
def admitted(project_of):
    """Admit the trained policy of the embedded pair as a server serves it."""

    def admitted(server, *tasks, **options):
        session = project_of(server, *tasks, **options)
        return admit(session, session.policy("trained"))

    return admitted


@pytest.fixture(scope="module")
def policy():
    return load("nano-trained")


@pytest.fixture(scope="module")
def changed(policy, tmp_path_factory):
    """A function that saves the trained policy with its weights changed by a function."""

    def changed(name, change):
        folder = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_pretrained(policy.checkpoint.path)
        base = AutoModelForCausalLM.from_pretrained(load("nano-base").checkpoint.path)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
                ours.copy_(change(ours, theirs))
        model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        return load(str(folder))

    return changed


def test_the_policy_itself_is_admitted(admitted, policy):
    with Server(policy) as server:
        found = admitted(server)
    assert found.verdict == "PASS", found.message()
    assert "half precision explains" in found.message()


def test_in_half_precision_too(admitted, policy):
    with Server(policy, dtype="bfloat16") as server:
        found = admitted(server)
    assert found.verdict == "PASS", found.message()


def test_the_base_in_its_place_is_named(admitted):
    with Server(load("nano-base")) as server:
        found = admitted(server)
    assert found.verdict == "FAIL"
    assert "it serves nano-base" in found.message()


@pytest.mark.parametrize("back", [0.3, 0.1])
def test_a_stale_checkpoint_is_named(admitted, changed, back):
    stale = changed("stale", lambda ours, base: ours + back * (base - ours))
    with Server(stale) as server:
        found = admitted(server)
    assert found.verdict == "FAIL", found.message()
    assert "another checkpoint, such as a stale" in found.message()


def test_a_quantized_copy_is_named(admitted, changed):
    def eight_bits(ours, _):
        step = ours.abs().amax(-1, keepdim=True) / 15 if ours.dim() > 1 else 1e-9
        return (ours / step).round() * step

    with Server(changed("quantized", eight_bits)) as server:
        found = admitted(server)
    assert found.verdict == "FAIL", found.message()


ALTERED = {
    "begun twice": lambda body: {**body, "prompt": "<|im_start|>" + body["prompt"]},
    "another system message": lambda body: {
        **body,
        "prompt": body["prompt"].replace("helpful", "very helpful"),
    },
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_prompts_are_named(admitted, policy, alter):
    with Server(policy, alter=alter) as server:
        found = admitted(server)
    assert found.verdict == "FAIL"
    assert "adds to prompts, or alters them" in found.message()


def test_the_command_admits_and_refuses(tmp_path, policy):
    """With a server of the trained policy, and with one of the base in its place."""
    (tmp_path / "pyproject.toml").write_text("[tool.grpo-harness]\ntasks = ['gcd']\n")

    def admit(*options):
        command = [sys.executable, "-m", "grpo_harness.cli", "admit", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    with Server(policy) as right, Server(load("nano-base")) as wrong:
        admitted = admit("--grpo-serve-trained", right.url)
        refused = admit("--grpo-serve-trained", wrong.url)
    assert admitted.returncode == 0, admitted.stdout + admitted.stderr
    assert "PASS: nano-trained as served: log-probabilities of " in admitted.stdout
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "FAIL: nano-trained as served: it serves nano-base" in refused.stdout
    none = admit()
    assert none.returncode == 2
    assert none.stderr.startswith("grpo-harness admit: no policy is served: name a server by ")


@pytest.mark.parametrize("most", [40, 120])
def test_a_truncated_context_is_named(admitted, policy, most):
    def cut(body):
        ids = policy.tokenizer(body["prompt"])["input_ids"]
        return {**body, "prompt": policy.tokenizer.decode(ids[-most:])}

    with Server(policy, alter=cut) as server:
        found = admitted(server)
    assert found.verdict == "FAIL"
    assert "it cuts " in found.message()


def test_a_top_k_of_its_own_is_named(admitted, policy):
    """Several servers take the 50 likeliest tokens unless they are told otherwise."""
    with Server(policy, alter=lambda body: {**body, "top_k": 50}) as server:
        found = admitted(server)
    assert "or applies one of its own, such as top_k" in found.message()


@pytest.mark.parametrize(
    ("temperature", "said"), [(0, "it draws greedily"), (1.0, "the server ignores or changes")]
)
def test_an_ignored_temperature_is_named(admitted, policy, temperature, said):
    with Server(policy, alter=lambda body: {**body, "temperature": temperature}) as server:
        found = admitted(server)
    assert found.verdict == "FAIL", found.message()
    assert said in found.message()


@pytest.mark.heavy
def test_without_log_probabilities_completions_are_compared(admitted, policy):
    with Server(policy, faults=no_logprobs) as server:
        found = admitted(server)
        assert found.verdict in ("PASS", "UNPROVEN"), found.message()
        assert "tells no log-probabilities" in found.message()
    with Server(load("nano-base"), faults=no_logprobs) as server:
        assert admitted(server).verdict == "FAIL"


@pytest.mark.heavy
@pytest.mark.parametrize("llama", [True, "without special tokens"])
def test_llama_cpp_is_understood(admitted, policy, llama):
    """It refuses ``top_k`` -1 by a 500, has a penalty of its own, and shifts its scores."""
    with Server(policy, llama=llama) as server:
        found = admitted(server)
        assert found.verdict in ("PASS", "UNPROVEN"), found.message()
        assert "tells no log-probabilities" in found.message()
        drawn = [of for of in server.asked if not {"logprobs", "prompt_logprobs"} & of.keys()]
        assert {(body["top_k"], body["repeat_penalty"]) for body in drawn} == {(0, 1.0)}
        assert not any("repetition_penalty" in body for body in drawn)
    with Server(load("nano-base"), llama=llama) as server:
        assert admitted(server).verdict == "FAIL"


@pytest.mark.parametrize(("form", "tokens"), [("echo", 1), ("echo", 0), ("prompt_logprobs", 1)])
def test_a_server_is_asked_in_each_form(admitted, policy, form, tokens):
    def faults(number, body):
        wanted = form in body and body["max_tokens"] == tokens
        return NONE if {"echo", "prompt_logprobs"} & body.keys() and not wanted else None

    with Server(policy, faults=faults) as server:
        found = admitted(server, ["gcd"])
    assert found.verdict == "PASS", found.message()
    assert "half precision" in found.message()


def test_recorded_canaries_admit_without_weights(project_of, policy, monkeypatch):
    """What the weights say is recorded; then a run is judged by it, and loads none."""
    from grpo_harness import admission
    from grpo_harness.engines import likelihood

    with Server(policy) as right, Server(load("nano-base")) as wrong:
        path = admission.record(project_of(right), project_of(right).policy("trained"))
        # A text is a line of scores, and a prompt one of the likeliest token.
        assert len(path.read_text().splitlines()) == 48 + 48 + 11
        monkeypatch.setattr(likelihood, "by_weights", lambda *_: pytest.fail("weights are read"))
        monkeypatch.setattr(likelihood, "likeliest", lambda *_: pytest.fail("weights are read"))
        session = project_of(right)
        assert admit(session, session.policy("trained")).verdict == "PASS"
        monkeypatch.undo()
        session = project_of(wrong)
        found = admit(session, session.policy("trained"))
    assert (found.verdict, "it serves nano-base" in found.message()) == ("FAIL", True)


def test_canaries_of_another_checkpoint_are_not_used(project_of, policy):
    """A policy that was trained on has other weights: they are read anew."""
    from grpo_harness import admission, canaries

    with Server(policy) as server:
        session = project_of(server)
        path = admission.record(session, session.policy("trained"))
        stored = canaries.load(path)
        wrong = [[2 * score for score in of] for of in stored.scores]
        other = msgspec.structs.replace(stored, fingerprint="another", scores=wrong)
        canaries.write(other, path)
        session = project_of(server)
        assert admit(session, session.policy("trained")).verdict == "PASS"
        canaries.write(msgspec.structs.replace(stored, scores=wrong), path)
        session = project_of(server)
        assert admit(session, session.policy("trained")).verdict == "FAIL"


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[" * 100_000, b'{"schema": 2}'])
def test_damaged_canaries_are_one_clear_line(tmp_path, damage):
    from grpo_harness import canaries

    path = tmp_path / "policy.json"
    path.write_bytes(damage)
    with pytest.raises(canaries.CanaryError, match=r"policy\.json is damaged") as caught:
        canaries.load(path)
    assert "\n" not in str(caught.value)


def test_the_command_records_the_canaries_of_what_is_served(tmp_path, policy):
    (tmp_path / "pyproject.toml").write_text("[tool.grpo-harness]\ntasks = ['gcd']\n")
    suite = ["--pyargs", "grpo_harness.suites.test_served", "--grpo-record", "-rs"]
    with Server(policy) as server:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *suite, "--grpo-serve-trained", server.url],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert (tmp_path / "baselines" / "served" / "nano-trained.json").is_file()
