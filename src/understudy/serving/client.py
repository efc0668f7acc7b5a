"""An HTTP client for the replicas of a server: concurrent requests, deadlines, retries with back-off, fail-over.

Requests run in an event loop in a thread of its own, so that all of an optimizer step are under way at once. A failure
that may pass (refused, reset, slow, damaged reply, 429, 5xx) is retried on whichever replica is free first, until it
has lasted for `wait` seconds; an answer that is wrong ends the run at once.
"""

import asyncio
import json
import logging
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar, cast

import httpx2

from ..teacher import TeacherError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0  # seconds between attempts, which double
_PASSING = (408, 425, 429)  # besides 5xx
_JITTER = random.Random()  # not the generator that training saves in checkpoints


class Unavailable(Exception):
    """A failure that may pass; `delay` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, delay: float = 0.0) -> None:
        super().__init__(reason)
        self.delay = delay


@dataclass
class Replica:
    """One of the servers that give the same answers."""

    url: str
    in_flight: int = 0
    failures: int = 0  # since its last answer
    free_at: float = 0.0  # the time (`monotonic`) before which it is not asked again


@dataclass(frozen=True)
class Request(Generic[T]):
    """A request, and the function that reads its reply.

    `read` raises `Unavailable` for a damaged reply and `TeacherError` for a wrong one.
    """

    path: str
    read: Callable[["Reply"], T]  # runs in a thread
    content: Any = None  # is sent as JSON by POST; None: GET
    deadlines: int = 1  # how many times `timeout` it may take
    optional: bool = False  # is the result None where the server has no such path?


@dataclass(frozen=True)
class Reply:
    """A reply with status 200, and the URL of the replica that gave it."""

    url: str
    content: bytes
    headers: Any = field(default_factory=dict)

    def json(self) -> Any:
        """The content as JSON.

        Raises:
            Unavailable: if it is none.
        """
        try:
            return json.loads(self.content)
        except ValueError:
            raise Unavailable("its reply is damaged") from None


class Client:
    """Sends requests to replicas.

    Args:
        urls: one for each replica.
        timeout: seconds for one attempt, from its first to its last byte.
        wait: seconds for which a failure may last.
        token: sent as `Authorization: Bearer …`.
        transport: of httpx, for tests.
        concurrent: requests to one replica at once; further ones wait.

    Raises:
        ValueError: for what is no URL, and for one with a password, which recipes and logs would show.
    """

    def __init__(
        self,
        urls: Sequence[str],
        timeout: float,
        wait: float,
        token: str | None = None,
        transport: Any = None,
        concurrent: int = 16,
    ) -> None:
        if not urls:
            raise ValueError("url names no server: write http://host:port")
        self.replicas = [Replica(_checked(url)) for url in urls]
        self.timeout, self.wait, self._token, self._transport = timeout, wait, token, transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: Any = None
        self._slots = asyncio.Semaphore(concurrent * len(urls))

    def submit(self, request: Request[T], replica: Replica | None = None, wait: float | None = None) -> Future[T]:
        """Send a request, by default to any replica; the future's result is what `request.read` returns.

        The future raises TeacherError, a sentence, for a wrong answer and for a failure that lasted for `wait` seconds.
        """
        if self._loop is None:
            self._start()
        assert self._loop is not None
        patience = self.wait if wait is None else min(wait, self.wait)
        return asyncio.run_coroutine_threadsafe(self._answer(request, replica, patience), self._loop)

    def _start(self) -> None:
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=30)
        without_proxy: dict[str, Any] = {"all://127.0.0.1": None, "all://localhost": None}
        self._http = httpx2.AsyncClient(
            headers=headers, limits=limits, timeout=None, transport=self._transport, mounts=without_proxy
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), daemon=True, name="understudy-client").start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    async def _answer(self, request: Request[T], only: Replica | None, wait: float) -> T:
        failed_at: float | None = None
        others = 0 if only else len(self.replicas) - 1  # that are asked before the request fails
        while True:
            replica = only or self._next()
            replica.in_flight += 1
            try:
                await asyncio.sleep(max(0.0, replica.free_at - monotonic()))
                async with self._slots:
                    answer = await self._attempt(replica, request)
            except Unavailable as failure:
                now = monotonic()
                failed_at = now if failed_at is None else failed_at
                left = wait - (now - failed_at)
                if left <= 0 and others == 0:
                    raise TeacherError(self._gone(replica, failure, wait)) from None
                others = max(0, others - 1)
                self._rest(replica, failure, now, left)
            else:
                if replica.failures > 1:
                    logger.warning("the server at %s answers again", replica.url)
                replica.failures = 0
                return answer
            finally:
                replica.in_flight -= 1

    def _next(self) -> Replica:
        """The replica that is free first, and of several the one with the fewest requests."""
        now = monotonic()
        return min(self.replicas, key=lambda replica: (max(replica.free_at, now), replica.in_flight))

    async def _attempt(self, replica: Replica, request: Request[T]) -> T:
        seconds = self.timeout * request.deadlines
        method, body = ("GET", {}) if request.content is None else ("POST", {"json": request.content})
        try:
            coroutine = self._http.request(method, f"{replica.url}{request.path}", **body)
            response = await asyncio.wait_for(coroutine, seconds)
        except asyncio.TimeoutError:
            raise Unavailable(f"no answer within {seconds:g} s") from None
        except httpx2.RequestError as error:
            raise Unavailable(str(error).strip().rstrip(".") or type(error).__name__) from None
        status = response.status_code
        if status in _PASSING or status >= 500:
            raise Unavailable(f"status {status}{_detail(response)}", _retry_after(response))
        if request.optional and status in (404, 405, 501):
            return cast(T, None)
        if status in (401, 403):
            raise TeacherError(
                f"the server at {replica.url} refuses the token (status {status}): name the environment variable that "
                "holds its token in token_env"
            )
        if status != 200:
            raise TeacherError(
                f"the server at {replica.url} refuses {request.path} (status {status}{_detail(response)})"
            )
        return await asyncio.to_thread(request.read, Reply(replica.url, response.content, response.headers))

    def _rest(self, replica: Replica, failure: Unavailable, now: float, left: float) -> None:
        """Leave the replica alone for a while, which doubles with each failure, but no longer than `left` seconds."""
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**replica.failures) * _JITTER.uniform(0.5, 1.0)
        replica.failures += 1
        delay = max(delay, failure.delay)
        replica.free_at = now + (min(delay, left) if left > 0 else delay)
        if replica.failures == 2:  # a connection that was closed meanwhile fails once
            logger.warning("the server at %s fails (%s); waiting for it", replica.url, failure)

    def _gone(self, replica: Replica, failure: Unavailable, wait: float) -> str:
        others = f", nor do the {len(self.replicas) - 1} others" if len(self.replicas) > 1 else ""
        waited = f" for {wait:g} s" if wait else ""
        return f"the server at {replica.url} does not answer{waited} ({failure}){others}: start it, or correct its url"


def bearer_token(variable: str | None) -> str | None:
    """The token in an environment variable, which a recipe names as token_env.

    Raises:
        ValueError: if it is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"the environment variable {variable}, which token_env names, is not set: set it to the token")
    return os.environ[variable]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _checked(url: str) -> str:
    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError):
        parts = httpx2.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f'"{url}" is no server\'s URL: write http://host:port')
    if parts.userinfo:
        raise ValueError(
            f"the URL of {parts.host} holds a password: put a token into an environment variable, and name that in "
            "token_env"
        )
    return url.rstrip("/")


def _detail(response: httpx2.Response) -> str:
    """The reason that an error reply gives, after a colon: its first line."""
    try:
        content = response.json()
        for key in ("error", "message", "detail"):
            content = content.get(key, content) if isinstance(content, dict) else content
        text = str(content)
    except ValueError:
        text = response.text
    line = (text.strip().splitlines() or [""])[0]
    return f": {line[:200].rstrip('.')}" if line else ""


def _retry_after(response: httpx2.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:  # a date
        return 0.0
