"""One small app with limits on its endpoints, in each framework, for the tests that hold for all of them.

`/guess?right=1` (POST) is AUTH, failures only; `/form?right=1` (POST) redirects who is right, and answers 200 to
who is not; `/tiers` has limits by the header X-Tier; `/cost?n=3` costs 3 of 10; `/mine` counts by user, `/keyed` by
the header X-API-Key, `/tenant` by a function; `/login?who`; `/shared/a` and `/shared/b` share a limit; `/both` has
two; `/sync/7` and `/async`; `/class` and `/method` of a class; `/group/x` is limited by its group, `/group/own` by
its own too, `/group/free` is exempt, `/group/freed` and `/group/class` are but for their own; `/probed` is exempt
for who sends X-Probe; `/open` has none; `/touch` looks at its session, `/page` too, and reads five values near;
`/stream` has one place at a time, and sends the second piece when GATE opens; `/sized` has one too, says its
length, and ends when GATE opens; `/fails` has one too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.web import Answered
from tests.support.crowd import PATIENT
from tests.support.web import serving_asgi, serving_wsgi

FRAMEWORKS = ["fastapi", "starlette", "flask", "django", "django-asgi"]

TWO = Limit("two", 2, 60)
FREE, GOLD = Limit("free", 1, 60), Limit("gold", 3, 60)
TEN = Limit("ten", 10, 60)
MINE = Limit("mine", 2, 60)
SHARED = Limit("shared", 2, 60)
GROUP = Limit("group", 2, 60)
ONE = Limit("one", 1, 60)
PLACE = Limit("place", 1, 600, in_flight=True)
ORIGIN = "https://spa.example"
GATE = threading.Event()  # in the same process as the app


def near_loader(room: Any) -> Any:
    """Register a loader of values that the process keeps."""

    @room.cache.cached("price:{id}", ttl=600, near=True)
    def price(id: int) -> int:
        return id

    return price


def wrong_form(answer: Answered) -> bool:
    """A wrong form is shown again, with 200."""
    return answer.status != 302


def tier(request: Any) -> Limit:
    return GOLD if request.headers.get("X-Tier") == "gold" else FREE


def tenant_of(request: Any) -> str | None:
    found: str | None = request.headers.get("X-Tenant")
    return found


def is_probe(request: Any) -> bool:
    return bool(request.headers.get("X-Probe"))


@contextmanager
def serving(framework: str, settings: Settings, **options: Any) -> Iterator[int]:
    """Serve the app on real HTTP and yield the port.

    `options` are those of the middleware or extension with the limits.
    """
    if framework == "flask":
        from tests.web.limited_flask import make_app

        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with serving_wsgi(make_app(room, **options)) as port:
                yield port
    elif framework.startswith("django"):
        with serving_django(framework, settings, options) as port:
            yield port
    else:
        from tests.web.limited_starlette import MAKERS

        room = AsyncStillroom(settings, dispatch=NoDispatch())
        with serving_asgi(lambda room: MAKERS[framework](room, **options), room) as port:
            yield port


@contextmanager
def serving_django(framework: str, settings: Settings, options: dict[str, Any]) -> Iterator[int]:
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler
    from django.test import override_settings

    import tests.web.test_django  # noqa: F401 - configures Django, once for all tests
    from stillroom.web.django import room as room_of_django
    from tests.web import limited_django

    given = PATIENT | {"redis_url": settings.redis_url, "request_timeout": 30}
    networks = ("trusted_proxies", "limit_exempt", "abuse_allow")
    given |= {name: getattr(settings, name) for name in networks}
    limited_django.Limits.options = options
    middleware = [
        "tests.web.limited_django.cors",
        "stillroom.web.django.middleware.SessionMiddleware",
        "tests.web.limited_django.Limits",
    ]
    urls = "tests.web.limited_django"
    with override_settings(STILLROOM=given, MIDDLEWARE=middleware, ROOT_URLCONF=urls):
        own = room_of_django()
        try:
            if framework == "django":
                with serving_wsgi(WSGIHandler()) as port:
                    yield port
            else:
                other = AsyncStillroom(settings, dispatch=NoDispatch())
                with serving_asgi(lambda _: ASGIHandler(), other) as port:
                    yield port
        finally:
            own.close()
