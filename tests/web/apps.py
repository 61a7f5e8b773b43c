"""One small shop, as a WSGI and as an ASGI app, for the tests that hold for both.

`/cart/add?x` puts x into the cart; `/cart` shows it; `/deep?x` changes a list in place; `/login?who`, `/logout`,
`/renew`, `/who`; `/sensitive` is for who has just logged in; `/set?key=value`, `/drop?key`, `/keys`; `/plain` looks
at no session; `/fail/500?x` puts x into the cart and answers 500, `/raise?x` raises instead; `/late` writes after
the response has begun.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl

from stillroom.web.request_session import RequestSession


class Failed(Exception):
    """The app's own mistake, raised by a view."""


def add(session: RequestSession, item: str) -> Any:
    session["cart"] = [*session.get("cart", []), item]
    return session["cart"]


def login(session: RequestSession, who: str) -> Any:
    session.login(who, tags=["web"])
    return session.user_id


def logout(session: RequestSession, _: str) -> Any:
    session.logout()
    return session.user_id


def fail(session: RequestSession, item: str) -> Any:
    session["cart"] = [item]
    return "failed"


def raise_it(session: RequestSession, item: str) -> Any:
    session["cart"] = [item]
    raise Failed(item)


ACTS: dict[str, Callable[[RequestSession, str], Any]] = {
    "/cart": lambda session, _: session.get("cart", []),
    "/cart/add": add,
    "/deep": lambda session, item: session["cart"].append(item),
    "/login": login,
    "/logout": logout,
    "/renew": lambda session, _: session.renew(),
    "/who": lambda session, _: session.user_id,
    "/set": lambda session, pairs: session.update(parse_qsl(pairs)),
    "/drop": lambda session, key: session.pop(key),
    "/keys": lambda session, _: dict(session),
    "/fail": fail,
    "/raise": raise_it,
    "/plain": lambda session, _: "plain",
    "/sensitive": lambda session, _: session.require_fresh(600),
}


def act(session: RequestSession, path: str, query: str) -> tuple[int, Any]:
    """Do what a path says; return the status and the answer."""
    stem, _, status = path.rpartition("/")
    if status.isdigit():
        return int(status), ACTS[stem](session, query)
    return (200, ACTS[path](session, query)) if path in ACTS else (404, None)


def looks(path: str) -> bool:
    return path != "/plain"


def wsgi_app(
    before: Callable[[str], None] = lambda path: None,
) -> Callable[[dict[str, Any], Any], Iterator[bytes] | list[bytes]]:
    """Serve the shop; call `before` with the path when the session is changed and not yet written."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes] | list[bytes]:
        session, path = environ.get("stillroom.session"), environ["PATH_INFO"]
        status, said = act(session, path, environ["QUERY_STRING"])
        before(path)
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else json.dumps(said).encode()
        start_response(f"{status} Said", [("Content-Type", "application/json")])
        return [body]

    return app


def asgi_app(before: Callable[[str], None] = lambda path: None) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        session, path = scope.get("stillroom.session"), scope["path"]
        if looks(path):
            await session.load()
        status, said = act(session, path, scope["query_string"].decode())
        await asyncio.to_thread(before, path)
        body = b"" if scope["method"] == "HEAD" else json.dumps(said).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
