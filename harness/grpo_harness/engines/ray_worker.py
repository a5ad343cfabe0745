"""A worker of a Ray cluster: draws chunks by the engine of transformers, on the node it is on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from grpo_harness.engines.engine import Request, Sample, Sampling
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.engines.weights import device_of, dtype_of
from grpo_harness.errors import HarnessError
from grpo_harness.policy.checkpoint import PolicyError, PolicyName
from grpo_harness.policy.policy import Policy, load
from grpo_harness.text import escape


@dataclass(frozen=True)
class Work:
    """What all chunks have in common.

    ``device`` and ``dtype`` are those of a worker, which is a GPU or a thread of a CPU. ``code``
    digests the code that draws, on the machine that it is called on.
    """

    device: str
    dtype: str
    resident: Literal["auto", "one", "all"]
    code: Callable[[], str]


@dataclass(frozen=True)
class Asked:
    """A policy by its name, the folder if it is one, and the fingerprint that it must have."""

    name: PolicyName
    folder: str | None
    fingerprint: str

    @classmethod
    def of(cls, policy: Policy) -> Asked:
        """Name a policy as a worker finds it."""
        name = policy.checkpoint.name
        folder = None if name.folder is None else str(name.folder)
        # A relative path starts from a worker's own folder.
        absolute = PolicyName(name.text, name.home.absolute())
        return cls(absolute, folder, str(policy.fingerprint))


@dataclass(frozen=True)
class Greeting:
    """What a worker is: its node, process, number format and a digest of its code."""

    node: str
    pid: int
    dtype: str
    code: str


@dataclass(frozen=True)
class Drawn:
    """The samples of a chunk, a digest of the weights in memory, and the engine's remarks."""

    samples: Sequence[Sample]
    weights: str
    remarks: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """Draws one chunk at a time. Its policies are loaded when it first draws from them.

    Errors that are messages to the user are returned, so that they arrive as they are.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._residents = Residents(work.resident)
        self._engines: dict[str, TransformersEngine] = {}

    def greet(self) -> Greeting | HarnessError:
        """Tell what this worker is."""
        if self._work.device == "cpu":
            torch.set_num_threads(1)
        try:
            dtype = dtype_of(self._work.dtype, device_of(self._work.device))
        except HarnessError as error:
            return _here(error)
        name = str(dtype).removeprefix("torch.")
        return Greeting(socket.gethostname(), os.getpid(), name, self._work.code())

    def draw(
        self, asked: Asked, sampling: Sampling, requests: Sequence[Request]
    ) -> Drawn | HarnessError:
        """Draw the samples of a chunk."""
        try:
            engine = self._engine(asked, sampling)
            samples = engine.drawing(sampling).sample(requests)
        except HarnessError as error:
            return _here(error)
        return Drawn(samples, self._residents.digest(engine.policy), engine.remarks())

    def _engine(self, asked: Asked, sampling: Sampling) -> TransformersEngine:
        if asked.fingerprint not in self._engines:
            self._engines[asked.fingerprint] = TransformersEngine(
                _load(asked),
                sampling,
                device=self._work.device,
                dtype=self._work.dtype,
                residents=self._residents,
            )
        return self._engines[asked.fingerprint]


def _load(asked: Asked) -> Policy:
    """Load a policy, which must be the very one that was asked for. Raises ``PolicyError``."""
    shown = f"policy '{escape(asked.name.text)}'"
    # Without its folder, the name might mean a model of a hub.
    if asked.folder is not None and str(asked.name.folder) != asked.folder:
        raise PolicyError(
            f"{shown}: there is no folder {escape(asked.folder, 1000)}: put it where every node "
            "of the cluster sees it by this path"
        )
    policy = load(asked.name)
    if str(policy.fingerprint) != asked.fingerprint:
        raise PolicyError(
            f"{shown} has the fingerprint {policy.fingerprint}, and {asked.fingerprint} where "
            "pytest runs: give every node the same files"
        )
    return policy


def _here(error: HarnessError) -> HarnessError:
    """Return an error with the name of this node."""
    return type(error)(f"on the node {socket.gethostname()}: {error}")
