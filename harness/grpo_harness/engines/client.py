"""HTTP to the servers of one model: they share the work, and are asked again after a failure.

How many requests a server has at once adapts: one more after each answer up to the first sign of
overload, and half as many after each sign. From then on it grows by one a round. A server that
failed is left alone for a while, which doubles each time. An answer is never asked for again.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo_harness.engines.endpoint import Endpoint
from grpo_harness.engines.engine import EngineError
from grpo_harness.text import escape, one_line

if TYPE_CHECKING:
    import httpx2

_TRIES = 6
"""How often a request is sent at most, and how often in a row all servers may fail."""

_PAUSE = 1.0
"""Seconds that a server is left alone after its first failure."""

_LONGEST_PAUSE = 60.0
_LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait."""

_AT_FIRST, _MOST = 8, 512
"""Requests at once to one server."""

_LARGEST = 1 << 24
"""Bytes of an answer."""

_OVERLOADED = (408, 425, 429)

_INVALID = "validation error"
"""Words in a 500 that mean a field which the server does not take, as of llama-cpp-python."""


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise EngineError(
            "a served policy needs the package httpx2: run `pip install 'grpo-harness[server]'`"
        ) from None
    return httpx2


@dataclass(frozen=True)
class Answer:
    """What a server answered, with stars in place of the key, and how long it asks to wait."""

    url: str
    status: int
    body: str
    wait: float | None = None

    def __str__(self) -> str:
        return f"{self.url} answered {self.status}: {escape(self.body.strip() or 'nothing', 300)}"


@dataclass
class _Server:
    """One address: how many requests it has, and may have, and when it may be asked again."""

    url: str
    outstanding: int = 0
    limit: float = _AT_FIRST
    opens: float = 0.0
    failures: int = 0
    halved: float = -math.inf

    def room(self, now: float) -> int:
        return 0 if now < self.opens else max(0, int(self.limit) - self.outstanding)

    def answered(self, began: float, slow: float) -> None:
        """Note an answer; one that took longer than ``slow`` seconds is a sign of overload."""
        self.failures = 0
        if time.monotonic() - began > slow:
            self._halve(began)
        elif self.outstanding >= int(self.limit):  # more than it ever had would show nothing
            grown = self.limit + (1 if self.halved == -math.inf else 1 / self.limit)
            self.limit = min(_MOST, grown)

    def failed(self, began: float, wait: float | None) -> None:
        """Note a failure; the server asks to be left alone for ``wait`` seconds."""
        # Requests that were under way together fail together: they are one sign.
        if self._halve(began):
            self.failures += 1
        doubled = min(_LONGEST_PAUSE, _PAUSE * 2.0 ** max(0, self.failures - 1))
        pause = doubled * random.uniform(0.5, 1) if wait is None else wait
        self.opens = max(self.opens, time.monotonic() + pause)

    def _halve(self, began: float) -> bool:
        if began < self.halved:
            return False
        self.limit, self.halved = max(1.0, self.limit / 2), time.monotonic()
        return True


@dataclass(eq=False)
class Client:
    """Asks the servers of an endpoint. ``sent`` counts the requests that were sent, by address."""

    endpoint: Endpoint
    sent: dict[str, int] = field(default_factory=dict)
    _servers: list[_Server] = field(init=False, repr=False)
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque, repr=False)
    _http: httpx2.AsyncClient | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._servers = [_Server(url) for url in self.endpoint.urls]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep connections inside. Raises ``EngineError`` if httpx2 or the key is missing."""
        httpx2, endpoint = _httpx(), self.endpoint
        endpoint.secret()

        def authorize(request: Any) -> Any:
            # Read here, so that no object holds the key.
            if key := endpoint.secret():
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        patience = httpx2.Timeout(None, connect=min(10, endpoint.seconds))
        for server in self._servers:
            server.outstanding, server.opens = 0, 0.0
        self._waiting.clear()
        # Certificates take a while to load, and plain HTTP has none.
        secure = any(url.startswith("https:") for url in endpoint.urls)
        http = httpx2.AsyncClient(auth=authorize, limits=limits, timeout=patience, verify=secure)
        async with http as self._http:
            yield

    async def get(self, url: str) -> Answer | None:
        """Ask once; return ``None`` if nothing came within ten seconds."""
        try:
            return await self._send("GET", url, None, min(10, self.endpoint.seconds))
        except (_httpx().HTTPError, _httpx().InvalidURL, TimeoutError, _TooLargeError):
            return None

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Send a request to the server that has the fewest, again if it fails.

        Returns an answer, also one that refuses the request. Raises ``EngineError`` when the
        request has failed too often.
        """
        failed_at: set[str] = set()
        for _ in range(_TRIES):
            server = await self._take(failed_at)
            began = time.monotonic()
            try:
                answer, failure = await self._attempt(f"{server.url}/{path}", body)
                if answer is not None and not failure:
                    server.answered(began, self.endpoint.seconds / 2)
                    return answer
                wait = None if answer is None else answer.wait
                if wait is not None and wait > _LONGEST_WAIT:
                    raise EngineError(f"{failure}; it asks to wait {wait:.0f} s: run again then")
                server.failed(began, wait)
                failed_at.add(server.url)
                if all(server.failures >= _TRIES for server in self._servers):
                    break
            finally:
                server.outstanding -= 1
                self._wake()
        raise EngineError(
            f"{failure}; so it was {_TRIES} times: see whether the server runs, then run again "
            "with the same --grpo-seed, which goes on from here"
        )

    async def _attempt(self, url: str, body: Mapping[str, Any]) -> tuple[Answer | None, str]:
        """Return what was answered, if anything, and how it failed, or an empty text."""
        httpx2, limit = _httpx(), self.endpoint.seconds
        try:
            answer = await self._send("POST", url, body, limit)
        except TimeoutError:
            return None, f"{url} gave no answer within {limit:g} s"
        except httpx2.HTTPError as error:
            failure = f"{url} cannot be reached: {self.endpoint.censored(one_line(error))}"
            return None, failure
        except (_TooLargeError, httpx2.InvalidURL) as error:
            raise EngineError(f"{url} cannot be used: {one_line(error)}") from None
        failed = answer.status >= 500 or answer.status in _OVERLOADED
        return answer, str(answer) if failed else ""

    async def _send(self, method: str, url: str, body: Any, seconds: float) -> Answer:
        assert self._http is not None
        self.sent[url] = self.sent.get(url, 0) + 1
        content = bytearray()
        async with asyncio.timeout(seconds), self._http.stream(method, url, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _LARGEST:
                    raise _TooLargeError(f"its answer has more than {_LARGEST >> 20} MiB")
        text = self.endpoint.censored(content.decode("utf-8", errors="replace"))
        wait = _seconds(response.headers.get("Retry-After"))
        status = response.status_code
        if status == 500 and _INVALID in text:
            status = 422
        return Answer(url, status, text, wait)

    async def _take(self, failed_at: set[str]) -> _Server:
        """Wait for a server that may have one more request, and return the least busy.

        It is one at which the request has not failed, unless it has failed at all of them.
        """
        loop = asyncio.get_running_loop()
        if len(failed_at) == len(self._servers):
            failed_at.clear()
        while True:
            now = time.monotonic()
            free = [s for s in self._servers if s.room(now) and s.url not in failed_at]
            if free:
                server = min(free, key=lambda server: server.outstanding / server.limit)
                server.outstanding += 1
                return server
            opens = min((s.opens for s in self._servers if s.opens > now), default=None)
            if opens is not None:
                loop.call_later(opens - now + 0.001, self._wake)
            waiter = loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def _wake(self) -> None:
        """Let as many requests go on as the servers have room for."""
        now = time.monotonic()
        for _ in range(min(sum(s.room(now) for s in self._servers), len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)


class _TooLargeError(Exception):
    """An answer is larger than any that is expected."""


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a ``Retry-After`` header: a number, or a date."""
    try:
        if retry_after is None:
            return None
        if retry_after.strip().isdigit():
            return float(retry_after)
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None
