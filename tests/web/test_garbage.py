"""What an ASGI request leaves behind is freed when it is over, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

from stillroom import DEFAULT, AsyncStillroom, NoDispatch, Route, Routes, Settings
from stillroom.web.asgi import KEY, StillroomMiddleware

TOKEN = b"00." + b"A" * 43  # opens nothing, and is looked for all the same
REQUESTS = 20


def test_a_request_leaves_no_cycles(settings: Settings) -> None:
    """A request with limits and a session leaves no more garbage than a task that does nothing."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (await scope[KEY].load()).get("theme")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    with asyncio.Runner() as runner:
        room = AsyncStillroom(settings, dispatch=NoDispatch())
        middleware: Any = StillroomMiddleware(app, room, routes=Routes([Route("/", [DEFAULT])]))

        def asking() -> Coroutine[Any, Any, None]:
            headers = [(b"cookie", b"__Host-sid=" + TOKEN)]
            scope = {"type": "http", "method": "GET", "path": "/", "client": ("203.0.113.7", 1)}
            asked: Coroutine[Any, Any, None] = middleware(
                {**scope, "headers": headers}, receive, send
            )
            return asked

        def garbage_of(make: Any) -> int:
            runner.run(make())  # what is made once is made by now
            gc.collect()
            gc.disable()
            try:
                for _ in range(REQUESTS):
                    runner.run(make())
                return gc.collect()
            finally:
                gc.enable()

        # Now and then something else is made anew, such as a connection: in each of five rounds it is not.
        left = [(garbage_of(asking), garbage_of(lambda: asyncio.sleep(0))) for _ in range(5)]
        assert min(asked for asked, _ in left) == min(idle for _, idle in left)
        runner.run(room.close())
