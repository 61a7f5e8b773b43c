"""The same small shop in FastAPI and in Flask, with cached pages. It counts how often a view is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from flask import Flask, abort, jsonify, request
from flask import Response as FlaskResponse

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.web.pages import Pages, tag_page
from tests.support.web import serving_asgi, serving_wsgi


class Shop:
    """The shop that both apps share, and that a test inspects."""

    def __init__(self, face: str, room: Any, **options: Any) -> None:
        self.face = face
        self.room = room
        self.pages = Pages(room, **options)
        self.calls: list[str] = []
        self.price = 1
        self.broken = False
        self.app = fastapi_shop(self) if face == "fastapi" else flask_shop(self)
        self.pages.install(self.app)

    def called(self, what: str) -> int:
        self.calls.append(what)
        if self.broken:
            raise RuntimeError("broken")
        return self.price


def fastapi_shop(shop: Shop) -> FastAPI:
    app, page, router = FastAPI(), shop.pages.page, APIRouter(prefix="/api")

    @app.get("/products/{id}")
    @page(ttl=60, swr=600, tags=["products", "product:{id}"], query=["sort", "page"])
    async def product(id: int, request: Request, sort: str = "", page: int = 1) -> Any:
        if id > 1_000:
            raise HTTPException(404)
        tag_page(f"price:{shop.called('product')}")
        return {
            "id": id,
            "price": shop.price,
            "sort": sort,
            "page": page,
            "headers": sorted(request.headers.keys()),
            "url": str(request.url),
        }

    @router.get("/greeting")
    @page(ttl=60, tags=["greetings"], vary=["Accept-Language"], max_age=30, s_maxage=300)
    def greeting(request: Request) -> Any:
        shop.called("greeting")
        return Response(
            f"\u00e9 {request.headers.get('accept-language')}".encode("latin-1"),
            headers={"Content-Type": "text/plain; charset=latin-1", "Vary": "Accept-Language"},
        )

    @app.get("/about")
    @page(ttl=60, sessions=True, stale_while_revalidate=60, stale_if_error=3_600, max_age=10)
    def about() -> Any:
        shop.called("about")
        return {"about": "us"}

    @app.get("/kept/{how}")
    @page(ttl=60)
    def kept(how: str) -> Any:
        shop.called(how)
        return starlette_response(how)

    @app.get("/plain")
    def plain() -> Any:
        shop.called("plain")
        return {}

    app.include_router(router)
    return app


def flask_shop(shop: Shop) -> Flask:
    app, page = Flask("bookshop"), shop.pages.page

    @app.get("/products/<int:id>")
    @page(ttl=60, swr=600, tags=["products", "product:{id}"], query=["sort", "page"])
    def product(id: int) -> Any:
        if id > 1_000:
            abort(404)
        tag_page(f"price:{shop.called('product')}")
        return jsonify(
            {
                "id": id,
                "price": shop.price,
                "sort": request.args.get("sort", ""),
                "page": int(request.args.get("page", 1)),
                "headers": sorted(name.lower() for name, _ in request.headers),
                "url": request.url,
            }
        )

    @app.get("/api/greeting")
    @page(ttl=60, tags=["greetings"], vary=["Accept-Language"], max_age=30, s_maxage=300)
    def greeting() -> Any:
        shop.called("greeting")
        response = FlaskResponse(
            f"\u00e9 {request.headers.get('accept-language')}".encode("latin-1"),
            content_type="text/plain; charset=latin-1",
        )
        response.vary.add("Accept-Language")
        return response

    @app.get("/about")
    @page(ttl=60, sessions=True, stale_while_revalidate=60, stale_if_error=3_600, max_age=10)
    def about() -> Any:
        shop.called("about")
        return {"about": "us"}

    @app.get("/kept/<how>")
    @page(ttl=60)
    def kept(how: str) -> Any:
        shop.called(how)
        return flask_response(how)

    @app.get("/plain")
    def plain() -> Any:
        shop.called("plain")
        return {}

    return app


HEADERS: dict[str, dict[str, str]] = {
    "private": {"Cache-Control": "private"},
    "no-store": {"Cache-Control": "no-store"},
    "no-cache": {"Cache-Control": "no-cache"},
    "vary": {"Vary": "User-Agent"},
    "nonce": {"Content-Security-Policy-Report-Only": "script-src 'self' 'nonce-n0'"},
    "moved": {"Location": "/about"},
    "own": {
        "ETag": '"own"',
        "Cache-Control": "public, max-age=5",
        "Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT",
    },
}
STATUSES = {"error": 503, "moved": 301}
PIECES = {"stream": [b"a", b"b", b"c"], "large": [b"x" * 100_000] * 3}


def starlette_response(how: str) -> Any:
    if how in PIECES:
        return StreamingResponse(iter(PIECES[how]))
    response = JSONResponse({}, status_code=STATUSES.get(how, 200), headers=HEADERS.get(how))
    if how == "cookie":
        response.set_cookie("a", "b")
    return response


def flask_response(how: str) -> Any:
    if how in PIECES:
        return FlaskResponse(iter(PIECES[how]))
    response = FlaskResponse("{}", STATUSES.get(how, 200), HEADERS.get(how))
    if how == "cookie":
        response.set_cookie("a", "b")
    return response


@contextmanager
def serving(face: str, settings: Settings, dispatch: Any = None, **options: Any) -> Iterator[Any]:
    """Serve the shop behind a real server; yield (port, shop)."""
    if face == "flask":
        with Stillroom(settings, dispatch=dispatch or NoDispatch()) as room:
            shop = Shop(face, room, **options)
            with serving_wsgi(shop.app) as port:
                yield port, shop
        return
    async_room = AsyncStillroom(settings, dispatch=dispatch or NoDispatch())
    shop = Shop(face, async_room, **options)
    with serving_asgi(lambda _: shop.app, async_room) as port:
        yield port, shop
