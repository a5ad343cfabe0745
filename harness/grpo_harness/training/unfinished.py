"""The checkpoints of a training run that is not finished, in a folder beside the result.

``<out>.unfinished`` holds ``run.json``, which identifies the run, and one folder for each
checkpoint with a manifest: the digest of every file, written last. A checkpoint that does not match
its manifest, because it is incomplete or foreign, is never read. Nothing here loads torch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grpo_harness.errors import HarnessError
from grpo_harness.text import digest, one_line

_RUN, _MANIFEST, _LOCK, _HALF = "run.json", "manifest.json", ".lock", "run.json.half"


class UnfinishedError(HarnessError):
    """An unfinished run cannot be continued by this one. One line: why, and what to do."""


class Unfinished:
    """The folder of a run under way, held by one process at a time.

    ``run`` identifies the run: only an equal one may continue from its checkpoints. ``notices``
    tells which checkpoints were left out and why. Raises ``UnfinishedError`` when another process
    holds the folder, or when it keeps the checkpoints of another run.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder_of(out)
        self.notices: list[str] = []
        self._run: dict[str, Any] = json.loads(json.dumps(run, default=str))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnfinishedError(
                f"{self.folder}, where the checkpoints of {out} are kept, cannot be made "
                f"({one_line(error)}): name another folder"
            ) from error
        self._lock = FileLock(self.folder / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UnfinishedError(
                f"{self.folder} is in use: another process trains into {out}; wait for it, or "
                "name another folder"
            ) from None
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        path = self.folder / _RUN
        was = _json(path)
        if was is None and {path.name for path in self.folder.iterdir()} - {_LOCK, _HALF}:
            raise UnfinishedError(
                f"{self.folder} is not the folder of an unfinished run: remove it, or name "
                "another folder"
            )
        if was is not None and was != self._run and _last(self.folder, was) is not None:
            raise UnfinishedError(
                f"{self.folder} keeps the checkpoints of another run ({_difference(was, self._run)}"
                "): remove it, name another folder, or go on with that run's own settings"
            )
        if was != self._run:
            for child in self.folder.iterdir():
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
            text = json.dumps(self._run, indent=1)
            (self.folder / _HALF).write_text(text + "\n", encoding="utf-8")
            (self.folder / _HALF).replace(path)

    def last(self) -> Path | None:
        """Return the folder of the last valid checkpoint, or None; newer ones are removed."""
        for path in _checkpoints(self.folder):
            wrong = _wrong(path, self._run)
            if wrong is None:
                return path
            self.notices.append(f"{path} is left out: {wrong}")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return None

    def seal(self, checkpoint: Path) -> None:
        """Write the manifest of a complete checkpoint."""
        # A pickle that nothing needs; somebody might load it.
        (checkpoint / "training_args.bin").unlink(missing_ok=True)
        manifest = {"run": _digest(self._run), "files": _files(checkpoint)}
        (checkpoint / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def leave(self) -> str | None:
        """Unlock the folder. Returns what is kept, in words; without a checkpoint it is removed."""
        self._lock.release()
        return leave(self.folder)

    def remove(self) -> None:
        """Remove the folder: the run is finished."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raise ``FileExistsError`` if ``out`` exists already, also as a broken link."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: name another folder, or remove it")


def folder_of(out: Path) -> Path:
    """Return the folder for the checkpoints of a run that will write ``out``."""
    return out.with_name(f"{out.name}.unfinished")


def leave(folder: Path) -> str | None:
    """Return what the folder of a run that ended early keeps; remove it if it has no checkpoint."""
    run = _json(folder / _RUN)
    kept = _last(folder, run) if run is not None else None
    if kept is not None:
        return (
            f"{kept} is kept: the same command continues from there, another recipe needs "
            "another --out"
        )
    if run is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _last(folder: Path, run: Mapping[str, Any]) -> Path | None:
    return next((path for path in _checkpoints(folder) if _wrong(path, run) is None), None)


def _checkpoints(folder: Path) -> list[Path]:
    steps = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return [steps[n] for n in sorted(filter(str.isdecimal, steps), key=int, reverse=True)]


def _wrong(checkpoint: Path, run: Mapping[str, Any]) -> str | None:
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return "it is not a folder that a run wrote"
    manifest = _json(checkpoint / _MANIFEST)
    if manifest is None:
        return "it was not written to its end"
    if manifest.get("run") != _digest(run):
        return "another run wrote it"
    promised, found = manifest.get("files"), _files(checkpoint)
    if not isinstance(promised, dict):
        return "its manifest cannot be read"
    changed = [n for n in sorted(promised.keys() | found) if promised.get(n) != found.get(n)]
    return f"{changed[0]} is not what was written" if changed else None


def _files(checkpoint: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name != _MANIFEST:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _digest(run: Mapping[str, Any]) -> str:
    return digest(json.dumps(run, sort_keys=True))


def _difference(was: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> str:
    for key in sorted(was.keys() | now.keys()):
        then, this = was.get(key), now.get(key)
        if isinstance(then, dict) and isinstance(this, dict) and then != this:
            return _difference(then, this, f"{within}{key}.")
        if then != this:
            return f"{within}{key} was {then!r}, and is {this!r}"
    return "no difference"
