"""Everyone who takes part in the hit benchmark: how each is set up, and its one hit."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast
from urllib.parse import unquote, urlsplit

import hiredis
import redis.asyncio
from harness import AsyncHit, Contestant, Hit
from pydantic import BaseModel, TypeAdapter

import redis

# hiredis types its argument as a tuple of one.
pack = cast("Callable[[tuple[str, ...]], bytes]", hiredis.pack_command)

KEY = "product:7"
TTL = 600  # seconds
READ_SIZE = 65536  # bytes


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


@dataclass(frozen=True)
class Address:
    """Where the server is: the url, and its parts for those who take no url."""

    url: str
    host: str
    port: int
    db: int
    username: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> "Address":
        parts = urlsplit(url)
        if parts.scheme != "redis" or not parts.hostname:
            raise SystemExit(f"{url!r}: the floor is a plain TCP socket; give redis://host:port/db")
        return cls(
            url=url,
            host=parts.hostname,
            port=parts.port or 6379,
            db=int(parts.path.strip("/") or 0),
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )

    def greeting(self) -> Iterator[bytes]:
        """The commands a raw connection sends first."""
        if self.password:
            yield pack(("AUTH", self.username or "default", self.password))
        yield pack(("SELECT", str(self.db)))


# --- who takes part -------------------------------------------------------------------------------

VALIDATED = "validate_json on the reply"
UNPICKLED = "the model is pickled: no validation on the way out"


def contestants(address: Address) -> list[Contestant]:
    """Everyone, in the order of the table."""
    return [
        Contestant(
            name="floor",
            kind="sync",
            role="floor",
            package="hiredis",
            setup=f"socket and hiredis; {VALIDATED}",
            make=partial(floor, address),
        ),
        Contestant(
            name="redis-py",
            kind="sync",
            role="bare",
            package="redis",
            setup=f"redis.Redis.from_url(url), its defaults; {VALIDATED}",
            make=partial(bare, address),
        ),
        Contestant(
            name="stillroom",
            kind="sync",
            role="ours",
            package="stillroom",
            setup="room.cache.get(key, Product), two tags; typed by itself",
            make=partial(ours, address),
        ),
        Contestant(
            name="dogpile.cache",
            kind="sync",
            role="peer",
            package="dogpile.cache",
            setup=f"the region of its redis docs, region.get; {UNPICKLED}",
            make=partial(dogpile, address),
        ),
        Contestant(
            name="django",
            kind="sync",
            role="peer",
            package="django",
            setup=f"django.core.cache through its proxy, RedisCache; {UNPICKLED}",
            make=partial(django_own, address),
        ),
        Contestant(
            name="django-redis",
            kind="sync",
            role="peer",
            package="django-redis",
            setup=f"django.core.cache through its proxy, DefaultClient; {UNPICKLED}",
            make=partial(django_redis, address),
        ),
        Contestant(
            name="async floor",
            kind="async",
            role="floor",
            package="hiredis",
            setup=f"asyncio streams and hiredis; {VALIDATED}",
            make=partial(async_floor, address),
        ),
        Contestant(
            name="async redis-py",
            kind="async",
            role="bare",
            package="redis",
            setup=f"redis.asyncio.Redis.from_url(url), its defaults; {VALIDATED}",
            make=partial(async_bare, address),
        ),
        Contestant(
            name="async stillroom",
            kind="async",
            role="ours",
            package="stillroom",
            setup="await room.cache.get(key, Product), two tags; typed by itself",
            make=partial(async_ours, address),
        ),
        Contestant(
            name="cashews",
            kind="async",
            role="peer",
            package="cashews",
            setup=f"cache.setup(url), no secret, no client side; {UNPICKLED}",
            make=partial(cashews, address),
        ),
        Contestant(
            name="aiocache",
            kind="async",
            role="peer",
            package="aiocache",
            setup="RedisCache, its default JsonSerializer holds a dict; validate_python on it",
            make=partial(aiocache_json, address),
        ),
        Contestant(
            name="aiocache pickle",
            kind="async",
            role="peer",
            package="aiocache",
            setup=f"RedisCache with the PickleSerializer of its README; {UNPICKLED}",
            make=partial(aiocache_pickle, address),
        ),
    ]


# --- the floor: a socket, hiredis, pydantic -------------------------------------------------------


@contextmanager
def floor(address: Address) -> Iterator[Hit]:
    store_body(address)
    replies = hiredis.Reader()
    with socket.create_connection((address.host, address.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def exchange(command: bytes) -> bytes:
            sock.sendall(command)
            while True:
                replies.feed(sock.recv(READ_SIZE))
                reply: bytes | Literal[False] = replies.gets()
                if reply is not False:
                    return reply

        def hit() -> Product:
            return ADAPTER.validate_json(exchange(pack(("GET", KEY))))

        for command in address.greeting():
            exchange(command)
        yield hit


@asynccontextmanager
async def async_floor(address: Address) -> AsyncIterator[AsyncHit]:
    store_body(address)
    replies = hiredis.Reader()
    # asyncio sets TCP_NODELAY itself. No drain(): forty bytes never fill the write buffer.
    stream, writer = await asyncio.open_connection(address.host, address.port)

    async def exchange(command: bytes) -> bytes:
        writer.write(command)
        while True:
            replies.feed(await stream.read(READ_SIZE))
            reply: bytes | Literal[False] = replies.gets()
            if reply is not False:
                return reply

    async def hit() -> Product:
        return ADAPTER.validate_json(await exchange(pack(("GET", KEY))))

    for command in address.greeting():
        await exchange(command)
    yield hit
    writer.close()
    await writer.wait_closed()


def store_body(address: Address) -> None:
    """The JSON that the floor and the bare client read: the same bytes under one key."""
    with redis.Redis.from_url(address.url) as client:
        client.set(KEY, BODY, ex=TTL)


# --- the bare client: redis-py as it comes --------------------------------------------------------


@contextmanager
def bare(address: Address) -> Iterator[Hit]:
    store_body(address)
    with redis.Redis.from_url(address.url) as client:
        get = cast("Callable[[str], bytes]", client.get)
        yield lambda: ADAPTER.validate_json(get(KEY))


@asynccontextmanager
async def async_bare(address: Address) -> AsyncIterator[AsyncHit]:
    store_body(address)
    async with redis.asyncio.Redis.from_url(address.url) as client:
        get = cast("Callable[[str], Awaitable[bytes]]", client.get)

        async def hit() -> Product:
            return ADAPTER.validate_json(await get(KEY))

        yield hit


# --- ours -----------------------------------------------------------------------------------------


@contextmanager
def ours(address: Address) -> Iterator[Hit]:
    from stillroom import Settings, Stillroom

    room = Stillroom(Settings(redis_url=address.url))
    room.cache.set(KEY, PRODUCT, ttl=TTL, tags=["products", "brand:acme"])
    yield lambda: room.cache.get(KEY, Product)
    room.close()


@asynccontextmanager
async def async_ours(address: Address) -> AsyncIterator[AsyncHit]:
    from stillroom import AsyncStillroom, Settings

    room = AsyncStillroom(Settings(redis_url=address.url))
    await room.cache.set(KEY, PRODUCT, ttl=TTL, tags=["products", "brand:acme"])
    yield lambda: room.cache.get(KEY, Product)
    await room.close()


# --- the others, each as its documentation first shows it -----------------------------------------


@contextmanager
def dogpile(address: Address) -> Iterator[Hit]:
    from dogpile.cache import make_region

    region = make_region().configure(
        "dogpile.cache.redis",
        expiration_time=TTL,
        arguments={
            "url": address.url,
            "redis_expiration_time": 2 * TTL,
            "distributed_lock": True,
            "thread_local_lock": False,
        },
    )
    region.set(f"dogpile:{KEY}", PRODUCT)
    yield lambda: region.get(f"dogpile:{KEY}")


@contextmanager
def django_own(address: Address) -> Iterator[Hit]:
    yield django_hit(address, "django")


@contextmanager
def django_redis(address: Address) -> Iterator[Hit]:
    import django_redis  # noqa: F401  (its absence must be an ImportError, here)

    yield django_hit(address, "django-redis")


def django_hit(address: Address, alias: str) -> Hit:
    from django.conf import settings
    from django.core.cache import caches
    from django.utils.connection import ConnectionProxy

    if not settings.configured:
        settings.configure(CACHES=django_caches(address.url))
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
async def cashews(address: Address) -> AsyncIterator[AsyncHit]:
    from cashews import Cache

    cache = Cache()
    cache.setup(address.url)
    await cache.set(f"cashews:{KEY}", PRODUCT, expire="10m")
    yield lambda: cache.get(f"cashews:{KEY}")
    await cache.close()


@asynccontextmanager
async def aiocache_json(address: Address) -> AsyncIterator[AsyncHit]:
    from aiocache import RedisCache

    cache = RedisCache(namespace="aiocache-json", **aiocache_server(address))
    await cache.set(KEY, PRODUCT.model_dump(mode="json"), ttl=TTL)

    async def hit() -> Product:
        return ADAPTER.validate_python(await cache.get(KEY))

    yield hit
    await cache.close()


@asynccontextmanager
async def aiocache_pickle(address: Address) -> AsyncIterator[AsyncHit]:
    from aiocache import RedisCache
    from aiocache.serializers import PickleSerializer

    serializer = PickleSerializer()
    cache = RedisCache(
        namespace="aiocache-pickle", serializer=serializer, **aiocache_server(address)
    )
    await cache.set(KEY, PRODUCT, ttl=TTL)
    yield lambda: cache.get(KEY)
    await cache.close()


def aiocache_server(address: Address) -> dict[str, str | int | None]:
    return {
        "endpoint": address.host,
        "port": address.port,
        "db": address.db,
        "password": address.password,
    }
