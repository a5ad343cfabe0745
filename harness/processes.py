"""Several processes of this machine that train one policy, by torch's own launcher.

For several machines there is ``accelerate launch``, which needs nothing of this.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from harness.errors import HarnessError


class ProcessError(HarnessError):
    """What ended one of several processes, and with it all of them."""


def launched() -> bool:
    """Say whether a launcher has started this process as one of several."""
    return "RANK" in os.environ


def launch(work: Callable[[Any], None], argument: Any, processes: int) -> None:
    """Call ``work(argument)`` in each of ``processes`` new processes, and wait for all.

    Raises ``ProcessError`` with what the first one that failed said, ``KeyboardInterrupt`` when
    it was that which ended them. The others are ended then.
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
    # As many threads as there are processors, over all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # What the launcher would say of a failure, at length, is said once in what is raised here.
    logging.disable(logging.ERROR)
    try:
        elastic_launch(config, _worker)(work, argument)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told: Any = failure.message  # a text, or what torch wrote into the process's error file
        text = told["message"] if isinstance(told, dict) else told
        raise ProcessError(f"process {rank}: {text.removeprefix('ProcessError: ')}") from None
    except SignalException:
        raise KeyboardInterrupt from None
    finally:
        logging.disable(logging.NOTSET)


def _worker(work: Callable[[Any], None], argument: Any) -> None:
    import torch.distributed

    try:
        work(argument)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, HarnessError) as error:
        raise ProcessError(str(error)) from None
    except Exception:
        traceback.print_exc()
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
