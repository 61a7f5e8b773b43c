"""What is read of an app's endpoints is what its requests are charged, in each framework."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from django.views import View
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from flask import Blueprint, Flask
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Mount, Route

import tests.web.test_django  # noqa: F401 - configures Django
from stillroom import AUTH, AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.cache.cached import UNCACHED
from stillroom.web import fastapi as on_fastapi
from stillroom.web import flask as on_flask
from stillroom.web import starlette as on_starlette
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.carriers import (
    carried_in_django,
    charges,
    default_of,
    layers,
    lost_views,
    of_django,
)
from stillroom.web.django import limits as on_django
from stillroom.web.known_routes import Known, fits, inner_apps, known_routes
from tests.support.web import ask
from tests.web.limited_apps import FRAMEWORKS, serving
from tests.web.test_limits import read

API, OUTER = Limit("api", 100, 60), Limit("outer", 100, 60)
NoGuard = Annotated[None, on_fastapi.limited(AUTH)]
REQUESTS = [
    *[("POST", path) for path in ("/guess?right=1", "/form?right=1", "/class", "/method")],
    *[
        ("GET", path)
        for path in ("/cost?n=1", "/mine", "/keyed", "/tenant", "/shared/a", "/shared/b")
    ],
    *[("GET", path) for path in ("/probed", "/both", "/sync/7", "/async", "/class", "/method")],
    *[("GET", path) for path in ("/touch", "/open", "/group/x", "/group/own", "/group/free")],
]
# Of a group that is not an app of its own, whose limits are in front of the routing.
FREED = [("GET", "/group/freed"), ("GET", "/group/class"), ("POST", "/group/class")]


@contextmanager
def app_of(framework: str, settings: Settings) -> Iterator[Any]:
    """Make the app that `serving` serves. Django's is what its settings say just now."""
    if framework == "flask":
        from tests.web.limited_flask import make_app

        with Stillroom(settings, dispatch=NoDispatch()) as room:
            yield make_app(room)
    elif framework.startswith("django"):
        from django.core.handlers.wsgi import WSGIHandler

        yield WSGIHandler()
    else:
        from tests.web.limited_starlette import MAKERS

        yield MAKERS[framework](AsyncStillroom(settings, dispatch=NoDispatch()))


def named(known: list[Known], method: str, path: str) -> set[str]:
    """Return the names of the limits that are read for a request."""
    found = [one for one in known if fits(one, method, path)]
    assert len(found) <= 2, found  # Starlette's classes are two routes
    return {
        limit.name
        for one in found
        for carried in one.carries
        if carried.takes(method)
        for limit in carried.limits or ()
    }


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_read_is_what_is_charged(framework: str, settings: Settings) -> None:
    """The limits that are read for an endpoint and method are those that its response tells of."""
    with serving(framework, settings) as port, app_of(framework, settings) as app:
        known = known_routes(app) or []
        assert charges(app)
        for method, path in [*REQUESTS, *(FREED if framework != "starlette" else [])]:
            policy = ask(port, path, method).one("ratelimit-policy")
            told = set(read(policy)) if policy else set()
            assert named(known, method, path.partition("?")[0]) == told, (method, path)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_a_function_says_is_not_known(framework: str, settings: Settings) -> None:
    """Limits that a function of the request returns are none that can be read, and are told apart from none."""
    with serving(framework, settings), app_of(framework, settings) as app:
        (tiers,) = [one for one in known_routes(app) or [] if one.text == "/tiers"]
        (carried,) = tiers.carries
        assert carried.limits is None
        assert tiers.endpoint.name


def test_limits_around_apps_are_of_all_their_endpoints() -> None:
    """Limits around an app, in its middleware, around a mount or on a router are those of the endpoints inside."""
    limited = on_starlette.limited

    async def view(request: Any) -> Response:
        return Response()

    @on_starlette.exempt
    async def free(request: Any) -> Response:
        return Response()

    inner = Starlette(
        routes=[Route("/x", limited(AUTH)(view))], middleware=[Middleware(limited(API))]
    )
    app = limited(OUTER)(Starlette(routes=[Mount("/in", app=inner), Route("/y", free)]))
    found = {one.text: [c.limits for c in one.carries] for one in known_routes(app) or []}
    assert found == {"/in/x": [(OUTER,), (API,), (AUTH,)], "/y": [(OUTER,)]}
    assert not charges(app)
    assert charges(StillroomMiddleware(app, AsyncStillroom(dispatch=NoDispatch())))
    assert inner in list(inner_apps(app))

    needs = [Depends(on_fastapi.limited(API))]
    router = APIRouter(prefix="/r", dependencies=needs)
    outer = APIRouter(dependencies=[Depends(on_fastapi.limited(AUTH))])

    @router.websocket("/socket")
    async def socket(websocket: WebSocket) -> None: ...

    router.add_api_route("/x", view)
    outer.include_router(router)
    fastapi = FastAPI(dependencies=[Depends(on_fastapi.limited(OUTER))])
    fastapi.include_router(outer)
    known = {one.text: one for one in known_routes(fastapi) or []}
    assert [c.limits for c in known["/r/x"].carries] == [(OUTER,), (AUTH,), (API,)]
    assert not known["/r/socket"].carries[0].takes("GET")
    assert not known["/docs"].carries


def test_blueprints_within_blueprints_and_defaults_are_read(settings: Settings) -> None:
    """A blueprint within a blueprint has the limits of both, and a default is that of the views without any."""
    inner = on_flask.limited(AUTH)(Blueprint("inner", __name__))
    inner.add_url_rule("/x", "x", str)
    outer = on_flask.limited(API)(Blueprint("outer", __name__, url_prefix="/o"))
    outer.register_blueprint(inner)
    app = Flask("nested")
    app.register_blueprint(outer)
    app.add_url_rule("/lost", "lost", view := lambda: "")
    on_flask.limited(API)(view)
    (nested,) = [one for one in known_routes(app) or [] if one.text == "/o/x"]
    assert [c.limits for c in nested.carries] == [(API,), (AUTH,)]
    assert not charges(app)
    assert default_of(app) == ()
    assert lost_views(app) == ["lost"]
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        on_flask.StillroomLimits(app, room, default=[OUTER])
    assert charges(app)
    assert default_of(app) == (OUTER,)


def test_a_view_that_is_in_an_app_of_starlette_without_its_limits_is_lost(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A @limited above @app.get is named with the first request, because it limits nothing."""

    async def view() -> dict[str, str]:
        return {}

    app = FastAPI()
    app.get("/twice")(on_starlette.limited(AUTH)(view))
    app.get("/again")(on_starlette.limited(API)(on_starlette.limited(OUTER)(view)))
    inner = APIRouter()
    on_starlette.limited(AUTH)(inner.get("/lost")(lost := lambda: {"a": 1}))
    app.include_router(inner)
    known = known_routes(app) or []
    assert [one.text for one in known if one.endpoint.lost] == ["/lost"]
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    assert TestClient(app).get("/lost").status_code == 200
    (told,) = [one.getMessage() for one in caplog.records if "limits nothing" in one.getMessage()]
    assert lost.__qualname__ in told


def test_a_dependency_of_fastapi_is_no_decorator() -> None:
    """FastAPI's guards as decorators are an error at once, wherever they stand, and say what they are."""
    app = FastAPI()
    for view in (lambda: "", app.get("/x")(lambda: "")):
        with pytest.raises(
            TypeError,
            match=r"Depends\(limited.*the decorator is in stillroom.web.starlette.* takes 0",
        ):
            on_fastapi.limited(AUTH)(view)  # type: ignore[call-arg]
        with pytest.raises(
            TypeError, match=r"Depends\(fresh_session\(…\)\)\(\) takes 0 positional"
        ):
            on_starlette.fresh_session(600)(view)  # type: ignore[call-arg]


def test_a_set_of_views_carries_the_limits_of_its_actions() -> None:
    """A set of views of Django's REST framework, which names an action for each method, carries their limits."""

    class Offers:
        def list(self, request: Any) -> None: ...

        @on_django.limited(API)
        def create(self, request: Any) -> None: ...

    def view(request: Any) -> None: ...

    view.cls, view.actions = Offers, {"get": "list", "post": "create"}  # type: ignore[attr-defined]
    assert [one.methods for one in of_django(view, ()).carries] == [frozenset({"POST"})]
    charged = {method: carried_in_django(view, method) for method in ("GET", "HEAD", "POST", "PUT")}
    assert {method: len(limits) for method, limits in charged.items()} == {
        "GET": 0,
        "HEAD": 0,
        "POST": 1,
        "PUT": 0,
    }


def test_a_class_answers_the_methods_that_it_has_and_allows() -> None:
    """A method of a class that `http_method_names` leaves out is not read as one that carries a limit."""

    class Narrow(View):
        http_method_names = ("get", "put")

        def get(self, request: Any) -> None: ...

        @on_django.limited(AUTH)
        def post(self, request: Any) -> None: ...

    endpoint = of_django(on_django.limited(API)(Narrow.as_view()), ())
    assert [(one.limits, one.methods) for one in endpoint.carries] == [((API,), {"GET"})]


def test_functions_that_know_the_same_one_lead_to_no_app() -> None:
    """What has led nowhere once leads nowhere the second time, and the app is found that stands behind it."""

    def known() -> None: ...

    def one() -> Any:
        return known

    def two() -> Any:
        return known

    class Layer:
        def __init__(self, inner: Any) -> None:
            self.helpers, self.more, self.inner = one, two, inner

    app = Flask("inner")
    assert [*layers(Layer(app))][1:] == [app]


def test_a_guard_without_depends_is_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A `limited(…)` or `fresh_session(…)` as a mere parameter guards nothing: the first request tells."""
    app = FastAPI()
    limits, fresh = on_fastapi.limited(AUTH), on_starlette.fresh_session(600)

    def inner(_: NoGuard = None) -> None: ...

    @app.get("/default")
    def default(_=limits) -> None: ...  # type: ignore[no-untyped-def]

    @app.get("/within", dependencies=[Depends(inner)])
    def within() -> None: ...

    @app.post("/fresh")
    def fresh_one(session=fresh) -> None: ...  # type: ignore[no-untyped-def]

    @app.get("/maker", dependencies=[Depends(on_starlette.fresh_session)])
    def maker() -> None: ...

    @app.get("/right", dependencies=[Depends(limits), Depends(fresh)])
    def right() -> None: ...

    found = {one.text: one.endpoint.lost for one in known_routes(app) or [] if one.endpoint.lost}
    assert {text: why.rpartition(" ")[2] for text, why in found.items()} == {
        "/default": "Depends(limited(…))",
        "/within": "Depends(limited(…))",
        "/fresh": "Depends(fresh_session(…))",
        "/maker": "Depends(fresh_session(…))",
    }
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    TestClient(app).get("/default")
    told = [one.getMessage() for one in caplog.records if "guards nothing" in one.getMessage()]
    assert len(told) == 4


def test_a_view_that_is_in_an_app_without_its_cache_is_named(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A @cached above @app.get is named with the first request, because each request calls the view."""
    flask, fastapi = Flask("uncached"), FastAPI()
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.init_app(flask)
        room.cache.cached("sync")(flask.get("/lost")(lost := _view("lost")))
        flask.get("/kept")(room.cache.cached("kept")(_view("kept")))
        assert flask.test_client().get("/lost").status_code == 200
    both = AsyncStillroom(settings, dispatch=NoDispatch())
    both.cache.cached("async")(fastapi.get("/lost")(lost_too := _view("lost_too")))
    kept = both.cache.cached("kept")(both.cache.cached("twice", name="twice")(_view("kept")))
    fastapi.get("/kept")(kept)
    fastapi.get("/limited")(on_starlette.limited(AUTH)(kept))
    fastapi.add_middleware(StillroomMiddleware, room=both)
    assert TestClient(fastapi).get("/lost").status_code == 200
    told = [
        one.getMessage() for one in caplog.records if "each request calls it" in one.getMessage()
    ]
    names = [lost.__name__, f"{__name__}.{lost_too.__qualname__}"]
    assert [one.split(" has a ")[0] for one in told] == [f"the view {name}" for name in names]
    assert lost_views(flask, UNCACHED) == names[:1]


def test_a_decorator_that_caches_a_view_itself_is_not_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """functools.wraps copies the note of the cached view to the decorator which calls it."""

    def caching(view: Any) -> Any:
        kept = room.cache.cached(view.__name__)(view)

        @functools.wraps(view)
        def decorated() -> Any:
            return kept()

        return decorated

    flask, fastapi = Flask("decorated"), FastAPI()
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.init_app(flask)
        flask.get("/")(caching(_view("flasks")))
        fastapi.get("/")(caching(_view("fastapis")))
        fastapi.add_middleware(
            StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch())
        )
        assert flask.test_client().get("/").status_code == 200
        assert TestClient(fastapi).get("/").status_code == 200
    assert not caplog.records
    again, kept = Flask("again"), on_flask.limited(AUTH)(_view("twice"))
    on_flask.limited(AUTH)(again.get("/")(kept))
    assert lost_views(again) == ["twice"]


def _view(name: str) -> Any:
    def view() -> dict[str, str]:
        return {}

    view.__name__ = name
    return view
