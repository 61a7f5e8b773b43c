"""`X-Stillroom-Explain`: a response says of each read of the cache what it was, and why. For operators.

The setting `explain_header` turns it on. Then a request is told that brings the health token in a header of the
same name, or, outside of production, any request to an app in debug mode:

    $ curl -sI https://shop.example/ -H "X-Stillroom-Explain: $STILLROOM_HEALTH_TOKEN"
    X-Stillroom-Explain: "product:7";miss;why=tag;by="products";loader="product", "user:3";hit;why=fresh

The value is a list of structured fields (RFC 9651). The middlewares, Flask's extension and Django's do it by
themselves; `ExplainWSGI` and `ExplainASGI` do it around an app that has none of them.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from stillroom.cache.traced import Read, Trace, traced, tracing
from stillroom.misuse import explained
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.settings import Settings
from stillroom.web.asgi_types import Message, Receive, Scope, Send
from stillroom.web.carriers import is_django, layers
from stillroom.web.headers import Header, decoded, encoded, private
from stillroom.web.placing import app_and_room
from stillroom.web.visit import RENDERING

NAME = "X-Stillroom-Explain"
LONGEST = 4_096  # bytes of the header; a proxy may take no more than 8 KiB of all headers
TEXT_LENGTH = 120  # characters of a key or a tag
NOTHING = "nothing"  # was read before the response began
# All that is printed in ASCII, but what has a meaning in a quoted string, and the sign of the escape itself.
_SAFE = "".join(chr(n) for n in range(0x20, 0x7F) if chr(n) not in '"\\%')


class Explainer:
    """Decides which requests are told, and writes the header."""

    def __init__(self, settings: Settings) -> None:
        token = settings.health_token
        self._token = token.get_secret_value().encode() if token else None
        self._may_debug = not settings.production

    def wants(self, given: str | None, is_debug: Callable[[], bool]) -> bool:
        """Return whether to tell a request. `given`: its header of this name."""
        if tracing() is not None:  # a middleware further out does it
            return False
        # The server reads a header as Latin-1, whatever it was written in.
        token, shown = self._token, (given or "").strip().encode("latin-1", "replace")
        return bool(token and hmac.compare_digest(shown, token)) or (self._may_debug and is_debug())

    @contextmanager
    def telling(
        self,
    ) -> Iterator[Callable[[Iterable[Header]], tuple[list[Header], frozenset[str]]]]:
        """Trace the request inside. What is yielded returns the headers to add to an answer, and those to drop."""
        with traced() as trace:

            def told(headers: Iterable[Header]) -> tuple[list[Header], frozenset[str]]:
                more, without = private(headers)  # nobody else is to get it from a cache
                return [*more, (NAME, written(trace))], without

            yield told


def explainer_of(room: Stillroom | AsyncStillroom) -> Explainer | None:
    """Return what tells a room's requests, if that is on."""
    return Explainer(room.settings) if room.settings.explain_header else None


def written(trace: Trace) -> str:
    """Return the reads as a header's value: the first of them, and how many there was no room for."""
    items: list[str] = []
    left_out, length = trace.left_out, 0
    for read in trace.reads:
        item = _item(read)
        length += len(item) + 2
        if length > LONGEST - len(', others;n="1000000"'):
            left_out += len(trace.reads) - len(items)
            break
        items.append(item)
    if left_out:
        items.append(f"others;n={left_out}")
    return ", ".join(items) or NOTHING


def _item(read: Read) -> str:
    """Return one read.

    >>> _item(Read("product:7", "miss", "tag", "products", "product"))
    '"product:7";miss;why=tag;by="products";loader="product"'
    """
    item = f"{_quoted(read.key)};{read.outcome};why={_word(read.cause)}"
    item += f";by={_quoted(read.by)}" if read.by else ""
    return item + (f";loader={_quoted(read.loader)}" if read.loader else "")


def _quoted(text: str) -> str:
    r"""Return a text as a string of RFC 9651. What is no printable ASCII is percent-encoded.

    >>> print(_quoted('a"b\n'), _quoted("ü%"))
    "a%22b%0A" "%C3%BC%25"
    """
    escaped = quote(text[:TEXT_LENGTH], safe=_SAFE, errors="replace")
    cut = "..." if len(text) > TEXT_LENGTH else ""
    return f'"{escaped}{cut}"'


def _word(cause: str) -> str:
    """Return a word that is a token of RFC 9651: those of the wire may hold anything."""
    return cause if cause.isascii() and cause.replace("-", "").isalpha() else _quoted(cause)


def is_debugging(app: object) -> bool:
    """Return whether an app of Flask, Starlette or FastAPI, or Django as a whole, is in debug mode."""
    with suppress(Exception):  # an app that raises when it is looked at is in none that is known
        for layer in layers(app):
            if is_django(layer):
                from django.conf import settings

                return bool(settings.DEBUG)
            if getattr(layer, "debug", False) is True:
                return True
    return False


@explained
class ExplainWSGI:
    """Adds `X-Stillroom-Explain` to the responses of a WSGI app: `app = ExplainWSGI(app, room)`.

    The setting `explain_header` turns it on. The other middlewares of Stillroom do this by themselves.
    """

    def __init__(self, *given: Any, app: Any = None, room: Stillroom | None = None) -> None:
        self.app, room = app_and_room(given, app, room, Stillroom, "ExplainWSGI", needs_app=True)
        self._explainer = explainer_of(room)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        explainer = self._explainer
        if explainer is None or RENDERING in environ:
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        given = environ.get(f"HTTP_{NAME.upper().replace('-', '_')}")
        if not explainer.wants(given, lambda: is_debugging(self.app)):
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        with explainer.telling() as told:

            def start(status: str, headers: list[Header], *more: Any) -> Any:
                added, without = told(headers)
                kept = [one for one in headers if one[0].lower() not in without]
                return start_response(status, [*kept, *added], *more)

            return self.app(environ, start)  # type: ignore[no-any-return]


@explained
class ExplainASGI:
    """Adds `X-Stillroom-Explain` to the responses of an ASGI app: `app.add_middleware(ExplainASGI, room=room)`.

    See ExplainWSGI.
    """

    def __init__(self, *given: Any, app: Any = None, room: AsyncStillroom | None = None) -> None:
        self.app, room = app_and_room(
            given, app, room, AsyncStillroom, "ExplainASGI", needs_app=True
        )
        self._explainer = explainer_of(room)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        explainer = self._explainer
        if explainer is None or scope["type"] != "http" or RENDERING in scope:
            await self.app(scope, receive, send)
            return
        wanted = NAME.lower().encode()
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), None)
        apps = (scope.get("app"), self.app)
        if not explainer.wants(given, lambda: any(map(is_debugging, apps))):
            await self.app(scope, receive, send)
            return
        with explainer.telling() as told:

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    raw = list(message.get("headers", ()))
                    added, without = told(decoded(raw))
                    kept = [one for one in raw if one[0].decode("latin-1").lower() not in without]
                    message = {**message, "headers": [*kept, *encoded(added)]}
                await send(message)

            await self.app(scope, receive, sending)
