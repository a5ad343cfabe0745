"""A Ray cluster as a run sees it: workers that are started, asked, lost and ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import psutil
import torch

from grpo_harness.engines.chunks import AGAIN, Handout, LostError, chunks
from grpo_harness.engines.engine import EngineError, Request, Sampling
from grpo_harness.engines.ray_worker import Asked, Drawn, Greeting, Work, Worker
from grpo_harness.errors import HarnessError
from grpo_harness.policy.policy import Policy
from grpo_harness.text import escape, one_line, together

_ADDRESS = "RAY_ADDRESS"

_START = 300.0
"""Seconds within which a worker must have started."""

_REACH = 10.0
"""Seconds within which the address of a cluster must take a connection."""

_END = 5.0
"""Seconds that the processes of a cluster of this machine have to end by themselves."""

_LOOK = 0.5
"""Seconds between two looks for chunks that take unusually long."""

_AGAIN = "see to the cluster, then run again with the same --grpo-seed, which goes on from here"


@dataclass(eq=False)
class Member:
    """A worker, and what it is at: its greeting, a chunk, or one of an earlier draw (a leftover).

    ``answer`` is Ray's reference to what it was asked last, and ``None`` when it is idle.
    """

    actor: Any
    answer: Any
    at: Literal["greeting", "chunk", "leftover"] = "greeting"
    greeting: Greeting | None = None


class Cluster:
    """The cluster of a run, whose workers all policies share.

    It is that of ``RAY_ADDRESS``, or one on this machine that `close` ends. A worker has a GPU, or
    a CPU and one thread. ``device`` is ``auto`` (GPUs if the cluster has some), ``cuda`` or
    ``cpu``, and ``code`` digests the code that draws, where it is called. ``lost`` says why workers
    were lost. Nothing is started before it is needed.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        resident: Literal["auto", "one", "all"] = "auto",
        code: Callable[[], str] = str,
    ) -> None:
        self.members: list[Member] = []
        self.lost: list[str] = []
        self._device, self._dtype, self._resident, self._code = device, dtype, resident, code
        self._ray: Any = None
        self._joined = False
        self._started: list[psutil.Process] = []

    def identity(self) -> dict[str, Any]:
        """Return the device, its hardware and the number format. Raises ``EngineError``."""
        dtype = self._dtype
        if self._on_cpus():
            dtype = "float32" if dtype == "auto" else dtype
            return {"device": "cpu", "hardware": "cpu", "dtype": dtype}
        named = (name.split(":") for name in sorted(self._resources()))
        kinds = [kind for name, *kind in named if name == "accelerator_type"]
        if dtype == "auto":
            dtype = self._first_greeting().dtype
        return {"device": "cuda", "hardware": together([*chain(*kinds)]) or "GPU", "dtype": dtype}

    def draw(
        self,
        policy: Policy,
        sampling: Sampling,
        requests: Sequence[Request],
        done: Callable[[Sequence[int], Drawn], object],
    ) -> None:
        """Draw, and call ``done`` with the numbers of a chunk's requests and what was drawn.

        Raises ``EngineError``, and what a worker returns as an error.
        """
        parts, asked = chunks([request.prompt for request in requests]), Asked.of(policy)
        handout: Handout[Member] = Handout(len(parts))
        for member in self.members:
            if member.at == "chunk":
                member.at = "leftover"
        self._staff(len(parts))
        began = time.monotonic()
        while not handout.finished:
            for member in self.members:
                now = time.monotonic()
                if member.answer is None and (chunk := handout.take(member, now)) is not None:
                    part = [requests[number] for number in parts[chunk]]
                    member.answer = member.actor.draw.remote(asked, sampling, part)
                    member.at = "chunk"
            for member, answer in self._answers():
                if answer is None:
                    self._lose(member, handout, policy)
                elif member.at == "chunk":
                    chunk = handout.done(member, time.monotonic())
                    if chunk is not None:
                        done(parts[chunk], answer)
            self._check_staff(began)

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        ray, self._ray = self._ray, None
        if ray is None:
            return
        for member in self.members:
            with suppress(Exception):  # it may be gone
                ray.kill(member.actor)
        self.members.clear()
        if self._joined:
            _shut_down(ray, self._started)

    def _answers(self) -> Iterator[tuple[Member, Drawn | None]]:
        """Wait a while; yield workers with what they drew, or with ``None`` if they are lost.

        Raises what a worker returns as an error.
        """
        of = {member.answer: member for member in self.members if member.answer is not None}
        ready, _ = self._ray.wait([*of], timeout=_LOOK) if of else ([], [])
        for member in map(of.__getitem__, ready):
            answer, member.answer = self._received(member.answer), None
            if answer is None:
                self.members.remove(member)
                yield member, None
            elif member.at == "greeting":
                self._welcome(member, answer)
            elif not isinstance(answer, HarnessError):
                yield member, answer
            elif member.at == "chunk":
                raise answer

    def _received(self, reference: Any) -> Any:
        """Return an answer, or ``None`` if its worker is lost. Raises ``EngineError``."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise EngineError(f"a worker of Ray failed: {one_line(error.cause)}") from error
        except exceptions.RayError as error:
            self.lost.append(one_line(error))
            return None

    def _welcome(self, member: Member, greeting: Greeting | HarnessError) -> None:
        """Let a worker draw if it does so as this machine and the others do, or else end it."""
        try:
            member.greeting = self._checked(greeting)
        except HarnessError:
            self.members.remove(member)
            self._ray.kill(member.actor)
            raise

    def _checked(self, greeting: Greeting | HarnessError) -> Greeting:
        if isinstance(greeting, HarnessError):
            raise greeting
        node = escape(greeting.node)
        if greeting.code != self._code():
            raise EngineError(
                f"the node {node} has another version of grpo-harness, torch, transformers, "
                "tokenizers or peft than this machine: install the same on all"
            )
        for other in self.members:
            if other.greeting is not None and other.greeting.dtype != greeting.dtype:
                raise EngineError(
                    f"the node {node} draws in {greeting.dtype}, and {escape(other.greeting.node)} "
                    f"in {other.greeting.dtype}: name one by --grpo-dtype"
                )
        return greeting

    def _first_greeting(self) -> Greeting:
        """Return what the first worker says of itself; it is started if there is none."""
        self._staff(1)
        began = time.monotonic()
        while True:
            for member in self.members:
                if member.greeting is not None:
                    return member.greeting
            for _ in self._answers():
                pass
            self._check_staff(began)

    def _staff(self, wanted: int) -> None:
        """Start workers, up to ``wanted`` and as many as the cluster has GPUs or CPUs."""
        ray = self._connected()
        unit, share = "GPU", {"num_cpus": 0, "num_gpus": 1}
        if self._on_cpus():
            unit, share = "CPU", {"num_cpus": 1}
        room = int(self._resources().get(unit, 0))
        if room == 0:
            raise EngineError(f"the Ray cluster has no {unit}: name another --grpo-device")
        device = "cuda" if unit == "GPU" else "cpu"
        work = Work(device, self._dtype, self._resident, self._code)
        kind = ray.remote(Worker).options(scheduling_strategy="SPREAD", **share)
        while len(self.members) < min(wanted, room):
            actor = kind.remote(work)
            self.members.append(Member(actor, actor.greet.remote()))

    def _check_staff(self, began: float) -> None:
        """Raise ``EngineError`` if no worker is left, or none has started since ``began``."""
        if not self.members:
            raise EngineError(f"no worker of the Ray cluster is left ({self.lost[-1]}): {_AGAIN}")
        greeted = any(member.greeting for member in self.members)
        if not greeted and time.monotonic() - began > _START:
            total, free = self._resources(), self._ray.available_resources()
            units = [name for name in ("GPU", "CPU") if name in total]
            shown = together([f"{free.get(n, 0):g} of {total[n]:g} {n}s" for n in units])
            raise EngineError(
                f"no worker has started within {_START:g} s, and {shown} of the Ray cluster are "
                f"free: {_AGAIN}"
            )

    def _lose(self, member: Member, handout: Handout[Member], policy: Policy) -> None:
        """Let others draw what a lost worker had. Raises ``EngineError`` if it was lost often."""
        try:
            handout.lose(member)
        except LostError:
            raise EngineError(
                f"{policy.checkpoint}: the same completions were lost with {AGAIN + 1} workers, "
                f"one after another ({self.lost[-1]}): {_AGAIN}"
            ) from None

    def _on_cpus(self) -> bool:
        """Tell whether workers draw on CPUs. No cluster is started for it."""
        if self._device != "auto":
            return self._device == "cpu"
        if os.environ.get(_ADDRESS):
            return not self._resources().get("GPU")
        return not torch.cuda.is_available()

    def _resources(self) -> Mapping[str, float]:
        """Return the resources of the nodes that are alive, by their names."""
        found: Mapping[str, float] = self._connected().cluster_resources()
        return found

    def _connected(self) -> Any:
        """Return Ray, connected to the cluster. Raises ``EngineError``."""
        if self._ray is None:
            ray = _imported()
            self._joined = not ray.is_initialized()
            if self._joined:
                self._started = _join(ray)
            self._ray = ray
        return self._ray


def _reach(address: str) -> None:
    """Raise ``OSError`` if nothing listens at a host and port: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()


def _imported() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        raise EngineError(
            "the engine ray needs the package ray: run `pip install 'grpo-harness[ray]'`"
        ) from None
    return ray


def _join(ray: Any) -> list[psutil.Process]:
    """Connect to the cluster of the environment, or start one, and return what was started.

    Raises ``EngineError``.
    """
    before_it = {*psutil.Process().children()}

    def started() -> list[psutil.Process]:
        return [process for process in psutil.Process().children() if process not in before_it]

    address = os.environ.get(_ADDRESS)
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _reach(address or "")
            ray.init(address or "local", log_to_driver=False, configure_logging=False, **own)
    except Exception as error:  # Ray raises whatever its parts raise
        what = f"{_ADDRESS}={escape(address)} cannot be joined" if address else "Ray cannot start"
        raise EngineError(
            f"{what}: {one_line(error)}; see whether the cluster runs and has this version of Ray "
            f"({ray.__version__}) and Python, or unset {_ADDRESS} to use this machine alone"
        ) from error
    except BaseException:  # an interruption
        _shut_down(ray, started())
        raise
    finally:
        # Ray takes SIGTERM for itself, where it can.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return started()


def _shut_down(ray: Any, started: Sequence[psutil.Process]) -> None:
    """Leave the cluster, and end what was ``started`` for it with all that they started."""
    family = [*started]
    for process in started:
        with suppress(psutil.Error):
            family += process.children(recursive=True)
    ray.shutdown()
    # Ray's agents see only after a while that their node is gone, if they see it.
    _, left = psutil.wait_procs(family, _END)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
