"""The page in FastAPI: alone, with the usual parts, with ours. The server is at REDIS_URL."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI, Request, Response

from bench.page import ours as our
from bench.page import shop


def bare() -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def page() -> dict[str, Any]:
        visit = shop.visit()
        return shop.page("dark", [shop.product(n) for n in visit.products], shop.RATES)

    return app


def usual() -> FastAPI:
    return _usual(in_batches=False)


def batched() -> FastAPI:
    return _usual(in_batches=True)


def _usual(in_batches: bool) -> FastAPI:
    """Return an app with starsessions, slowapi and cashews, each as its documentation sets it up for Redis."""
    from cashews import cache
    from slowapi import Limiter
    from slowapi.util import get_remote_address
    from starsessions import SessionAutoloadMiddleware, SessionMiddleware
    from starsessions.stores.redis import RedisStore

    url = os.environ["REDIS_URL"]
    app = FastAPI()
    limiter = Limiter(
        get_remote_address, strategy="moving-window", headers_enabled=True, storage_uri=url
    )
    app.state.limiter = limiter
    app.add_middleware(SessionAutoloadMiddleware)
    app.add_middleware(
        SessionMiddleware, store=RedisStore(url), lifetime=86_400, cookie_https_only=False
    )
    cache.setup(url)
    product = cache(ttl=shop.TTL, key="product:{id}", tags=["product:{id}"])(
        shop.load_product_async
    )
    rates = cache(ttl=shop.RATES_TTL, key="rates")(shop.load_rates_async)

    async def one_by_one(ids: list[int]) -> Any:
        return [await product(id=one) for one in ids], await rates()

    async def in_a_batch(ids: list[int]) -> Any:
        *found, last = await cache.get_many(*(f"product:{one}" for one in ids), "rates")
        products = [value or await load(one) for one, value in zip(ids, found, strict=True)]
        return products, last or await rates()

    async def load(id: int) -> shop.Product:
        loaded = await shop.load_product_async(id)
        await cache.set(f"product:{id}", loaded, expire=shop.TTL)
        return loaded

    async def change(id: int) -> None:
        await (cache.delete(f"product:{id}") if in_batches else cache.delete_tags(f"product:{id}"))

    read = in_a_batch if in_batches else one_by_one

    @app.get("/login")
    async def login(request: Request) -> dict[str, Any]:
        request.session.update(shop.SESSION)
        return {}

    @app.get("/")
    @limiter.limit(f"{shop.ALLOWED}/minute")
    async def page(request: Request, response: Response) -> dict[str, Any]:
        visit = shop.visit()
        if visit.changed is not None:
            await change(visit.changed)
        return shop.page(request.session["theme"], *await read(visit.products))

    return app


def ours() -> FastAPI:
    return _ours()


def gathered() -> FastAPI:
    return _ours(gathered=True)


def near() -> FastAPI:
    return _ours(near=True)


def _ours(**how: bool) -> FastAPI:
    from stillroom import AsyncStillroom
    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited, load_session

    room = AsyncStillroom()
    read = our.async_reads(room, **how)
    app = FastAPI(lifespan=room.lifespan)
    app.add_middleware(StillroomMiddleware, room=room)

    @app.get("/login")
    async def login(request: Request) -> dict[str, Any]:
        (await load_session(request)).update(shop.SESSION)
        return {}

    @app.get("/")
    @limited(our.LIMIT)
    async def page(request: Request) -> dict[str, Any]:
        session = await load_session(request)
        visit = shop.visit()
        if visit.changed is not None:
            await room.cache.invalidate(f"product:{visit.changed}")
        return shop.page(session["theme"], *await read(visit.products))

    return app
