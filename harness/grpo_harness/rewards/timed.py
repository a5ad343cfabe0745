"""Call code of the user's within a time: functions, and coroutines that wait together."""

import asyncio
import atexit
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any


class TooSlowError(BaseException):
    """A reward did not return in time. No ``except Exception`` of the reward's own stops it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"did not return within {seconds:g} seconds")


@contextmanager
def limited(seconds: float | None, grace: float = 0.0) -> Iterator[None]:
    """Raise ``TooSlowError`` inside after so many seconds, or at the end if that was prevented.

    It is raised inside only in the main thread, and ``grace`` seconds later. A thread sends the
    alarm, again and again, because a reward may use the process's timer, as math-verify does.
    """
    if seconds is None:
        yield
        return
    end, ended = time.monotonic() + seconds + grace, threading.Event()
    main = threading.current_thread() is threading.main_thread()
    caller = threading.get_ident()

    def ring(*how: Any) -> None:
        if time.monotonic() >= end:
            raise TooSlowError(seconds)
        if callable(before):
            before(*how)

    def watch() -> None:
        while not ended.wait(seconds + grace):
            if signal.getsignal(signal.SIGALRM) is ring:
                signal.pthread_kill(caller, signal.SIGALRM)

    before = signal.getsignal(signal.SIGALRM)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        if main:
            signal.signal(signal.SIGALRM, ring)
            watcher.start()
        yield
    finally:
        ended.set()
        if main:
            watcher.join()
            signal.signal(signal.SIGALRM, before)
    if time.monotonic() > end:
        raise TooSlowError(seconds)


def awaited(coroutines: Sequence[Any], seconds: float | None) -> list[Any]:
    """Wait for coroutines together: what each returned or raised. Also where a loop is running."""

    async def one(coroutine: Any) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return listed(await coroutine)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if seconds is not None and isinstance(error, TimeoutError) and limit.expired():
                return TooSlowError(seconds)
            return error

    async def together() -> list[Any]:
        return await asyncio.gather(*map(one, coroutines))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Those that wait tell by themselves which of them is slow.
        with limited(seconds, grace=1):
            return _run(together)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, together()).result()


@cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # leaves the current loop alone
    atexit.register(runner.close)
    return runner


def _run(function: Callable[[], Coroutine[Any, Any, list[Any]]]) -> list[Any]:
    """Run a coroutine function in the loop of all rewards: clients that they keep belong to it."""
    try:
        return _runner().run(function())
    except BaseException:  # what it left running ends with the loop
        _runner().close()
        _runner.cache_clear()
        raise


def tried(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or what it raises: also an exit, or a skip of pytest."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error


def listed(values: Any) -> Any:
    """Return what an iterator yields as a list, and anything else as it is."""
    return list(values) if isinstance(values, Iterator) else values
