"""Train one policy in several processes of this machine, with torch's launcher.

For several machines there is ``accelerate launch``, which does not need this module.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from grpo_harness.errors import HarnessError


class ProcessError(HarnessError):
    """The error that ended one of several processes, and so all of them."""


def launched() -> bool:
    """Tell whether a launcher has started this process as one of several."""
    return "RANK" in os.environ


def launch(work: Callable[[Any], None], argument: Any, processes: int) -> None:
    """Call ``work(argument)`` in each of ``processes`` new processes, and wait for all.

    Raises ``ProcessError`` with the message of the first one that failed, or ``KeyboardInterrupt``
    if that ended them. The others are ended then.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # All processes together have as many threads as there are processors.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The launcher's long report of a failure is replaced by the error that is raised here.
    logging.disable(logging.ERROR)
    try:
        elastic_launch(config, _worker)(work, argument)
    except ChildFailedError as error:
        raise _first(error.failures.items()) from None
    except SignalException:
        raise KeyboardInterrupt from None
    finally:
        logging.disable(logging.NOTSET)


def _first(failures: Iterable[tuple[int, Any]]) -> ProcessError:
    said = []
    for rank, failure in sorted(failures, key=lambda item: item[1].timestamp):
        # A text, or what torch wrote into the process's error file.
        told = failure.message
        text = str(told["message"] if isinstance(told, dict) else told)
        said.append((rank, text.removeprefix("ProcessError: "), text.startswith("ProcessError: ")))
    # A process that lost its peer may report that before the peer reports its own error.
    rank, text, _ = next((entry for entry in said if entry[2]), said[0])
    return ProcessError(f"process {rank}: {text}")


def _worker(work: Callable[[Any], None], argument: Any) -> None:
    import torch.distributed

    try:
        work(argument)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, HarnessError) as error:
        raise ProcessError(str(error)) from None
    # Not after an error: the other processes would fail before this error is written.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
