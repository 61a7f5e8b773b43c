"""Everyone who takes part in the contest of hits: how each is set up, and its one hit."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import redis.asyncio
from pydantic import BaseModel, TypeAdapter

import redis
from bench.harness import AsyncHit, Contestant, Hit, Role
from bench.raw import async_connection, connection, pack
from bench.stage import NEVER, PATIENT
from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.cache.lookup import SEEN

KEY = "product:7"
TTL = 600  # seconds
TAGS = ["products", "brand:acme"]


class Product(BaseModel):
    """A small model, as a product page would cache it."""

    id: int
    name: str
    brand: str
    price_cents: int
    in_stock: bool
    labels: list[str]


PRODUCT = Product(
    id=7,
    name="Copper preserving pan, 9 litres, hammered",
    brand="acme",
    price_cents=12950,
    in_stock=True,
    labels=["kitchen", "copper", "preserving", "bestseller"],
)
ADAPTER = TypeAdapter(Product)
BODY = ADAPTER.dump_json(PRODUCT)


# --- who takes part -------------------------------------------------------------------------------

VALIDATED = "validate_json on the reply"
UNSEEN = "cache.get of more keys than a process remembers"
FORGOTTEN = [f"{KEY}:{n}" for n in range(2 * SEEN)]
UNPICKLED = "the model is pickled: no validation on the way out"


def contestants(url: str) -> list[Contestant]:
    """Return all contestants, in the order of the table."""
    return [
        _sync("floor", "floor", floor, url, "hiredis", f"socket and hiredis; {VALIDATED}"),
        _sync("redis-py", "bare", bare, url, "redis", f"Redis.from_url(url); {VALIDATED}"),
        _sync("stillroom", "ours", ours, url, "stillroom", "cache.get(key, Product), two tags"),
        _sync("stillroom, unseen", "ours", unseen, url, "stillroom", UNSEEN),
        _sync("cached function", "ours", cached, url, "stillroom", "a hit through its loader"),
        _sync(
            "dogpile.cache",
            "peer",
            dogpile,
            url,
            "dogpile.cache",
            f"the region of its redis docs; {UNPICKLED}",
        ),
        _sync("django", "peer", django_own, url, "django", f"its RedisCache; {UNPICKLED}"),
        _sync(
            "django-redis", "peer", django_redis, url, "django-redis", f"DefaultClient; {UNPICKLED}"
        ),
        _async("async floor", "floor", async_floor, url, "hiredis", f"streams; {VALIDATED}"),
        _async("async redis-py", "bare", async_bare, url, "redis", f"its defaults; {VALIDATED}"),
        _async("async stillroom", "ours", async_ours, url, "stillroom", "await cache.get(key, …)"),
        _async("async stillroom, unseen", "ours", async_unseen, url, "stillroom", UNSEEN),
        _async(
            "async cached function", "ours", async_cached, url, "stillroom", "through its loader"
        ),
        _async("cashews", "peer", cashews, url, "cashews", f"cache.setup(url); {UNPICKLED}"),
        _async(
            "aiocache", "peer", aiocache_json, url, "aiocache", "JsonSerializer; validate_python"
        ),
        _async("aiocache pickle", "peer", aiocache_pickle, url, "aiocache", UNPICKLED),
    ]


def _sync(
    name: str, role: Role, make: Callable[[str], Any], url: str, package: str, setup: str
) -> Contestant:
    return Contestant(name, role, partial(make, url), "sync", package, setup, PRODUCT)


def _async(
    name: str, role: Role, make: Callable[[str], Any], url: str, package: str, setup: str
) -> Contestant:
    return Contestant(name, role, partial(make, url), "async", package, setup, PRODUCT)


# --- the floor: a socket, hiredis, pydantic -------------------------------------------------------


@contextmanager
def floor(url: str) -> Iterator[Hit]:
    store_body(url)
    with connection(url) as exchange:
        yield lambda: ADAPTER.validate_json(exchange(pack(("GET", KEY))))


@asynccontextmanager
async def async_floor(url: str) -> AsyncIterator[AsyncHit]:
    store_body(url)
    async with async_connection(url) as exchange:

        async def hit() -> Product:
            return ADAPTER.validate_json(await exchange(pack(("GET", KEY))))

        yield hit


def store_body(url: str) -> None:
    """Store the JSON that the floor and the bare client read: the same bytes under one key."""
    with redis.Redis.from_url(url) as client:
        client.set(KEY, BODY, ex=TTL)


# --- the bare client: redis-py as it comes --------------------------------------------------------


@contextmanager
def bare(url: str) -> Iterator[Hit]:
    store_body(url)
    with redis.Redis.from_url(url) as client:
        get = cast("Callable[[str], bytes]", client.get)
        yield lambda: ADAPTER.validate_json(get(KEY))


@asynccontextmanager
async def async_bare(url: str) -> AsyncIterator[AsyncHit]:
    store_body(url)
    async with redis.asyncio.Redis.from_url(url) as client:
        get = cast("Callable[[str], Awaitable[bytes]]", client.get)

        async def hit() -> Product:
            return ADAPTER.validate_json(await get(KEY))

        yield hit


# --- ours -----------------------------------------------------------------------------------------


@contextmanager
def ours(url: str) -> Iterator[Hit]:
    with Stillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as room:
        room.stats.due = NEVER
        room.cache.set(KEY, PRODUCT, ttl=TTL, tags=TAGS)
        yield lambda: room.cache.get(KEY, Product)


@contextmanager
def unseen(url: str) -> Iterator[Hit]:
    """Read an entry that this process does not remember, each time: see lookup.Seen."""
    with Stillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as room:
        room.stats.due = NEVER
        room.cache.set_many(dict.fromkeys(FORGOTTEN, PRODUCT), ttl=TTL, tags=TAGS)
        following = itertools.cycle(FORGOTTEN).__next__
        yield lambda: room.cache.get(following(), Product)


@contextmanager
def cached(url: str) -> Iterator[Hit]:
    with Stillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as room:
        room.stats.due = NEVER

        @room.cache.cached("loaded:{id}", ttl=TTL, tags=TAGS)
        def load(id: int) -> Product:
            return PRODUCT

        yield lambda: load(7)


@asynccontextmanager
async def async_ours(url: str) -> AsyncIterator[AsyncHit]:
    async with AsyncStillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as r:
        r.stats.due = NEVER
        await r.cache.set(KEY, PRODUCT, ttl=TTL, tags=TAGS)
        yield lambda: r.cache.get(KEY, Product)


@asynccontextmanager
async def async_unseen(url: str) -> AsyncIterator[AsyncHit]:
    async with AsyncStillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as r:
        r.stats.due = NEVER
        await r.cache.set_many(dict.fromkeys(FORGOTTEN, PRODUCT), ttl=TTL, tags=TAGS)
        following = itertools.cycle(FORGOTTEN).__next__
        yield lambda: r.cache.get(following(), Product)


@asynccontextmanager
async def async_cached(url: str) -> AsyncIterator[AsyncHit]:
    async with AsyncStillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as r:
        r.stats.due = NEVER

        @r.cache.cached("loaded:{id}", ttl=TTL, tags=TAGS)
        async def load(id: int) -> Product:
            return PRODUCT

        yield lambda: load(7)


# --- the others, each as its documentation first shows it -----------------------------------------


@contextmanager
def dogpile(url: str) -> Iterator[Hit]:
    from dogpile.cache import make_region

    region = make_region().configure(
        "dogpile.cache.redis",
        expiration_time=TTL,
        arguments={
            "url": url,
            "redis_expiration_time": 2 * TTL,
            "distributed_lock": True,
            "thread_local_lock": False,
        },
    )
    region.set(f"dogpile:{KEY}", PRODUCT)
    yield lambda: region.get(f"dogpile:{KEY}")


@contextmanager
def django_own(url: str) -> Iterator[Hit]:
    yield django_hit(url, "django")


@contextmanager
def django_redis(url: str) -> Iterator[Hit]:
    import django_redis  # noqa: F401  (its absence must be an ImportError, here)

    yield django_hit(url, "django-redis")


def django_hit(url: str, alias: str) -> Hit:
    from django.conf import settings
    from django.core.cache import caches
    from django.utils.connection import ConnectionProxy

    if not settings.configured:
        settings.configure(CACHES=django_caches(url))
    cache = ConnectionProxy(caches, alias)  # what `from django.core.cache import cache` is
    cache.set(KEY, PRODUCT, TTL)
    return lambda: cache.get(KEY)


def django_caches(url: str) -> dict[str, dict[str, str]]:
    own = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}
    other = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url}
    return {
        "default": own,
        "django": own | {"KEY_PREFIX": "django"},
        "django-redis": other | {"KEY_PREFIX": "django-redis"},
    }


@asynccontextmanager
async def cashews(url: str) -> AsyncIterator[AsyncHit]:
    from cashews import Cache

    cache = Cache()
    cache.setup(url)
    await cache.set(f"cashews:{KEY}", PRODUCT, expire="10m")
    yield lambda: cache.get(f"cashews:{KEY}")
    await cache.close()


@asynccontextmanager
async def aiocache_json(url: str) -> AsyncIterator[AsyncHit]:
    from aiocache import RedisCache

    cache = RedisCache(namespace="aiocache-json", **aiocache_server(url))
    await cache.set(KEY, PRODUCT.model_dump(mode="json"), ttl=TTL)

    async def hit() -> Product:
        return ADAPTER.validate_python(await cache.get(KEY))

    yield hit
    await cache.close()


@asynccontextmanager
async def aiocache_pickle(url: str) -> AsyncIterator[AsyncHit]:
    from aiocache import RedisCache
    from aiocache.serializers import PickleSerializer

    serializer = PickleSerializer()
    cache = RedisCache(namespace="aiocache-pickle", serializer=serializer, **aiocache_server(url))
    await cache.set(KEY, PRODUCT, ttl=TTL)
    yield lambda: cache.get(KEY)
    await cache.close()


def aiocache_server(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {"endpoint": parts.hostname, "port": parts.port}
