"""What a checkpoint's weights say of some texts: ``<baselines>/served/<policy>.json``, in git.

A served policy is admitted by it. Once it is recorded, the weights are not needed any more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from grpo_harness.atomic import read, replace
from grpo_harness.errors import HarnessError
from grpo_harness.text import digest

FOLDER = "served"
_SCHEMA = 1
_LogProbability = Annotated[float, Meta(le=0.0, ge=-1e4)]


class CanaryError(HarnessError):
    """A recorded file cannot be used. One line: the file, what is wrong, what to do."""


class Canaries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Log-probabilities of texts, by the weights of a policy.

    ``asked`` is a digest of prompts and texts. ``scores`` has those of each token of a text but the
    first, and ``noise`` is how much half precision changes them on average. ``likeliest`` has the
    text of the likeliest token after each prompt at ``temperature``, and its probability.
    """

    schema: int = _SCHEMA
    fingerprint: str
    asked: str
    temperature: Annotated[float, Meta(gt=0, le=100)]
    noise: Annotated[float, Meta(ge=0, le=1e4)]
    scores: list[list[_LogProbability]]
    likeliest: list[tuple[str, Annotated[float, Meta(ge=0, le=1)]]]

    def are_of(self, fingerprint: str, asked: str) -> bool:
        """Tell whether they are those of a policy and of these prompts and texts."""
        return (self.fingerprint, self.asked) == (fingerprint, asked)


def asked_digest(prompts: Sequence[str], texts: Sequence[str]) -> str:
    """Digest what is asked."""
    return digest(json.dumps([list(prompts), list(texts)]))


def load(path: Path) -> Canaries | None:
    """Load recorded canaries, if there are some. Raises ``CanaryError`` for a damaged file."""
    return read(path, Canaries, _SCHEMA, CanaryError) if path.exists() else None


def write(canaries: Canaries, path: Path) -> None:
    """Write canaries, rounded: a line for each text."""
    content = msgspec.to_builtins(canaries)
    content["scores"] = [[round(score, 4) for score in of] for of in content["scores"]]
    content["likeliest"] = [[text, round(chance, 5)] for text, chance in content["likeliest"]]
    lists = {name: content.pop(name) for name in ("scores", "likeliest")}
    lines = json.dumps(content, indent=1)[:-2]
    for name, rows in lists.items():
        lines += f',\n "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lines + "\n}\n")
