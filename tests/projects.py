"""What tests of the plugin do in projects of their own."""

import os
import shutil
import subprocess
from pathlib import Path

FILES = Path(__file__).parent / "own_repository"
"""A team's own repository, without what it makes: its policies, runs and records."""

OWN_SUITE = """
def test_accuracy(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)
"""


def run(project, *arguments, **outcomes):
    """Run pytest in a project, in this process; its outcomes, where some are given."""
    result = project.runpytest_inprocess("-p", "no:xdist", *arguments)
    if outcomes:
        result.assert_outcomes(**outcomes)
    return result


SEVERAL = """
import contextlib, io, sys
from grpo_harness.cli import main

for command in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(command.split())
    sys.stdout.write(f"\\0{status} {said.getvalue()}")
"""
"""Runs each of its arguments as a command of ours: torch is imported once for all."""


class Team:
    """A repository, and the Python of an environment that has the wheel installed."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python

    def python_run(self, *arguments):
        """Run Python in the repository, in a process of its own."""
        env = {k: v for k, v in os.environ.items() if k not in ("CI", "GITHUB_STEP_SUMMARY")}
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env={**env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )

    def harness(self, *commands):
        """Run commands of `grpo-harness` one after another; return the exit status and the output
        of each.
        """
        done = self.python_run("-P", "-c", SEVERAL, *commands)
        assert done.returncode == 0, done.stderr[-3000:]
        return [(int(text[0]), text[2:]) for text in done.stdout.split("\0")[1:]]

    def pytest(self, *arguments):
        """Run pytest; return its exit status, and what it said in one line."""
        # -P: the repository is not on the path because of the way in which pytest is started.
        done = self.python_run("-P", "-m", "pytest", *arguments)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def commit(self, message):
        """Commit everything."""
        author = ("-c", "user.name=Team", "-c", "user.email=team@example.org")
        for command in (["add", "."], [*author, "commit", "--quiet", "-m", message]):
            subprocess.run(["git", *command], check=True, cwd=self.folder)

    def copy(self, folder):
        """Return a copy of the repository in a folder, to change."""
        left = shutil.ignore_patterns(".pytest_cache", "__pycache__")
        shutil.copytree(self.folder, folder / "repository", ignore=left)
        return Team(folder / "repository", self.python)

    def replace(self, file, old, new):
        """Replace a text that is in a file once."""
        text = (self.folder / file).read_text()
        assert text.count(old) == 1
        (self.folder / file).write_text(text.replace(old, new))
