"""Admit a real server of another kind: llama-cpp-python's, with the packaged GGUF of SmolLM2.

``python -m tools.llama PYTHON`` starts the server by an interpreter that has
``llama-cpp-python[server]``, and asks `grpo-harness admit` of it twice: as the policy that it
serves, and as one that it does not serve. ``make server`` installs what it needs.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from grpo_harness.policy import PolicyName, find

PORT = 8123
URL = f"http://127.0.0.1:{PORT}/v1"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is found. Returns 1 if the policy itself is refused, or another admitted."""
    (python,) = argv or sys.argv[1:]
    policy = find(PolicyName("smollm2"))
    assert policy.gguf_file
    with _serving(python, policy.path / policy.gguf_file):
        right, wrong = _admitted("smollm2"), _admitted("nano-trained")
    sys.stdout.write(f"smollm2: {right}\nnano-trained: {wrong}\n")
    return int(right.startswith("FAIL") or not wrong.startswith("FAIL"))


@contextmanager
def _serving(python: str, gguf: Path) -> Iterator[None]:
    # Without every token's logits it tells no log-probabilities.
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "it"]
    how = ["--port", str(PORT), "--logits_all", "true", "--interrupt_requests", "false"]
    server = subprocess.Popen(
        [*command, *how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}: {' '.join(command)}")
            try:
                socket.create_connection(("127.0.0.1", PORT), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit(f"the server does not answer: {' '.join(command)}")
        yield
    finally:
        server.terminate()
        server.wait(30)


def _admitted(policy: str) -> str:
    """Return the verdict on the server as that of a policy."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(
            f"[tool.grpo-harness]\ntrained = '{policy}'\ntasks = ['gcd']\n"
            f"[tool.grpo-harness.serve]\ntrained = {{ url = '{URL}', model = 'it' }}\n",
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "grpo_harness.cli", "admit"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if " as served: " in line]
    return found[0].removeprefix("E ").strip() if found else run.stdout + run.stderr


if __name__ == "__main__":
    raise SystemExit(main())
