"""FastAPI has dependencies for room and session, and a lifespan that runs beside the app's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient

from stillroom import AsyncStillroom, NoDispatch, Settings, SettingsError, Stillroom
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.fastapi_room import AppLifespan, CurrentRoom, CurrentSession, lifespan
from stillroom.wire import load_begun, loading_since


def app_of(life: Any, room: AsyncStillroom) -> FastAPI:
    app = FastAPI(lifespan=life)
    app.add_middleware(StillroomMiddleware, room=room)

    @app.get("/price")
    async def price(room: CurrentRoom) -> int:
        async def load() -> int:
            return 7

        found: int = await room.cache.get_or_set("price", load)
        return found

    @app.get("/add/{item}")
    async def add(item: str, session: CurrentSession) -> list[str]:
        session.setdefault("cart", []).append(item)
        cart: list[str] = session["cart"]
        return cart

    @app.get("/state")
    async def state(request: Request) -> dict[str, str]:
        return {"db": request.state.db}

    return app


def test_the_app_s_own_lifespan_goes_along(settings: Settings, room: Stillroom) -> None:
    """The app's own lifespan runs while the room is open, and its state is the requests' state."""
    mine = AsyncStillroom(settings, dispatch=NoDispatch())
    story: list[Any] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        story.append(await mine.cache.set("begun", True))
        yield {"db": "open"}
        story.append(await mine.cache.get("begun"))

    @asynccontextmanager
    async def other(app: FastAPI) -> AsyncIterator[None]:
        yield None

    app = app_of(lifespan(mine, own, other), mine)
    with TestClient(app, base_url="https://testserver") as client:
        assert client.get("/price").json() == 7
        assert client.get("/state").json() == {"db": "open"}
        assert client.get("/add/tea").json() == ["tea"]
        assert client.get("/add/jam").json() == ["tea", "jam"]
    assert story == [True, True]
    assert room.cache.get("price") == 7


def test_the_room_s_own_lifespan_is_enough(settings: Settings) -> None:
    """The room's own lifespan is enough to give the app its room."""
    mine = AsyncStillroom(settings, dispatch=NoDispatch())
    with TestClient(app_of(mine.lifespan, mine), base_url="https://testserver") as client:
        assert client.get("/price").json() == 7


def test_a_loader_of_an_object_is_a_dependency(settings: Settings) -> None:
    """A loader that is a method is a dependency as a method is: `self` is not asked for, and it is called once."""
    mine = AsyncStillroom(settings, dispatch=NoDispatch())
    loads: list[str] = []

    class Shop:
        @mine.cache.cached("rate:{currency}", ignore=["self"], keep=lambda _: False)
        async def rate(self, currency: str) -> int:
            loads.append(currency)
            return 7

    shop, app = Shop(), FastAPI(lifespan=mine.lifespan)

    def price(rate: int = Depends(shop.rate)) -> int:
        return rate

    @app.get("/total")
    def total(price: int = Depends(price), rate: int = Depends(shop.rate)) -> int:
        return price + rate

    with TestClient(app) as client:
        assert client.get("/total?currency=eur").json() == 14
        assert client.get("/total").status_code == 422
    assert loads == ["eur"]


def test_a_mounted_app_has_the_room_around_it(settings: Settings) -> None:
    """A mounted app, whose lifespan nobody runs, has the room of the middleware around it, or of its own state."""
    room, other = (AsyncStillroom(settings, dispatch=NoDispatch()) for _ in range(2))
    app, plain, own = FastAPI(lifespan=room.lifespan), FastAPI(), FastAPI()
    app.add_middleware(StillroomMiddleware, room=room)
    own.state.stillroom = other
    found: list[AsyncStillroom] = []

    async def look(room: CurrentRoom) -> None:
        found.append(room)

    for path, mounted in (("/plain", plain), ("/own", own)):
        mounted.get("/")(look)
        app.mount(path, mounted)
    with TestClient(app) as client:
        assert [client.get(path).status_code for path in ("/plain/", "/own/")] == [200, 200]
    assert found == [room, other]
    with pytest.raises(SettingsError, match="A mounted app's lifespan is not run"):
        TestClient(plain).get("/")


def test_mistakes(settings: Settings, room: Stillroom) -> None:
    """A blocking room and an app without a room raise clear errors."""
    with pytest.raises(SettingsError, match="needs an AsyncStillroom"):
        lifespan(room)  # type: ignore[arg-type]
    mine = AsyncStillroom(settings, dispatch=NoDispatch())
    client = TestClient(app_of(None, mine), base_url="https://testserver")
    with pytest.raises(SettingsError, match="this app has no room"):
        client.get("/price")


@pytest.mark.parametrize("error", [SystemExit("no settings"), RuntimeError("no database")])
def test_a_lifespan_that_fails_is_told_to_each_load_until_it_begins(
    error: BaseException,
) -> None:
    """A lifespan that raises or exits in a worker fails the load that began it, and the next load tries again."""
    failures = [error]

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if failures:
            raise failures.pop()
        yield

    around = AppLifespan(FastAPI(lifespan=life))
    with pytest.raises(type(error), match=str(error)), around:
        raise AssertionError("the lifespan has begun")
    with around:
        assert not failures


def test_a_lifespan_that_a_load_begins_is_no_part_of_it() -> None:
    """What a lifespan begins in a worker reads as outside of loads: it goes on when the load has long ended."""
    begun: list[float] = []

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        begun.append(loading_since())
        yield

    around = AppLifespan(FastAPI(lifespan=life))
    with load_begun([b"load"]), around:
        assert loading_since()
    assert begun == [0.0]
