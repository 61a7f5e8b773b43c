"""The page in Flask: alone, with the usual parts, with ours. The server is at REDIS_URL."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, session

from bench.page import ours as our
from bench.page import shop


def bare() -> Flask:
    app = Flask("bare")

    @app.get("/")
    def page() -> dict[str, Any]:
        visit = shop.visit()
        return shop.page("dark", [shop.product(n) for n in visit.products], shop.RATES)

    return app


def usual() -> Flask:
    return _usual(in_batches=False)


def batched() -> Flask:
    return _usual(in_batches=True)


def _usual(in_batches: bool) -> Flask:
    """Return an app with Flask-Session, Flask-Limiter and Flask-Caching, each set up as its documentation says."""
    from flask_caching import Cache
    from flask_limiter import Limiter
    from flask_limiter.util import get_remote_address
    from flask_session import Session

    import redis

    url = os.environ["REDIS_URL"]
    app = Flask("usual")
    app.config |= {
        "SESSION_TYPE": "redis",
        "SESSION_REDIS": redis.Redis.from_url(url),
        "CACHE_TYPE": "RedisCache",
        "CACHE_REDIS_URL": url,
        "CACHE_DEFAULT_TIMEOUT": shop.TTL,
    }
    Session(app)
    cache = Cache(app)
    limiter = Limiter(
        get_remote_address,
        app=app,
        default_limits=[f"{shop.ALLOWED} per minute"],
        strategy="moving-window",
        headers_enabled=True,
        storage_uri=url,
    )
    product: Any = cache.memoize()(shop.load_product)

    rates: Any = cache.cached(timeout=shop.RATES_TTL, key_prefix="rates")(shop.load_rates)

    def one_by_one(ids: list[int]) -> Any:
        return [product(one) for one in ids], rates()

    def in_a_batch(ids: list[int]) -> Any:
        *found, last = cache.get_many(*(f"product:{one}" for one in ids), "rates")
        return [value or load(one) for one, value in zip(ids, found, strict=True)], last or rates()

    def load(id: int) -> shop.Product:
        loaded = shop.load_product(id)
        cache.set(f"product:{id}", loaded)
        return loaded

    def change(id: int) -> None:
        cache.delete(f"product:{id}") if in_batches else cache.delete_memoized(product, id)

    read = in_a_batch if in_batches else one_by_one

    @app.get("/login")
    @limiter.exempt
    def login() -> dict[str, Any]:
        session.update(shop.SESSION)
        return {}

    @app.get("/")
    def page() -> dict[str, Any]:
        visit = shop.visit()
        if visit.changed is not None:
            change(visit.changed)
        return shop.page(session["theme"], *read(visit.products))

    return app


def ours() -> Flask:
    return _ours()


def gathered() -> Flask:
    return _ours(gathered=True)


def near() -> Flask:
    return _ours(near=True)


def _ours(**how: bool) -> Flask:
    from stillroom import Stillroom
    from stillroom.web.flask import StillroomLimits, StillroomSessions, limited

    room = Stillroom()
    read = our.reads(room, **how)
    app = Flask("ours")
    app.session_interface = StillroomSessions(room)
    StillroomLimits(app, room)

    @app.get("/login")
    def login() -> dict[str, Any]:
        session.update(shop.SESSION)
        return {}

    @app.get("/")
    @limited(our.LIMIT)
    def page() -> dict[str, Any]:
        visit = shop.visit()
        if visit.changed is not None:
            room.cache.invalidate(f"product:{visit.changed}")
        return shop.page(session["theme"], *read(visit.products))

    return app
