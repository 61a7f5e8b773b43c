"""What an ASGI request leaves behind is freed when it is over, without the garbage collector."""

from __future__ import annotations

import os

from stillroom import Settings
from tests.support import nursery

# A process of its own: in one that has run other tests, their threads leave garbage, too.
ASKING = """
import asyncio, gc
from stillroom import DEFAULT, AsyncStillroom, NoDispatch, Route, Routes, Settings
from stillroom.web.asgi import KEY, StillroomMiddleware
from tests.support.crowd import PATIENT

REQUESTS = 20

async def app(scope, receive, send):
    (await scope[KEY].load()).get("theme")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})

async def receive():
    return {"type": "http.request", "body": b"", "more_body": False}

async def send(message):
    assert message.get("status", 200) == 200

def garbage_of(runner, make):
    runner.run(make())  # what is made once is made by now
    gc.collect()
    gc.disable()
    for _ in range(REQUESTS):
        runner.run(make())
    return gc.collect()

with asyncio.Runner() as runner:
    room = AsyncStillroom(Settings(**PATIENT), dispatch=NoDispatch())
    middleware = StillroomMiddleware(app, room, routes=Routes([Route("/", [DEFAULT])]))

    def asking():
        opens_nothing = b"00." + b"A" * 43  # and is looked for all the same
        headers = [(b"cookie", b"__Host-sid=" + opens_nothing)]
        scope = {"type": "http", "method": "GET", "path": "/", "client": ("203.0.113.7", 1)}
        return middleware({**scope, "headers": headers}, receive, send)

    # Now and then something else is made anew, such as a connection: in each of three rounds it is not.
    left = min(garbage_of(runner, asking) for _ in range(3))
    print(left, garbage_of(runner, lambda: asyncio.sleep(0)))
    runner.run(room.close())
"""


def test_a_request_leaves_no_cycles(settings: Settings) -> None:
    """A request with limits and a session leaves no more garbage than a task that does nothing."""
    done = nursery.run_text(["-c", ASKING], os.environ | {"REDIS_URL": settings.redis_url})
    assert done.returncode == 0, done.stderr
    left, of_nothing = map(int, done.stdout.split())
    assert left == of_nothing
