"""The engine of a Ray cluster: its workers draw by the engine of transformers, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_harness.engines.engine import EngineError, Progress, Request, Sample, Sampling
from grpo_harness.engines.ray_cluster import Cluster
from grpo_harness.engines.ray_worker import Drawn
from grpo_harness.engines.remote import Remote
from grpo_harness.engines.residency import Residents
from grpo_harness.policy.policy import Policy


class RayEngine(Remote):
    """Samples a policy on a cluster. No weights are loaded in this process.

    A sample is that of the engine of transformers on the same hardware, but where two tokens are
    equally likely up to rounding: the rows of a batch are others. So the two do not share stored
    samples; runs on a cluster do, however many workers it has. ``residents`` are the policies of
    the run.
    """

    at_once = 4096
    """Requests that it should be given at once, whatever the number of workers."""

    def __init__(
        self, policy: Policy, sampling: Sampling, cluster: Cluster, residents: Residents
    ) -> None:
        super().__init__(policy, sampling)
        self._cluster = cluster
        self._residents = residents
        self._remarks: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<RayEngine {self.policy.name}>"

    def identity(self) -> dict[str, Any]:
        """Return the engine, and the workers' device, hardware and number format.

        Raises ``EngineError``.
        """
        return {"engine": "ray", **self._cluster.identity()}

    def remarks(self) -> dict[str, str]:
        """Return the remarks of the workers' engines."""
        return dict(self._remarks)

    def sample(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Sample]:
        """Draw one sample per request, in the order of the requests.

        Raises ``PolicyError``, and ``EngineError``, which has the samples that were drawn before.
        """
        if not requests:
            return []
        self._residents.permit(self.policy)
        samples: dict[int, Sample] = {}

        def done(numbers: Sequence[int], drawn: Drawn) -> None:
            self._residents.distinguish(self.policy, drawn.weights)
            self._remarks.update(drawn.remarks)
            samples.update(zip(numbers, drawn.samples, strict=True))
            if progress is not None:
                progress(len(numbers))

        try:
            self._cluster.draw(self.policy, self._sampling, requests, done)
        except EngineError as error:
            error.drawn = samples
            raise
        return [samples[number] for number in range(len(requests))]
