"""One run of several processes: each has a replica of the model, and watches its own trainer.

Every process draws, scores and trains on its part of a batch; gradients are averaged over them.
What each has seen is joined to one run, in TRL's order: the rows of process 0, then of process 1.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from grpo_harness.contract.trace import Batch, Scored, Step, Tensors, Trace

_CRASHED = "grpo_harness/crashed"

CRASHES: list[str] = []
"""What ended a training of several processes. The others wait for this one until it ends."""


def first() -> bool:
    """Tell whether this is the process that checks and reports, or the only one."""
    return bool(PartialState().is_main_process)


def shared(value: Any) -> Any:
    """Return the ``value`` that the first process has, in every process."""
    return broadcast_object_list([value])[0]


def joined(run: Trace) -> Trace:
    """Return the run of all processes, from what each has seen: every process must call this."""
    processes = PartialState().num_processes
    if processes == 1:
        return run
    # Weights and gradients are compared by their digests, and stay in their process.
    steps = [
        dataclasses.replace(
            step,
            weights={},
            gradient={},
            taken={},
            after={},
            digests=[
                {
                    "weights before it": _digest(step.weights),
                    "gradients": _digest(step.gradient),
                    "weights after it": _digest(step.after),
                }
            ],
        )
        for step in run.steps
    ]
    seen: list[list[Step]] = gather_object([steps])
    batches: dict[Batch, Batch] = {}
    together = []
    for own, parts in zip(run.steps, zip(*seen, strict=True), strict=True):
        batch = parts[0].batch
        if batch not in batches:
            batches[batch] = _joined_batch([part.batch for part in parts])
        micro_batches = chain(*zip(*(part.micro_batches for part in parts), strict=True))
        together.append(
            dataclasses.replace(
                own,
                batch=batches[batch],
                micro_batches=[
                    dataclasses.replace(one, loss=one.loss / processes) for one in micro_batches
                ],
                digests=[part.digests[0] for part in parts],
            )
        )
    return dataclasses.replace(run, steps=together, processes=processes)


def crashed(error: str) -> str:
    """Note that this process crashed with ``error``; return what the first one that did said."""
    if PartialState().num_processes == 1:
        return error
    store = torch.distributed.distributed_c10d._get_default_store()
    said = store.compare_set(_CRASHED, "", f"process {PartialState().process_index}, {error}")
    CRASHES.append(bytes(said).decode())
    return CRASHES[-1]


def _joined_batch(parts: Sequence[Batch]) -> Batch:
    return Batch(
        step=parts[0].step,
        scored={
            n: Scored(
                prompts=_chained(part.scored[n].prompts for part in parts),
                completions=_chained(part.scored[n].completions for part in parts),
                ids=_chained(part.scored[n].ids for part in parts),
                columns={},
                rewards=_chained(part.scored[n].rewards for part in parts),
            )
            for n in parts[0].scored
        },
        rewards=_chained(part.rewards for part in parts),
        prompt_ids=_chained(part.prompt_ids for part in parts),
        completion_ids=_chained(part.completion_ids for part in parts),
        random_state=None,
        processes=tuple(parts),
    )


def _chained(parts: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(parts))


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
