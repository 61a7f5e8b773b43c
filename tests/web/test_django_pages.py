"""Django caches views, fragments and values with tags."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.messages import INFO, get_messages
from django.contrib.messages.storage.base import Message
from django.contrib.messages.storage.cookie import CookieStorage
from django.core.cache import caches
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.template import Context, Template, TemplateSyntaxError
from django.template.response import SimpleTemplateResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from django.utils import translation
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.clickjacking import xframe_options_exempt, xframe_options_sameorigin
from django.views.decorators.http import etag

import redis
from stillroom import InvalidArgument, InvalidKey, SettingsError, Stillroom
from stillroom.cache.failures import Failures
from stillroom.embedded import EmbeddedServer
from stillroom.testing import Clock
from stillroom.web.django import room as room_of_django
from stillroom.web.django.pages import cache_page, tag_page
from stillroom.web.django.views import fresh
from tests.support.crowd import PATIENT
from tests.support.django_project import configure
from tests.support.held import Held
from tests.support.threads import at_once
from tests.support.web import WITHIN, Reply, ask, serving_wsgi

configure()

PRODUCT = "/products/7"
BROKEN = -1  # a price at which the view answers with 503
calls: list[str] = []
held = Held()
price = 1


@cache_page(60, swr=600, tags=["products", "product:{id}"], query=["sort"], cdn="Surrogate-Key")
def product(request: HttpRequest, id: int) -> HttpResponse:
    calls.append("product")
    tag_page(f"price:{price}")
    status = 503 if price == BROKEN else 200
    return JsonResponse({"id": id, "price": price, "sort": request.GET.get("sort")}, status=status)


@cache_page(60, vary=["Accept-Language"], max_age=30)
def greeting(request: HttpRequest) -> HttpResponse:
    calls.append("greeting")
    text = f"{translation.get_language()} {request.headers.get('accept-language')}"
    return HttpResponse(text, headers={"Vary": "Accept-Language"})


@cache_page(60, sessions=True)
def about(request: HttpRequest, look: str = "") -> HttpResponse:
    calls.append("about")
    if look:
        request.session.get("x")
    return HttpResponse("us")


@cache_page(60, sessions=True)
def flashes(request: HttpRequest) -> HttpResponse:
    # As the middleware of django.contrib.messages does; its messages are in a cookie, and not in the session.
    setattr(request, "_messages", CookieStorage(request))  # noqa: B010 - mypy knows no such attribute
    return HttpResponse(" ".join(["us", *map(str, get_messages(request))]))


@cache_page(60)
def kept(request: HttpRequest, how: str) -> Any:
    calls.append(how)
    match how:
        case "session":
            request.session["x"] = 1
        case "csrf":
            return HttpResponse(get_token(request))
        case "cookie":
            response = HttpResponse("x")
            response.set_cookie("a", "b")
            return response
        case "private":
            return HttpResponse("x", headers={"Cache-Control": "private"})
        case "stream":
            return StreamingHttpResponse(iter([b"a", b"b"]))
        case "error":
            return HttpResponse("x", status=503)
        case "compressed":
            return HttpResponse(b"x", headers={"Content-Encoding": "gzip"})
        case "origin":
            return HttpResponse("x", headers={"Vary": "Origin"})
    return HttpResponse("x")


@cache_page(60)
def secured(request: HttpRequest, how: str) -> Any:
    calls.append(how)
    if how == "framed":
        return xframe_options_exempt(lambda _: HttpResponse("x"))(request)
    if how == "nonce":
        # As the middleware of Django 6, and django-csp's, note that a view used one.
        setattr(request, "_csp_nonce", "n0")  # noqa: B010 - mypy knows no such attribute
        return HttpResponse("x")
    return HttpResponse("x", headers={"Content-Security-Policy": "script-src 'nonce-n0'"})


@cache_page(60)
def held_up(request: HttpRequest, status: int) -> HttpResponse:
    """Stand still for the first visitor, whose response nobody may be given."""
    calls.append("held up")
    if len(calls) == 1:
        held.load()
    return HttpResponse("x", status=status, headers={"Cache-Control": "private"})


class RestRequest:
    """A request as REST framework hands it to a method of a class: around Django's, with its view."""

    def __init__(self, request: HttpRequest, view: Any) -> None:
        self._request = request
        self.parser_context = {"view": view}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class RestResponse(SimpleTemplateResponse):
    """A response as REST framework's: it can't be rendered before its view has chosen how."""

    renderer: Any = None

    def __init__(self, data: Any) -> None:
        super().__init__(None)
        self.data = data

    @property
    def rendered_content(self) -> str:
        assert self.renderer, ".accepted_renderer not set on Response"
        self["Content-Type"] = "application/json"
        text: str = self.renderer(self.data)
        return text


class RestView(View):
    """A class of views in the manner of REST framework, of which methods are cached."""

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.headers = {"Vary": "Accept", "Allow": "GET"}
        own = RestRequest(request, self)
        response = getattr(self, request.method.lower())(own, *args, **kwargs)
        return self.finalize_response(own, response, *args, **kwargs)

    def finalize_response(self, request: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(response, RestResponse):
            response.renderer = json.dumps
        for name, value in self.headers.items():
            response[name] = value
        return response

    @method_decorator(cache_page(60, tags=["product:{id}"], vary=["Accept"]))
    def get(self, request: Any, id: int) -> Any:
        calls.append("rest")
        return RestResponse({"id": id, "price": price})


class RestListView(RestView):
    @method_decorator(cache_page(60))
    def get(self, request: Any) -> Any:
        calls.append("list")
        return RestResponse([price])


@cache_page(60, tags=["products"])
async def slow(request: HttpRequest) -> HttpResponse:
    calls.append("slow")
    await asyncio.sleep(0)
    return JsonResponse({"price": price})


@cache_page(60)
def bodied(request: HttpRequest) -> HttpResponse:
    calls.append("bodied")
    return HttpResponse(b"body: " + request.body)


@cache_page(60, swr=600)
@etag(lambda request: "v1")
def tagged(request: HttpRequest) -> HttpResponse:
    calls.append("tagged")
    is_html = "json" not in request.headers.get("Accept", "")
    return HttpResponse("x", status=200 if is_html else 406)


def known_by_key(view: Any) -> Any:
    """Return the view behind what tells a visitor by a header of its own, as API keys do."""

    def named(request: Any, *given: Any) -> Any:
        key = request.headers.get("X-Key", "")
        request.user = SimpleNamespace(is_authenticated=bool(key), name=key)
        return view(request, *given)

    return named


def mine(request: Any) -> HttpResponse:
    calls.append("mine")
    return HttpResponse(f"of {request.user.name}")


def told(request: Any) -> HttpResponse:
    calls.append("links")
    return JsonResponse(
        [request.get_full_path(), request.GET.dict(), request.GET.urlencode()], safe=False
    )


class Links(RestView):
    @method_decorator(cache_page(60, query=["sort"], vary=["Accept"]))
    def get(self, request: Any) -> Any:
        return told(request)


@cache_page(60, query=["sort"])
async def links_async(request: HttpRequest) -> HttpResponse:
    return told(request)


def outside(view: Any) -> Any:
    """Return the view, with a header of what a middleware further out sees of the query before and afterwards."""

    def seen(request: HttpRequest, looks: str) -> Any:
        before = request.GET.dict() if looks == "before" else {}
        response = view(request)
        response["X-Seen"] = json.dumps([before, request.GET.dict(), request.get_full_path()])
        return response

    return seen


class Prices(View):
    """A class whose handlers are awaited."""

    async def get(self, request: HttpRequest) -> HttpResponse:
        calls.append("prices")
        return JsonResponse({"price": price})


@method_decorator(cache_page(60), name="dispatch")
class CachedPrices(Prices):
    pass


@method_decorator(fresh(60), name="dispatch")
class FreshPrices(Prices):
    pass


class Feed:
    """An object that is a view, as a Feed of Django's is."""

    def __call__(self, request: HttpRequest, id: int) -> HttpResponse:
        calls.append("feed")
        return HttpResponse(f"{id} {len(calls)}")


def listed(request: HttpRequest, id: int, size: int) -> HttpResponse:
    calls.append("listed")
    return HttpResponse(f"{id} {size} {len(calls)}")


of_objects = cache_page(60, tags=["feeds", "feed:{id}"])

urlpatterns = [
    path("feeds/object/<int:id>", of_objects(Feed())),
    path("feeds/partial/<int:id>", of_objects(partial(listed, size=10))),
    path("feeds/decorated/<int:id>", of_objects(xframe_options_sameorigin(Feed()))),
    path("prices/around", cache_page(60)(Prices.as_view())),
    path("prices/dispatch", CachedPrices.as_view()),
    path("prices/fresh", FreshPrices.as_view()),
    path("prices/fresh/around", fresh(60)(Prices.as_view())),
    path("products/<int:id>", product),
    path("greeting", greeting),
    path("about", about),
    path("about/<look>", about),
    path("flashes", flashes),
    path("kept/<how>", kept),
    path("secured/<how>", secured),
    path("held/<int:status>", held_up),
    path("rest", RestListView.as_view()),
    path("rest/<int:id>", RestView.as_view()),
    path("slow", slow),
    path("bodied", bodied),
    path("tagged", tagged),
    path("mine", known_by_key(cache_page(60, vary=["Accept", "HX-Request"])(mine))),
    path("mine/by/key", known_by_key(cache_page(60, vary=["X-Key"])(mine))),
    path("links/<looks>", outside(cache_page(60, query=["sort"])(told))),
    path("links/of/rest", Links.as_view()),
    path("links/of/async", links_async),
]


@pytest.fixture(autouse=True)
def room(server: EmbeddedServer) -> Iterator[Stillroom]:
    """Return the room that Django uses, and views that nobody has called."""
    global price, held
    calls.clear()
    price, held = 1, Held()
    given = PATIENT | {"redis_url": server.url, "namespace": "pages", "request_timeout": 30}
    with override_settings(STILLROOM=given, ROOT_URLCONF=__name__):
        room = room_of_django()
        yield room
        room.close()


@pytest.fixture
def port(room: Stillroom) -> Iterator[int]:
    with serving_wsgi(WSGIHandler()) as port:
        yield port


def priced(reply: Reply) -> int:
    found: int = json.loads(reply.text)["price"]
    return found


# Views


def test_a_page_is_rendered_once_until_a_tag_kills_it(port: int, room: Stillroom) -> None:
    """A page is rendered once until one of its tags is invalidated, and a CDN is told the tags."""
    global price
    first, second = ask(port, PRODUCT), ask(port, PRODUCT)
    assert calls == ["product"]
    assert first.body == second.body
    assert first.one("cache-status") == "stillroom; fwd=miss; stored"
    assert second.one("cache-status") == "stillroom; hit"
    assert second.one("surrogate-key") == "products product:7 price:1"
    for tag in ("products", "product:7", f"price:{price}"):
        room.cache.invalidate_by_tag("product:8")
        assert priced(ask(port, PRODUCT)) == price
        price += 1
        room.cache.invalidate_by_tag(tag if tag != "price:1" else f"price:{price - 1}")
        assert priced(ask(port, PRODUCT)) == price


@pytest.mark.parametrize("kind", ["object", "partial", "decorated"])
def test_a_view_may_be_an_object(port: int, room: Stillroom, kind: str) -> None:
    """An object that is a view, such as a Feed of Django's, and a partial are cached as functions are."""
    where = f"/feeds/{kind}/7"
    first = ask(port, where)
    assert (first.status, ask(port, where).body) == (200, first.body)
    assert ask(port, f"/feeds/{kind}/8").body != first.body
    room.cache.invalidate_by_tag("feed:7")
    assert ask(port, where).body != first.body
    with pytest.raises(InvalidKey, match=r"{ids} is no parameter of priced"):
        cache_page(60, tags=["feed:{ids}"])(partial(priced))


def test_a_view_may_say_less_to_head(port: int) -> None:
    """A view may answer HEAD differently, so no page is made of it. An existing page answers HEAD too."""
    assert ask(port, PRODUCT, "HEAD").one("cache-status") == "stillroom; fwd=bypass"
    assert ask(port, PRODUCT).one("cache-status") == "stillroom; fwd=miss; stored"
    assert ask(port, PRODUCT, "HEAD").one("cache-status") == "stillroom; hit"


def test_a_client_that_has_it_hears_304(port: int) -> None:
    """A client that has the page is answered 304 by its ETag."""
    etag = ask(port, PRODUCT).one("etag") or ""
    reply = ask(port, PRODUCT, headers={"If-None-Match": etag})
    assert (reply.status, reply.body, reply.one("content-type")) == (304, b"", None)
    assert ask(port, PRODUCT, "HEAD").body == b""
    assert calls == ["product"]


@pytest.mark.parametrize(
    "headers", [{"Cookie": "sessionid=1"}, {"Cookie": "x=1"}, {"Authorization": "Bearer x"}]
)
def test_requests_with_a_session_go_past_the_cache(port: int, headers: dict[str, str]) -> None:
    """A request with a session gets its own page, which no cache on the way may give to others."""
    global price
    ask(port, PRODUCT)
    price = 2
    reply = ask(port, PRODUCT, headers=headers)
    assert priced(reply) == 2
    assert reply.one("cache-control") == "private"
    assert reply.one("vary") == "Cookie, Authorization"
    assert priced(ask(port, PRODUCT)) == 1


@pytest.mark.parametrize("looks", ["before", "after"])
def test_a_page_shows_nobody_what_another_one_wrote_into_its_address(port: int, looks: str) -> None:
    """A view sees the query that all visitors of its page share, and what is around it sees the visitor's own."""
    address = f"/links/{looks}"
    first = ask(port, f"{address}?utm_source=%22evil&%73ort=a&fbclid=1")
    own = {"utm_source": '"evil', "sort": "a", "fbclid": "1"}
    before, after, full = json.loads(first.one("x-seen") or "")
    assert before == (own if looks == "before" else {})
    assert (after, full) == (own, f"{address}?utm_source=%22evil&%73ort=a&fbclid=1")
    shared = [f"{address}?sort=a", {"sort": "a"}, "sort=a"]
    for reply in (first, ask(port, f"{address}?sort=a"), ask(port, f"{address}?sort=a&gclid=2")):
        assert json.loads(reply.body) == shared
    assert json.loads(ask(port, f"{address}?utm_source=x").body) == [address, {}, ""]
    # This one is no shared page: its view sees all of it.
    assert json.loads(ask(port, f"{address}?utm_source=x&own=1").body)[1] == {
        "utm_source": "x",
        "own": "1",
    }
    assert calls == ["links"] * 3


@pytest.mark.parametrize("how", ["rest", "async"])
def test_no_kind_of_view_sees_what_its_page_ignores(port: int, how: str) -> None:
    """A method of REST framework's classes and an async view see the shared query, too."""
    for query in ("?utm_source=evil&sort=a", "?sort=a"):
        told = json.loads(ask(port, f"/links/of/{how}{query}").body)
        assert told == [f"/links/of/{how}?sort=a", {"sort": "a"}, "sort=a"]
    assert calls == ["links"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_made_of_a_body_is_kept_for_nobody(port: int, method: str) -> None:
    """A request with a body gets its own answer: a view may have read it, and it is not in the page's key."""
    ask(port, "/bodied", method, body=b"evil")
    assert ask(port, "/bodied").body == b"body: "
    assert ask(port, "/bodied", body=b"own").body == b"body: own"
    assert ask(port, "/bodied", body=b"x" * 3_000_000).status == 400, "the view reads it"
    assert ask(port, "/bodied").body == b"body: "
    assert calls == ["bodied"] * 4


@pytest.mark.parametrize(
    ("header", "status"), [({"If-None-Match": '"v1"'}, 304), ({"Accept": "x/json"}, 406)]
)
def test_who_asks_oddly_keeps_nobody_s_page_out_of_the_cache(
    port: int, room: Stillroom, header: dict[str, str], status: int
) -> None:
    """An answer to one request's headers is not kept, and says nothing of the page: the next one is. Health is not
    told of a failed load."""
    assert ask(port, "/tagged", headers=header).status == status
    before = len(calls)
    assert [ask(port, "/tagged").status for _ in range(3)] == [200] * 3
    assert len(calls) == before + 1
    assert room.stats.counts["load_errors"] == 0


@pytest.mark.parametrize("header", [{"If-None-Match": '"v1"'}, {"Accept": "x/json"}])
def test_who_asks_oddly_for_a_stale_page_keeps_nobody_from_rendering_it(
    port: int, room: Stillroom, caplog: pytest.LogCaptureFixture, header: dict[str, str]
) -> None:
    """A stale page is rendered by the next reader, however many have asked oddly: no backoff grows, and nothing is
    said to have failed."""
    ask(port, "/tagged")
    Clock(room).advance(61)
    for _ in range(4):
        ask(port, "/tagged", headers=header)
        Clock(room).advance(10)
    ask(port, "/tagged", headers=header)
    before = len(calls)
    Clock(room).advance(2)  # a process tries once a second
    assert [ask(port, "/tagged").status for _ in range(3)] == [200] * 3
    assert len(calls) == before + 1
    assert "a refresh failed" not in caplog.text


def test_a_page_of_who_is_known_by_a_header_is_nobody_else_s(port: int) -> None:
    """A page that was made for a user whom neither cookie nor Authorization names is not given to another one."""
    for key in ("ann", "", "bob", ""):
        reply = ask(port, "/mine", headers={"X-Key": key} if key else {})
        assert reply.text == f"of {key}"
        assert (reply.one("cache-control") == "private") == bool(key)
    assert calls == ["mine"] * 3
    for key in ("ann", "bob", "ann"):
        assert ask(port, "/mine/by/key", headers={"X-Key": key}).text == f"of {key}"
    assert calls == ["mine"] * 5


def test_language_and_named_headers_tell_pages_apart(port: int) -> None:
    """Language and named headers tell pages apart as in Django's own cache_page."""
    client = Client()
    said = []
    for language in ("de", "fr", "de"):
        with translation.override(language):
            said.append(client.get("/greeting", headers={"Accept-Language": "x"}).content)
    assert said == [b"de x", b"fr x", b"de x"]
    assert calls == ["greeting", "greeting"]
    reply = ask(port, "/greeting", headers={"Accept-Language": "x"})
    assert reply.one("cache-control") == "public, max-age=30"


def test_a_page_that_is_the_same_for_all_may_not_look_at_the_session(port: int) -> None:
    """A page for everybody is given to sessions too, and is not kept when its view read the session."""
    for _ in range(2):
        assert ask(port, "/about", headers={"Cookie": "sessionid=1"}).text == "us"
        assert ask(port, "/about/look", headers={"Cookie": "sessionid=1"}).text == "us"
    assert calls == ["about"] * 3


def test_messages_to_one_visitor_are_in_nobody_elses_page(port: int) -> None:
    """A page for everybody that shows a visitor's messages, which Django keeps in a cookie, is not kept."""
    cookie = CookieStorage(HttpRequest())._encode([Message(INFO, "for ann")])
    assert ask(port, "/flashes", headers={"Cookie": f"messages={cookie}"}).text == "us for ann"
    assert ask(port, "/flashes").text == "us"


@pytest.mark.parametrize(
    "how", ["session", "csrf", "cookie", "private", "stream", "error", "compressed", "origin"]
)
def test_a_response_that_is_one_visitor_s_is_not_kept(port: int, how: str) -> None:
    """A response for one visitor is given to that visitor and not kept, and the view is called for each."""
    origin = {"Origin": "https://a.example"}
    replies = [ask(port, f"/kept/{how}", headers=origin) for _ in range(2)]
    assert calls == [how, how]
    assert all(reply.body for reply in replies)


@pytest.mark.parametrize("how", ["nonce", "policy", "framed"])
def test_a_response_whose_headers_are_one_visit_s_is_not_kept(port: int, how: str) -> None:
    """A page with a nonce, or with a mark by which a middleware chooses headers, is rendered for each visitor."""
    assert [ask(port, f"/secured/{how}").status for _ in range(2)] == [200] * 2
    assert calls == [how, how]


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize(("status", "called"), [(200, 2), (404, 2), (503, 1)])
def test_whoever_waits_for_a_page_that_is_not_kept_has_an_answer(
    port: int,
    room: Stillroom,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    called: int,
    same_process: bool,
) -> None:
    """A request that has waited for another's page in vain is answered by the view, or with the same error."""
    if not same_process:  # which remembers nothing of that load
        monkeypatch.setattr(Failures, "keep", lambda *_: None)
        called = 2
    watching = threading.Event()
    url, lease = str(room.settings.redis_url), room.operations.cache.keys.lease(b"page")
    with ThreadPoolExecutor(2) as threads, redis.Redis.from_url(url) as client:
        first = threads.submit(ask, port, f"/held/{status}")
        held.wait_until_called()
        threads.submit(held.let_go_when_waited_for, client, lease, watching)
        assert watching.wait(WITHIN)
        assert ask(port, f"/held/{status}").status == status
        assert first.result(WITHIN).status == status
    assert len(calls) == called


def test_a_page_that_is_not_kept_is_told_and_left_alone(
    port: int, room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """Why a page is not kept is logged, and for a while no request takes its lease."""
    assert [ask(port, "/kept/private").status for _ in range(3)] == [200] * 3
    assert "kept: it says Cache-Control: private" in caplog.text
    assert room.stats.counts["load_errors"] == 1


def test_a_method_of_a_rest_view_is_cached(port: int, room: Stillroom) -> None:
    """A method of REST framework's class of views is cached where its page names what it varies by."""
    global price
    first, second = ask(port, "/rest/7"), ask(port, "/rest/7")
    assert first.text == second.text == '{"id": 7, "price": 1}'
    assert first.one("vary") == second.one("vary") == "Accept"
    assert second.one("cache-status") == "stillroom; hit"
    price = 2
    room.cache.invalidate_by_tag("product:7")
    assert ask(port, "/rest/7").text == '{"id": 7, "price": 2}'
    assert calls == ["rest"] * 2


def test_a_method_of_a_rest_view_that_varies_is_not_kept(port: int) -> None:
    """A method of REST framework's class is answered, and not kept, where its page names no Accept."""
    assert [ask(port, "/rest").text for _ in range(2)] == ["[1]"] * 2
    assert calls == ["list"] * 2


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_page_that_varies_by_origin_is_for_requests_without_one(port: int, method: str) -> None:
    """A page that was kept for requests without an Origin is not given to one with it."""
    for _ in range(2):
        assert ask(port, "/kept/origin").text == "x"
    assert calls == ["origin"]
    told = ask(port, "/kept/origin", method, {"Origin": "https://a.example"})
    assert told.one("cache-status") == "stillroom; fwd=bypass"
    assert calls == ["origin"] * 2


def test_a_stale_page_is_served_while_one_reader_renders_it(port: int, room: Stillroom) -> None:
    """One reader renders a stale page and gets the new one; the others are served the stale one."""
    global price
    ask(port, PRODUCT)
    price = 2
    Clock(room).advance(61)
    assert set(at_once(4, lambda _: priced(ask(port, PRODUCT)))) <= {1, 2}
    assert priced(ask(port, PRODUCT)) == 2
    assert calls == ["product", "product"]


def test_a_stale_page_in_place_of_an_error_is_a_hit(port: int, room: Stillroom) -> None:
    """A stale page that is served because its view fails now is said to be a hit, and not a new page."""
    global price
    ask(port, PRODUCT)
    price = BROKEN
    Clock(room).advance(61)
    replies = [ask(port, PRODUCT) for _ in range(2)]
    assert [priced(reply) for reply in replies] == [1, 1]
    assert [reply.one("cache-status") for reply in replies] == ["stillroom; hit"] * 2
    assert calls == ["product"] * 2


def test_an_async_view_is_cached_too(room: Stillroom) -> None:
    """An async view is cached too, under ASGI."""

    async def visit() -> list[Any]:
        client = AsyncClient()
        return [json.loads((await client.get("/slow")).content)["price"] for _ in range(2)]

    global price
    assert asyncio.run(visit()) == [1, 1]
    price = 2
    room.cache.invalidate_by_tag("products")
    assert asyncio.run(visit()) == [2, 2]
    assert calls == ["slow", "slow"]
    assert ASGIHandler


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout=0: a number of seconds from 0.001"),
        ({"timeout": 60, "cdn": "Cache-Tags"}, "did you mean Cache-Tag"),
        ({"timeout": 60, "cdn": None}, "cdn=None: a list of names"),
        ({"timeout": 60, "harmless_cookies": "_ga*"}, "'_ga\\*': a list of names"),
        ({"timeout": 60, "tags": ["product:{"]}, "not a template"),
    ],
)
def test_a_mistake_is_told_at_the_view(options: dict[str, Any], said: str) -> None:
    """A bad option raises at the view when its module is imported."""
    with pytest.raises((InvalidKey, SettingsError, ValueError), match=said):
        cache_page(**options)(product)


@pytest.mark.parametrize("cookie", ["", "a=b"])
def test_a_view_that_returns_no_response_is_told(room: Stillroom, cookie: str) -> None:
    """A page of a view that returns data, as those of Django Ninja do, is a mistake; its data stay as they are."""
    data = {"id": 7}

    @cache_page(60)
    def product_data(request: HttpRequest) -> Any:
        return data

    request = RequestFactory().get("/data", headers={"Cookie": cookie})
    with pytest.raises(InvalidArgument, match=r"product_data returned a dict.*@decorate_view"):
        product_data(request)
    assert data == {"id": 7}


# Values


def test_values_have_tags(room: Stillroom) -> None:
    """set, set_many, add and get_or_set take tags, sync and async, and an invalidated tag ends their values."""
    cache: Any = caches["default"]

    async def fill() -> None:
        await cache.aset("d", 1, tags=["t"])
        assert await cache.aadd("e", 1, tags=["t"])

        async def load() -> tuple[int, int]:
            return (1, 2)

        assert await cache.aget_or_set("f", load, tags=["t"]) == (1, 2)

    cache.set("a", (1, 2), 60, tags=["t"])
    cache.set_many({"b": 1}, tags=["t"])
    assert cache.add("c", 1, tags=["t"])
    asyncio.run(fill())
    assert cache.get_or_set("g", lambda: {1, 2}, 60, tags=["t"]) == {1, 2}
    assert cache.get_or_set("g", lambda: 3, 60, tags=["t"]) == {1, 2}
    assert cache.get_or_set("h", 5, None) == 5
    assert cache.get_or_set("i", lambda: 6, 0) == 6
    assert len(cache.get_many("abcdefgh")) == 8
    cache.invalidate_by_tag("t")
    assert cache.get_many("abcdefghi") == {"h": 5}


def test_one_caller_makes_a_value_while_others_wait(room: Stillroom) -> None:
    """While one caller makes a value the others wait; Django's own get_or_set would make it for each."""
    cache: Any = caches["default"]
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    def ask_for_it(_: int) -> int:
        found: int = caches["default"].get_or_set("k", make, 60)  # type: ignore[call-overload]
        return found

    assert at_once(8, ask_for_it) == [1] * 8
    assert cache.get("k") == 1


def test_a_value_that_was_overtaken_is_not_kept(room: Stillroom) -> None:
    """A value that was invalidated while it was made is not kept, unlike with Django's own get and set."""
    cache: Any = caches["default"]

    def make() -> str:
        cache.invalidate_by_tag("t")
        return "old"

    assert cache.get_or_set("k", make, tags=["t"]) == "old"
    assert cache.get("k") is None


# Fragments

FRAGMENT = (
    '{% load stillroom %}{% cache 60 sidebar user tags="a, b" swr=600 %}{{ price }}{% endcache %}'
)


def fragment(text: str = FRAGMENT, **context: Any) -> str:
    return str(Template(text).render(Context(context)))


def test_a_fragment_has_tags(room: Stillroom) -> None:
    """A fragment is rendered once for each of its variables, until one of its tags is invalidated."""
    assert fragment(user=1, price="<1>") == "&lt;1&gt;"
    assert fragment(user=1, price=2) == "&lt;1&gt;"
    assert fragment(user=2, price=3) == "3"
    for tag in ("a", "b"):
        room.cache.invalidate_by_tag(tag)
        assert fragment(user=2, price=tag) == tag
    listed = FRAGMENT.replace('"a, b"', "tags")
    assert fragment(listed, user=3, price=4, tags=["c"]) == "4"
    room.cache.invalidate_by_tag("c")
    assert fragment(listed, user=3, price=5, tags=["c"]) == "5"


def test_a_fragment_may_vary_by_what_has_the_name_of_an_option(room: Stillroom) -> None:
    """A variable that is called tags or swr tells fragments apart, as any other, where it is no option."""
    text = "{% load stillroom %}{% cache 60 cloud tags swr %}{{ price }}{% endcache %}"
    assert fragment(text, tags="a", swr=1, price=1) == "1"
    assert fragment(text, tags="b", swr=1, price=2) == "2"
    assert fragment(text, tags="a", swr=2, price=3) == "3"
    assert fragment(text, tags="a", swr=1, price=4) == "1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% load stillroom %}{% cache 60 %}{% endcache %}", "a timeout in seconds and a name"),
        ('{% load stillroom %}{% cache "x" n %}{% endcache %}', "timeout='x' is no number"),
        ("{% load stillroom %}{% cache x n %}{% endcache %}", "timeout='' is no number"),
        ('{% load stillroom %}{% cache 60 n using="other" %}{% endcache %}', "no cache 'other'"),
    ],
)
def test_a_mistake_in_a_fragment_is_told(text: str, said: str) -> None:
    """A mistake in a fragment's tag raises a template error, as in Django's own."""
    with pytest.raises(TemplateSyntaxError, match=said):
        fragment(text)


def test_tags_need_our_backend() -> None:
    """Tags with another cache backend raise an error, because it would ignore them."""
    local = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    with override_settings(CACHES=local):
        with pytest.raises(TemplateSyntaxError, match="need a StillroomCache, not LocMemCache"):
            fragment(user=1)


# Classes of async views, and times


@pytest.mark.parametrize("way", ["around", "dispatch"])
def test_a_class_of_async_views_is_cached_too(way: str) -> None:
    """A page of a class whose handlers are awaited is kept, for servers of both kinds."""
    address = f"/prices/{way}"

    async def asked() -> list[HttpResponse]:
        return [await AsyncClient().get(address) for _ in range(2)]

    told = [*asyncio.run(asked()), *(Client().get(address) for _ in range(2))]
    assert [(one.status_code, one.content) for one in told] == [(200, told[0].content)] * 4


@pytest.mark.parametrize("way", ["fresh", "fresh/around"])
def test_a_class_of_async_views_asks_again_who_somebody_is(way: str) -> None:
    """`fresh` refuses a visitor with 401 also where it stands at a class whose handlers are awaited."""

    async def asked() -> HttpResponse:
        return await AsyncClient().get(f"/prices/{way}")

    for told in (asyncio.run(asked()), Client().get(f"/prices/{way}")):
        assert told.status_code == 401
    assert calls == []


def test_whatever_gives_a_coroutine_makes_a_value() -> None:
    """`aget_or_set` awaits the result of a partial, an object or a lambda as that of a coroutine function."""

    async def load(n: int = 1) -> int:
        return n

    class Load:
        async def __call__(self) -> int:
            return 4

    async def made() -> list[int]:
        ways = (load, partial(load, 2), lambda: load(3), Load(), lambda: 5, 6)
        cache = caches["default"]
        return [await cache.aget_or_set(f"made:{n}", way, 60) for n, way in enumerate(ways)]

    assert asyncio.run(made()) == [1, 2, 3, 4, 5, 6]


def test_times_of_values_may_be_timedeltas() -> None:
    """A timeout and an swr of Django's cache may be timedeltas; what is no time is refused by its name."""
    cache: Any = caches["default"]
    cache.set("a", 1, timedelta(minutes=1))
    assert cache.touch("a", timedelta(minutes=2))
    assert cache.add("b", 2, timedelta(seconds=0))
    assert cache.get_or_set("c", 3, timedelta(minutes=1), swr=timedelta(minutes=1)) == 3
    assert cache.get_many(["a", "b", "c"]) == {"a": 1, "c": 3}
    for wrong in ("60", True, float("nan")):
        with pytest.raises(InvalidArgument, match="timeout="):
            cache.set("a", 1, wrong)
        with pytest.raises(InvalidArgument, match="swr="):
            cache.get_or_set("d", 1, 60, swr=wrong)


def test_a_template_of_a_page_is_no_tag(port: int, room: Stillroom) -> None:
    """A page's template in the place of a tag, whose f was forgotten, is refused once the page was asked for."""
    assert ask(port, PRODUCT).status == 200
    for call in (
        lambda: room.cache.invalidate_by_tag("product:{id}"),
        lambda: caches["default"].set("a", 1, tags=["product:{id}"]),  # type: ignore[call-arg]
    ):
        with pytest.raises(InvalidKey, match=r"did you mean f'product:\{id\}'"):
            call()
