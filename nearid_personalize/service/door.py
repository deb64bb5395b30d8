"""Who is let in, and how much at once: token, size of a request, one request at a time on the model."""

import hmac
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

OPEN_PATHS = ("/health",)


class Door:
    """ASGI middleware in front of the app: refuses strangers and oversized requests before their body is read.

    token: what "Authorization: Bearer ..." must carry; None: all are let in. max_bytes: of one request.
    """

    def __init__(self, app: Any, token: str | None, max_bytes: int) -> None:
        self.app, self.token, self.max_bytes = app, token, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get("authorization", "")):
            refusal = JSONResponse({"detail": "no valid token; send it as Authorization: Bearer TOKEN"}, 401)
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            await JSONResponse({"detail": self._too_large()}, 413)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _knows(self, authorization: str) -> bool:
        if self.token is None:
            return True
        scheme, _, told = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(told.strip().encode(), self.token.encode())

    def _counted(self, receive: Any) -> Any:
        """`receive` that stops a body which is longer than it said, or did not say."""
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"request too large; at most {self.max_bytes / 1e6:g} MB are taken"


class Turns:
    """One request at a time on the model; `max_waiting` more may wait, and further ones are refused."""

    def __init__(self, max_waiting: int) -> None:
        self._places = threading.BoundedSemaphore(max_waiting + 1)
        self._model = threading.Lock()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line; raises HTTPException 503 when there is none."""
        if not self._places.acquire(blocking=False):
            raise HTTPException(503, "too many requests are waiting; try again", headers={"Retry-After": "1"})
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model, for this thread alone."""
        with self._model:
            yield
