"""What type checkers make of the public API. Checked by mypy and pyright in `make check`, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, assert_type

from pydantic import BaseModel
from sqlalchemy.orm import Session as Session_
from starlette.background import BackgroundTasks
from starlette.requests import HTTPConnection
from starlette.responses import Response

from stillroom import (
    AUTH,
    AsyncHeld,
    AsyncSessions,
    AsyncStillroom,
    Ban,
    Cache,
    CachedValue,
    Change,
    Decision,
    Device,
    Held,
    InlineDispatch,
    Limit,
    Reservation,
    Route,
    Routes,
    Rule,
    Session,
    Settings,
    Stillroom,
)
from stillroom.health import Report, Snapshot
from stillroom.integrations.sqlalchemy import AfterCommit, invalidates
from stillroom.web import (
    Answered,
    AsyncWebSession,
    Header,
    HealthASGI,
    HealthWSGI,
    SessionCookie,
    WebSession,
    asgi,
    fastapi,
    flask,
    starlette,
)
from stillroom.web.pages import Pages
from stillroom.web.wsgi import App, StillroomMiddleware


class Product(BaseModel):
    id: int


def blocking(room: Stillroom) -> None:
    assert_type(room.cache.get("k", Product), Product | None)
    assert_type(room.cache.get("k", int, 0), int)
    assert_type(room.cache.get("k", list[Product]), list[Product] | None)
    assert_type(room.cache.get("k"), Any)
    assert_type(room.cache.get_entry("k", Product), CachedValue[Product] | None)
    assert_type(room.cache.get_or_set("k", lambda: Product(id=1)), Product)
    assert_type(room.cache.set("k", 1, ttl=3, tags=["t"]), bool)
    assert_type(room.cache.invalidate("a", "b"), int)
    assert_type(room.cache.add("k", 1, ttl=3), bool)
    assert_type(room.cache.incr("k"), float | None)
    assert_type(room.cache.touch("k", ttl=3), bool)
    room.cache.touch("k", tags=["t"])  # type: ignore[call-arg]

    @room.cache.cached("product:{id}", ttl=60, tags=["products", lambda p: [f"p:{p.id}"]])
    def load(id: int, brand: str = "acme") -> Product:
        return Product(id=id)

    assert_type(load(7, brand="b"), Product)
    assert_type(load.key(7), str)
    assert_type(load.many([7, 8], brand="b"), list[Product])
    load.many([7], bran="b")  # type: ignore[call-arg]
    load("seven")  # type: ignore[arg-type]
    room.cache.get(7)  # type: ignore[call-overload]
    room.cache.set("k", 1, tll=3)  # type: ignore[call-arg]
    room.cache.cached("k", tll=3)  # type: ignore[call-arg]
    room.cache.set("k", 1, ttl="60")  # type: ignore[arg-type]
    room.cache.set("k", 1, ttl=timedelta(minutes=1), swr=0.5)
    assert_type(room.upkeep.reclaim(), dict[str, int])
    room.cache.reclaim()  # type: ignore[attr-defined]
    room.cache.gett("k")  # type: ignore[attr-defined]

    class Shelf:
        @room.cache.cached("book:{id}", ignore=["self"])
        def book(self, id: int) -> str:
            return f"book {id}"

    assert_type(Shelf().book(7), str)
    assert_type(Shelf().book.key(7), str)
    assert_type(Shelf().book.many([7]), list[str])
    assert_type(Shelf().book.invalidate(7), int)

    @room.cache.cached("rates")
    def rates() -> dict[str, float]:
        return {}

    products = [partial(load, n) for n in (7, 8)]
    assert_type(room.cache.gather(rates, partial(load, 7)), tuple[dict[str, float], Product])
    assert_type(room.cache.gather(*products), tuple[Product, ...])
    room.cache.gather(rates(), rates)  # type: ignore[call-overload]
    Shelf().book("seven")  # type: ignore[arg-type]


def rooms() -> None:
    Stillroom()
    Stillroom("redis://cache:6379", ttl=60)
    AsyncStillroom(redis_url="redis://cache:6379", dispatch=InlineDispatch())
    assert_type(Stillroom(Settings()).cache, Cache)
    assert_type(AsyncStillroom().sessions, AsyncSessions)
    Stillroom(7)  # type: ignore[arg-type]


def in_a_request(session: WebSession, app: App, room: Stillroom) -> None:
    assert_type(session.user_id, str | None)
    assert_type(session["cart"], Any)
    session.login("ann", tags=["web"])
    assert_type(StillroomMiddleware(app, room, routes=Routes(), sessions=True), StillroomMiddleware)
    StillroomMiddleware(app, room, route=Routes())  # type: ignore[call-arg]


async def in_an_async_request(session: AsyncWebSession) -> None:
    assert_type(await session.load(), AsyncWebSession)


async def awaiting(room: AsyncStillroom) -> None:
    assert_type(await room.cache.get("k", Product), Product | None)
    assert_type(await room.cache.get_or_set("k", lambda: Product(id=1)), Product)
    assert_type(await room.cache.invalidate("a"), int)
    assert_type(await room.health.check(), Report)

    async def fetch() -> Product:
        return Product(id=1)

    assert_type(await room.cache.get_or_set("k", fetch), Product)

    @room.cache.cached("product:{id}")
    async def load(id: int) -> Product:
        return Product(id=id)

    @room.cache.cached("price:{id}")
    def price(id: int) -> int:
        return id

    running = asyncio.create_task(room.cache.invalidate("k"))
    assert_type(await running, int)
    tasks = BackgroundTasks()
    tasks.add_task(room.cache.invalidate_by_tag, "products", soft=True)
    tasks.add_task(load.invalidate, 7)
    assert_type(await load(7), Product)
    assert_type(await price(7), int)
    assert_type(
        await room.cache.gather(partial(load, 7), partial(price, id=7)), tuple[Product, int]
    )


def health(room: Stillroom, application: App) -> None:
    assert_type(room.health.check(), Report)
    assert_type(room.upkeep.snapshot(), Snapshot)
    assert_type(room.health.history(hours=48), list[Snapshot])
    HealthWSGI(room)
    HealthWSGI(application, room)
    HealthWSGI(app=application, room=room)


class DjangosWSGI:
    """Django's handler, as its types describe it."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> object:
        return environ


class DjangosASGI:
    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Mapping[str, Any]]],
        send: Callable[[Mapping[str, Any]], Awaitable[None]],
    ) -> None: ...


def around_django(room: Stillroom, awaited: AsyncStillroom) -> None:
    HealthWSGI(DjangosWSGI(), room)
    StillroomMiddleware(DjangosWSGI(), room, sessions=False)
    StillroomMiddleware(7, room)  # type: ignore[arg-type]
    HealthASGI(DjangosASGI(), awaited)
    asgi.StillroomMiddleware(DjangosASGI(), awaited, sessions=False)
    asgi.StillroomMiddleware(DjangosWSGI(), awaited)  # type: ignore[arg-type]
    SessionCookie("sid", secure=False, same_site="Strict")
    SessionCookie("sid", same_site="lax")  # type: ignore[arg-type]


def sessions(room: Stillroom) -> None:
    assert_type(room.sessions.create("u1", Product(id=1)), Session[Product])
    assert_type(room.sessions.get("token"), Session[dict[str, Any]] | None)
    assert_type(room.sessions.get("token", Product), Session[Product] | None)
    assert_type(room.sessions.update("token", {"a": 1}), int)
    assert_type(room.sessions.rotate("token", Product), Session[Product])
    assert_type(room.sessions.confirm("token", Product), Session[Product])
    assert_type(room.sessions.confirm("token"), Session[dict[str, Any]])
    assert_type(room.sessions.destroy("token", defer=True), bool)
    assert_type(room.sessions.list_for_user("u1"), list[Device])


def limits(room: Stillroom) -> None:
    decision = room.limits.check(
        {"ip": "203.0.113.7", "user": None}, [AUTH], cost=2, route="/login"
    )
    assert_type(decision, Decision)
    assert_type(decision.allowed, bool)
    assert_type(decision.retry_after, float | None)
    assert_type(decision.headers(), dict[str, str])
    assert_type(room.limits.peek("203.0.113.7", (AUTH,)), Decision)
    assert_type(room.limits.reserve("203.0.113.7", [AUTH]), Reservation)
    held = room.limits.reserve("203.0.113.7", [AUTH])
    assert_type(room.limits.refund(held), bool | None)
    assert_type(room.limits.settle(held, 7), bool | None)
    assert_type(room.limits.wait({"ip": "203.0.113.7"}, [AUTH], timeout=3), Decision)
    assert_type(room.limits.change("api", 10, 60, 3_600), Change)
    assert_type(room.limits.changes(), list[Change])
    with room.limits.hold("203.0.113.7", [Limit("exports", 2, 60, in_flight=True)]) as place:
        assert_type(place, Reservation)
    assert_type(room.limits.client("10.0.0.1", [("X-Forwarded-For", "203.0.113.7")]), str)
    assert_type(Routes([Route("/login", [AUTH], ["POST"])]).find("POST", "/login"), Route)
    Limit("mine", 5, 60, away="closed")  # type: ignore[arg-type]
    room.limits.check("203.0.113.7", AUTH)  # type: ignore[arg-type]


async def limits_awaited(room: AsyncStillroom) -> None:
    assert_type(await room.limits.check("203.0.113.7", [AUTH]), Decision)
    assert_type(await room.limits.wait("203.0.113.7", [AUTH]), Decision)
    assert_type(room.limits.client(None), str)
    async with room.limits.hold("203.0.113.7", [Limit("exports", 2, 60, in_flight=True)]) as place:
        assert_type(place, Reservation)


@flask.limited(AUTH, count="failures", by="ip&user")
def view(id: int) -> str:
    return f"{id}"


@starlette.limited(lambda request: [AUTH], by=Header("X-API-Key"), cost=lambda request: 2)
async def endpoint(request: HTTPConnection) -> Response:
    return Response(status_code=204)


def limits_on_endpoints(room: AsyncStillroom) -> None:
    assert_type(view(7), str)
    view("seven")  # type: ignore[arg-type]
    flask.limited("auth")  # type: ignore[arg-type]
    flask.session.login("ann", device="laptop")
    assert_type(flask.session.user_id, str | None)
    starlette.limited(AUTH, by=7)  # type: ignore[arg-type]
    starlette.limited(AUTH, count="some")  # type: ignore[arg-type]
    fastapi.limited(AUTH, tiers=[])  # type: ignore[call-arg]
    fastapi.limited([AUTH], by=lambda request: {"tenant": request.headers.get("X-Tenant")})
    assert_type(Answered(200, {}).status, int)


def abuse(room: Stillroom) -> None:
    assert_type(room.abuse.report("auth_fail", ip="203.0.113.9", user="ann"), bool | None)
    assert_type(room.upkeep.scan_abuse(), dict[str, Any])
    assert_type(room.abuse.ban("203.0.113.9", 600, reason="loud"), Ban)
    assert_type(room.abuse.lift("203.0.113.9"), bool)
    assert_type(room.abuse.bans(), list[Ban])
    assert_type(room.abuse.rules, tuple[Rule, ...])
    room.abuse.report("auth_fail", "203.0.113.9")  # type: ignore[call-arg]


def locks(room: Stillroom) -> None:
    with room.lock("import", lease=30, wait=timedelta(seconds=5)) as held:
        assert_type(held, Held)
        assert_type(held.fence, int)
    assert_type(room.semaphore("reports", 3).acquire(), Held)
    room.lock("import", leese=3)  # type: ignore[call-arg]
    room.lock("import", wait="5m")  # type: ignore[arg-type]


async def locks_awaited(room: AsyncStillroom) -> None:
    async with room.lock("import") as held:
        assert_type(held, AsyncHeld)


def in_an_app(room: Stillroom, session: Session_) -> None:
    @invalidates("products", "product:{id}")
    class Row:
        id: int

    assert_type(Row(), Row)
    AfterCommit(room).invalidate_by_tag(session, "products")
    AfterCommit(room).watch(room)  # type: ignore[arg-type]

    @Pages(room).page(ttl=60, swr=timedelta(minutes=10), tags=["product:{id}"])
    def view(id: int) -> Product:
        return Product(id=id)

    assert_type(view(7), Product)
    Pages(room).page(tll=60)  # type: ignore[call-arg]

    @room.cache.cached("rates", memo=True, warm_every=timedelta(minutes=5))
    def rates() -> int:
        return 1

    assert_type(rates(), int)
