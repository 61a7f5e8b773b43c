"""An app's loaders, as STILLROOM_LOADERS names them. Counts its loads in Redis, where tests can see them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from pydantic import BaseModel

import redis
from stillroom import AsyncStillroom, Settings, Stillroom

room = Stillroom()
async_room = AsyncStillroom()
room.sessions.on_event.append(lambda event: database.rpush("db:events", event.kind))
database = redis.Redis.from_url(Settings().redis_url)


class Product(BaseModel):
    id: int
    version: int


@room.cache.cached("product:{id}", ttl=60, swr=600, tags=["products"])
def product(id: int) -> Product:
    database.incr("db:loads")
    if database.exists("db:broken"):
        raise LookupError("the database is broken")
    while database.exists("db:gate"):
        database.incr("db:waiting")
        database.blpop(["db:opened"], timeout=60)
    return Product(id=id, version=int(database.get("db:version") or 0))


@room.cache.cached("slow:{id}", ttl=60, swr=600)
def slow(id: int) -> int:
    """Load for as long as the test wants; `db:inside` counts the loads under way."""
    database.incr("db:inside")
    database.blpop(["db:out"], timeout=60)
    database.decr("db:inside")
    return id + 1_000


@async_room.cache.cached("weather:{city}", ttl=60, swr=600)
async def weather(city: str) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"city": city, "loop": id(asyncio.get_running_loop()), "pid": os.getpid()}
