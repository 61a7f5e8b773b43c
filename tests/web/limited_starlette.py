"""The app of limited_apps.py, in FastAPI and in Starlette."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from stillroom import API, AUTH, AsyncStillroom
from stillroom.web import Header
from stillroom.web import fastapi as on_fastapi
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.starlette import exempt, limited, load_session
from tests.web.limited_apps import (
    GATE,
    GROUP,
    MINE,
    ONE,
    ORIGIN,
    PLACE,
    SHARED,
    TEN,
    TWO,
    is_probe,
    near_loader,
    tenant_of,
    tier,
    wrong_form,
)


def needs(*limits: Any, **options: Any) -> Any:
    return [Depends(on_fastapi.limited(*limits, **options))]


def make_fastapi(room: AsyncStillroom, **options: Any) -> FastAPI:  # noqa: C901 - one endpoint after the other
    app = FastAPI()

    @app.post("/guess", dependencies=needs(AUTH, count="failures"))
    async def guess(right: int = 0) -> str:
        if not right:
            raise HTTPException(401)
        return "right"

    @app.post("/form", dependencies=needs(AUTH, count=wrong_form))
    async def form(right: int = 0) -> Response:
        return RedirectResponse("/open", 302) if right else Response("wrong")

    for path, given, more in (
        ("/tiers", tier, {}),
        ("/cost", TEN, {"cost": lambda request: int(request.query_params["n"])}),
        ("/mine", MINE, {"by": "user"}),
        ("/keyed", MINE, {"by": Header("X-API-Key")}),
        ("/tenant", MINE, {"by": tenant_of}),
        ("/shared/a", SHARED, {}),
        ("/shared/b", [SHARED], {}),
        ("/probed", ONE, {"exempt_when": is_probe}),
    ):
        app.add_api_route(path, said(path), dependencies=needs(given, **more))

    @app.get("/both", dependencies=[*needs(API, by="user"), *needs(TWO)])
    async def both() -> str:
        return "both"

    @app.get("/sync/{number}", dependencies=needs(TWO))
    def sync(number: int) -> int:
        return number

    @app.get("/async")
    @limited(TWO)
    async def asynchronous(number: int = 7) -> int:
        return number

    app.add_route("/class", Whole)
    app.add_route("/method", Parts)

    @app.get("/login")
    async def login(who: str, session: Annotated[Any, Depends(load_session)]) -> str:
        session.login(who)
        return who

    @app.get("/touch", dependencies=needs(TEN))
    async def touch(session: Annotated[Any, Depends(load_session)]) -> str:
        return str(session.user_id)

    price = near_loader(room)

    @app.get("/page", dependencies=needs(TEN))
    async def page(session: Annotated[Any, Depends(load_session)]) -> str:
        return f"{session.user_id} {sum([await price(n) for n in range(5)])}"

    app.add_api_route("/stream", stream, dependencies=needs(PLACE), response_model=None)
    app.add_api_route("/sized", size, dependencies=needs(PLACE), response_model=None)
    app.add_api_route("/fails", fail, dependencies=needs(PLACE), response_model=None)

    @app.get("/open")
    async def unlimited() -> str:
        return "open"

    group = APIRouter(prefix="/group", dependencies=needs(GROUP))
    group.add_api_route("/x", said("x"))
    group.add_api_route("/own", said("own"), dependencies=needs(ONE))
    group.add_api_route("/free", exempt(said("free")))
    group.add_api_route("/freed", limited(ONE)(exempt(said("freed"))))
    app.include_router(group)
    return wrapped(app, room, options)


def make_starlette(room: AsyncStillroom, **options: Any) -> Starlette:  # noqa: C901 - one after the other
    @limited(AUTH, count="failures")
    async def guess(request: Request) -> Response:
        if request.query_params.get("right") != "1":
            raise HTTPException(401)
        return Response("right")

    @limited(AUTH, count=wrong_form)
    async def form(request: Request) -> Response:
        right = request.query_params.get("right") == "1"
        return RedirectResponse("/open", 302) if right else Response("wrong")

    @limited(TWO)
    def sync(request: Request) -> Response:
        return JSONResponse(request.path_params["number"])

    @limited(TWO)
    async def asynchronous(request: Request) -> Response:
        return JSONResponse(7)

    async def login(request: Request) -> Response:
        session = await load_session(request)
        session.login(request.query_params["who"])
        return Response("in")

    @limited(TEN)
    async def touch(request: Request) -> Response:
        return Response(str((await load_session(request)).user_id))

    price = near_loader(room)

    @limited(TEN)
    async def page(request: Request) -> Response:
        session = await load_session(request)
        return Response(f"{session.user_id} {sum([await price(n) for n in range(5)])}")

    async def unlimited(request: Request) -> Response:
        return Response("open")

    async def cost_of(request: Request) -> int:
        return int(request.query_params["n"])

    group = [
        Route("/x", says("x")),
        Route("/own", limited(ONE)(says("own"))),
        Route("/free", exempt(says("free"))),
    ]
    app = Starlette(
        routes=[
            Route("/guess", guess, methods=["POST"]),
            Route("/form", form, methods=["POST"]),
            Route("/tiers", limited(tier)(says("tiers"))),
            Route("/cost", limited(TEN, cost=cost_of)(says("cost"))),
            Route("/mine", limited(MINE, by="user")(says("mine"))),
            Route("/keyed", limited(MINE, by=Header("X-API-Key"))(says("keyed"))),
            Route("/tenant", limited(MINE, by=tenant_of)(says("tenant"))),
            Route("/shared/a", limited(SHARED)(says("a"))),
            Route("/shared/b", limited([SHARED])(says("b"))),
            Route("/probed", limited(ONE, exempt_when=is_probe)(says("probed"))),
            Route("/both", limited(API, by="user")(limited(TWO)(says("both")))),
            Route("/sync/{number:int}", sync),
            Route("/async", asynchronous),
            Route("/class", Whole),
            Route("/method", Parts),
            Route("/login", login),
            Route("/touch", touch),
            Route("/page", page),
            Route("/open", unlimited),
            Route("/stream", limited(PLACE)(streams)),
            Route("/sized", limited(PLACE)(sizes)),
            Route("/fails", limited(PLACE)(fails)),
            Mount("/group", routes=group, middleware=[Middleware(limited(GROUP))]),
        ]
    )
    return wrapped(app, room, options)


async def pieces() -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.to_thread(GATE.wait, 10)
    yield b"second"


async def lingering() -> AsyncIterator[bytes]:
    yield b"all"
    await asyncio.to_thread(GATE.wait, 10)


async def stream() -> Response:
    return StreamingResponse(pieces())


async def streams(request: Request) -> Response:
    return StreamingResponse(pieces())


async def size() -> Response:
    return StreamingResponse(lingering(), headers={"Content-Length": "3"})


async def sizes(request: Request) -> Response:
    return await size()


async def fail() -> Response:
    raise ZeroDivisionError


async def fails(request: Request) -> Response:
    raise ZeroDivisionError


def wrapped(app: Any, room: AsyncStillroom, options: dict[str, Any]) -> Any:
    app.add_middleware(StillroomMiddleware, room=room, **options)
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN], allow_methods=["*"])
    return app


@limited(TWO)
class Whole(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return Response("get")

    def post(self, request: Request) -> Response:
        return Response("post")


class Parts(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return Response("get")

    @limited(TWO)
    def post(self, request: Request) -> Response:
        return Response("post")


def said(word: str) -> Any:
    """Answer as an endpoint of FastAPI."""

    async def say() -> str:
        return word

    return say


def says(word: str) -> Any:
    """Answer as an endpoint of Starlette."""

    async def say(request: Request) -> Response:
        return Response(word)

    return say


MAKERS = {"fastapi": make_fastapi, "starlette": make_starlette}
