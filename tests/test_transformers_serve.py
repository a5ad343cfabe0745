"""A real server, `transformers serve` in an environment of its own, draws for a policy."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_harness.policy import load

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
EXTRA = ("openai", "fastapi", "uvicorn", "starlette", "jiter", "opentelemetry-api", "sniffio")
SERVE = "import sys; from transformers.cli.transformers import main; sys.exit(main())"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Install what transformers needs to serve, beside the packages of the tests."""
    folder = tmp_path_factory.mktemp("serving")
    how = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
    locked = ["-c", str(ROOT / "requirements.lock")]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, *locked, *EXTRA], check=True)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@contextmanager
def serving(folder, environment, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    how = ["--device", "cpu", "--dtype", "float32", *where]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), *how]
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.terminate()
        server.wait(30)


def admitted(folder, url, model):
    """Admit what serves as the trained policy. It tells no log-probabilities."""
    (folder / "pyproject.toml").write_text(
        "[tool.grpo-harness]\ntasks = ['gcd', 'palindrome']\nproblems = 128\n"
        # It has one seed for all requests at once, so that their draws would not be independent.
        f"[tool.grpo-harness.serve.trained]\nurl = '{url}'\nmodel = '{model}'\nseed = false\n"
    )
    command = [sys.executable, "-m", "grpo_harness.cli", "admit", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def sampling(tmp_path):
    """Copy a policy's files: this server draws greedily, and from the 50 likeliest tokens alone,
    unless their config says otherwise.
    """

    def sampling(name):
        folder = shutil.copytree(load(name).checkpoint.path, tmp_path / name)
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(
            json.dumps({**config, "do_sample": True, "top_k": 0})
        )
        return folder

    return sampling


def test_it_is_compared_by_its_completions(environment, tmp_path, sampling):
    """The trained policy itself is not refused, and the base in its place is."""
    with serving(sampling("nano-trained"), environment, tmp_path / "server.log") as server:
        right = admitted(tmp_path, *server)
    assert ": nano-trained as served: it tells no log-probabilities" in right.stdout, right.stderr
    assert "FAIL: " not in right.stdout
    with serving(sampling("nano-base"), environment, tmp_path / "server.log") as server:
        wrong = admitted(tmp_path, *server)
    assert "FAIL: nano-trained as served: " in wrong.stdout, wrong.stderr
    assert wrong.returncode == 1


def test_what_it_does_by_itself_is_named(environment, tmp_path):
    """Without ``do_sample`` in the checkpoint's config it ignores the temperature."""
    folder = load("nano-trained").checkpoint.path
    with serving(folder, environment, tmp_path / "server.log") as server:
        found = admitted(tmp_path, *server)
    assert "FAIL: nano-trained as served: it draws greedily: " in found.stdout, found.stderr
