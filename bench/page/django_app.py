"""The page in Django: alone, with the usual parts, with ours. The server is at REDIS_URL."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.urls import path

from bench.page import shop

urlpatterns: list[Any] = []
View = Callable[[HttpRequest], JsonResponse]


def bare() -> Any:
    def page(request: HttpRequest) -> JsonResponse:
        visit = shop.visit()
        products = [shop.product(n) for n in visit.products]
        return JsonResponse(shop.page("dark", products, shop.RATES))

    return _app(lambda: page)


def usual() -> Any:
    return _usual(in_batches=False)


def batched() -> Any:
    return _usual(in_batches=True)


def _usual(in_batches: bool) -> Any:
    """Return an app with django-redis, sessions in it, and django-ratelimit: a fixed window, no headers."""
    backend = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": os.environ["REDIS_URL"]}
    return _app(
        lambda: _usual_view(in_batches),
        CACHES={"default": backend},
        SESSION_ENGINE="django.contrib.sessions.backends.cache",
        MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    )


def _usual_view(in_batches: bool) -> View:
    from django.core.cache import cache
    from django_ratelimit.decorators import ratelimit

    def product(id: int) -> shop.Product:
        return cache.get_or_set(f"product:{id}", lambda: shop.load_product(id), shop.TTL)

    def rates() -> Any:
        return cache.get_or_set("rates", shop.load_rates, shop.RATES_TTL)

    def one_by_one(ids: list[int]) -> Any:
        return [product(one) for one in ids], rates()

    def in_a_batch(ids: list[int]) -> Any:
        found = cache.get_many([*(f"product:{one}" for one in ids), "rates"])
        products = [found.get(f"product:{one}") or product(one) for one in ids]
        return products, found.get("rates") or rates()

    read = in_a_batch if in_batches else one_by_one

    @ratelimit(key="ip", rate=f"{shop.ALLOWED}/m")
    def page(request: HttpRequest) -> JsonResponse:
        visit = shop.visit()
        if visit.changed is not None:
            cache.delete(f"product:{visit.changed}")
        return JsonResponse(shop.page(request.session["theme"], *read(visit.products)))

    return page


def ours() -> Any:
    return _ours()


def gathered() -> Any:
    return _ours(gathered=True)


def near() -> Any:
    return _ours(near=True)


def _ours(**how: bool) -> Any:
    return _app(
        lambda: _our_view(**how),
        SESSION_ENGINE="stillroom.web.django.sessions",
        SESSION_COOKIE_NAME="__Host-sid",
        SESSION_COOKIE_SECURE=True,
        MIDDLEWARE=[
            "stillroom.web.django.middleware.SessionMiddleware",
            "stillroom.web.django.limits.LimitsMiddleware",
        ],
    )


def _our_view(**how: bool) -> View:
    from bench.page.ours import LIMIT, reads
    from stillroom.web.django import room
    from stillroom.web.django.limits import limited

    cache, read = room().cache, reads(room(), **how)

    @limited(LIMIT)
    def page(request: HttpRequest) -> JsonResponse:
        visit = shop.visit()
        if visit.changed is not None:
            cache.invalidate(f"product:{visit.changed}")
        return JsonResponse(shop.page(request.session["theme"], *read(visit.products)))

    return page


def _login(request: HttpRequest) -> JsonResponse:
    request.session.update(shop.SESSION)
    return JsonResponse({})


def _app(view: Callable[[], View], **changes: Any) -> Any:
    options = {"ROOT_URLCONF": __name__, "ALLOWED_HOSTS": ["*"], "SECRET_KEY": "x" * 50}
    settings.configure(**options | changes)
    django.setup()
    from django.core.handlers.wsgi import WSGIHandler

    urlpatterns.extend([path("login", _login), path("", view())])
    return WSGIHandler()
