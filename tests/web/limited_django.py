"""The app of limited_apps.py, in Django."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

from django.contrib.auth import SESSION_KEY
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View

from stillroom import API, AUTH
from stillroom.web import Header, Refusal
from stillroom.web.django import room
from stillroom.web.django.limits import LimitsMiddleware, exempt, limited
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


class Limits(LimitsMiddleware):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, get_response: Callable[..., Any]) -> None:
        self.default = self.options.get("default", ())
        super().__init__(get_response)

    def exempt_when(self, request: HttpRequest) -> bool:
        return bool("exempt_when" in self.options and self.options["exempt_when"](request))

    def render(self, refusal: Refusal) -> tuple[str, str | bytes] | None:
        return self.options["render"](refusal) if "render" in self.options else None


def cors(get_response: Callable[..., Any]) -> Callable[..., Any]:
    """Answer preflights and add headers as django-cors-headers does."""

    def answer(request: HttpRequest) -> HttpResponse:
        is_preflight = (
            request.method == "OPTIONS" and "access-control-request-method" in request.headers
        )
        response: HttpResponse = HttpResponse() if is_preflight else get_response(request)
        response["Access-Control-Allow-Origin"] = ORIGIN
        return response

    return answer


@limited(AUTH, count="failures")
def guess(request: HttpRequest) -> HttpResponse:
    right = request.GET.get("right") == "1"
    return HttpResponse("right" if right else "wrong", status=200 if right else 401)


@limited(AUTH, count=wrong_form)
def form(request: HttpRequest) -> HttpResponse:
    right = request.GET.get("right") == "1"
    return HttpResponseRedirect("/open") if right else HttpResponse("wrong")


@limited(TWO)
def sync(request: HttpRequest, number: int) -> HttpResponse:
    return HttpResponse(str(number))


@limited(TWO)
async def asynchronous(request: HttpRequest) -> HttpResponse:
    return HttpResponse("7")


@method_decorator(limited(TWO), name="dispatch")
class Whole(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("get")

    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("post")


@method_decorator(limited(TWO), name="dispatch")
class AsyncWhole(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("get")


class Parts(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("get")

    @method_decorator(limited(TWO))
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("post")


@exempt
class FreedParts(Parts): ...


def login(request: HttpRequest) -> HttpResponse:
    request.session.cycle_key()
    request.session[SESSION_KEY] = request.GET["who"]
    return HttpResponse("in")


@limited(TEN)
def touch(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.get(SESSION_KEY)))


@limited(TEN)
def page(request: HttpRequest) -> HttpResponse:
    price = near_loader(room())
    total = sum(price(n) for n in range(5))
    return HttpResponse(f"{request.session.get(SESSION_KEY)} {total}")


def pieces() -> Iterator[bytes]:
    yield b"first"
    GATE.wait(10)
    yield b"second"


def lingering() -> Iterator[bytes]:
    yield b"all"
    GATE.wait(10)


@limited(PLACE)
def sized(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(lingering(), headers={"Content-Length": "3"})


@limited(PLACE)
def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(pieces())


async def async_pieces() -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.to_thread(GATE.wait, 10)
    yield b"second"


async def async_lingering() -> AsyncIterator[bytes]:
    yield b"all"
    await asyncio.to_thread(GATE.wait, 10)


@limited(PLACE)
async def async_sized(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(async_lingering(), headers={"Content-Length": "3"})


@limited(PLACE)
async def async_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(async_pieces())


@limited(PLACE)
def fails(request: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


def says(word: str) -> Any:
    return lambda request: HttpResponse(word)


def cost_of(request: HttpRequest) -> int:
    return int(request.GET["n"])


group = [
    path("x", says("x")),
    path("own", limited(ONE)(says("own"))),
    path("free", exempt(says("free"))),
    path("freed", exempt(limited(ONE)(says("freed")))),
    path("class", FreedParts.as_view()),
]
urlpatterns = [
    path("guess", guess),
    path("form", form),
    path("tiers", limited(tier)(says("tiers"))),
    path("cost", limited(TEN, cost=cost_of)(says("cost"))),
    path("mine", limited(MINE, by="user")(says("mine"))),
    path("keyed", limited(MINE, by=Header("X-API-Key"))(says("keyed"))),
    path("tenant", limited(MINE, by=tenant_of)(says("tenant"))),
    path("shared/a", limited(SHARED)(says("a"))),
    limited([SHARED])(path("shared/b", says("b"))),
    path("probed", limited(ONE, exempt_when=is_probe)(says("probed"))),
    path("both", limited(API, by="user")(limited(TWO)(says("both")))),
    path("sync/<int:number>", sync),
    path("async", asynchronous),
    path("class", Whole.as_view()),
    path("async-class", AsyncWhole.as_view()),
    path("method", Parts.as_view()),
    path("login", login),
    path("touch", touch),
    path("page", page),
    path("open", says("open")),
    path("stream", stream),
    path("async-stream", async_stream),
    path("sized", sized),
    path("async-sized", async_sized),
    path("fails", fails),
    path("group/", limited(GROUP)(include(group))),
]
