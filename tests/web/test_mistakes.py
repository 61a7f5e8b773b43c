"""A mistake around requests is told where it is written, by what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest
from django.contrib.sessions.backends.cache import SessionStore
from django.http import HttpRequest
from django.urls import path
from fastapi import APIRouter, Depends, FastAPI
from flask import Blueprint, Flask
from flask.views import MethodView
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, WebSocketRoute
from starlette.routing import Route as Path_
from werkzeug.test import Client

import tests.web.test_django  # noqa: F401 - configures Django
from stillroom import (
    AUTH,
    AsyncStillroom,
    InvalidLimit,
    Limit,
    NoDispatch,
    Route,
    Routes,
    Settings,
    SettingsError,
    Stillroom,
    StillroomError,
)
from stillroom.limits.routes import told
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.asgi_health import HealthASGI
from stillroom.web.django.limits import exempt as django_exempt
from stillroom.web.django.limits import limited as on_django
from stillroom.web.django.pages import cache_page as page_in_django
from stillroom.web.django.views import fresh as fresh_in_django
from stillroom.web.explain import ExplainASGI, ExplainWSGI
from stillroom.web.fastapi import limited as on_fastapi
from stillroom.web.fastapi_room import lifespan
from stillroom.web.fastapi_room import load_within as within_fastapi
from stillroom.web.flask import StillroomLimits, StillroomSessions
from stillroom.web.flask import exempt as flask_exempt
from stillroom.web.flask import fresh as fresh_in_flask
from stillroom.web.flask import limited as on_flask
from stillroom.web.flask_room import load_within as within_flask
from stillroom.web.limited import Answered, Header, is_exempt
from stillroom.web.pages import Pages
from stillroom.web.request_session import WebSession
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.starlette import exempt as starlette_exempt
from stillroom.web.starlette import limited as on_starlette
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from stillroom.web.wsgi_health import HealthWSGI
from tests.support.djangoshop.models import Product

OFFLINE: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1", "session_peppers": "p" * 40}
ROOM = Stillroom(Settings(**OFFLINE), dispatch=NoDispatch())
ASYNC_ROOM = AsyncStillroom(Settings(**OFFLINE), dispatch=NoDispatch())
LAYERS: dict[str, Any] = {
    one.__name__: one for one in (HealthWSGI, HealthASGI, ExplainWSGI, ExplainASGI)
}
TEN = Limit("ten", 10, 60)
TWINS = [AUTH, Limit("auth", 3, 5)]


def app(*_: Any) -> Any:
    """Stand for an app of either face."""


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(StillroomError) as error:
        act()
    return str(error.value)


@pytest.mark.parametrize(("make", "room"), [(Wsgi, ROOM), (Asgi, ASYNC_ROOM)], ids=["wsgi", "asgi"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"cookie": "sid"},
            r"cookie='sid': a SessionCookie(…); did you mean SessionCookie('sid')?",
        ),
        ({"cookie": {"name": "sid"}}, "a SessionCookie(…)"),
        ({"subject": "user"}, "'user': subject= is a function of the request"),
        ({"exempt_when": True}, "True: exempt_when= is a function of the request"),
        ({"sessions": "no"}, "sessions='no': True or False"),
        ({"render": 5}, "render= is a function"),
        ({"routes": {}}, "routes= is a Routes"),
        ({"same_origin": None}, "True, or a list of origins"),
    ],
)
def test_an_option_of_the_middleware(
    make: Any, room: Any, given: dict[str, Any], said: str
) -> None:
    """An option of the middleware that can't be meant is refused when the middleware is made."""
    assert said in refused(lambda: make(app, room, **given))


def test_what_the_middleware_is_put_around() -> None:
    """A middleware around what is no app, or with a room of the other face, is refused."""
    for make, room, other in ((Wsgi, ROOM, ASYNC_ROOM), (Asgi, ASYNC_ROOM, ROOM)):
        assert "not around NoneType" in refused(lambda make=make, room=room: make(None, room))
        assert "needs a room" in refused(lambda make=make, other=other: make(app, other))
    assert "did you mean that of stillroom.web.asgi?" in refused(lambda: Wsgi(Starlette(), ROOM))
    flask = Flask("x")
    for inner in (flask, flask.wsgi_app):
        said = refused(lambda inner=inner: Asgi(inner, ASYNC_ROOM))
        assert "did you mean that of stillroom.web.wsgi?" in said


@pytest.mark.parametrize("kind", ["Health", "Explain"])
def test_what_other_layers_are_put_around(kind: str) -> None:
    """Health and explanations are put around an app of their own face, and a layer that needs an app has one."""
    wsgi, asgi = LAYERS[f"{kind}WSGI"], LAYERS[f"{kind}ASGI"]
    for order in (1, -1):
        said = refused(lambda order=order: wsgi(*[Starlette(), ROOM][::order]))
        assert f"{kind}WSGI is put around an app of the other face" in said
        assert f"did you mean {kind}ASGI?" in said
        said = refused(lambda order=order: asgi(*[Flask("x"), ASYNC_ROOM][::order]))
        assert f"did you mean {kind}WSGI?" in said
    for layer, room, inner in ((wsgi, ROOM, Flask("x")), (asgi, ASYNC_ROOM, Starlette())):
        assert "is put around an app, not around int" in refused(
            lambda layer=layer, room=room: layer(app=3, room=room)
        )
        assert layer(inner, room)
        if kind == "Health":
            assert layer(room)
        else:
            assert "not around NoneType" in refused(lambda layer=layer, room=room: layer(room))


def test_whose_context_loads_happen_in() -> None:
    """Loads happen in the context of an app of the framework that the function is for."""
    for load_within, app in ((within_flask, FastAPI()), (within_fastapi, Flask("x"))):
        for wrong in (app, None):
            assert "app=" in refused(lambda load=load_within, app=wrong: load(ASYNC_ROOM, app))
    assert "room=" in refused(lambda: within_fastapi(None, FastAPI()))  # type: ignore[arg-type]


def test_what_flask_is_given() -> None:
    """Flask's sessions and limits refuse another room, the name of a cookie and what is no function."""
    for room in (ASYNC_ROOM, None, Flask("x")):
        assert "needs a room of the type Stillroom" in refused(
            lambda room=room: StillroomSessions(room)
        )
    assert "did you mean SessionCookie('sid')" in refused(
        lambda: StillroomSessions(ROOM, cookie="sid")  # type: ignore[arg-type]
    )
    assert "did you mean SessionCookie('sid')" in refused(
        lambda: ROOM.init_app(Flask("x"), cookie="sid")  # type: ignore[arg-type]
    )
    assert "exempt_when= is a function" in refused(
        lambda: StillroomLimits(Flask("x"), ROOM, exempt_when=True)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "limited",
    [on_flask, on_starlette, on_fastapi, on_django],
    ids=["flask", "starlette", "fastapi", "django"],
)
@pytest.mark.parametrize(
    ("limits", "given", "said"),
    [
        ([[]], {}, "it needs limits"),
        ([()], {}, "it needs limits"),
        (TWINS, {}, "two limits of one request have this name"),
        ([TWINS], {}, "two limits of one request have this name"),
        ([AUTH], {"by": 5}, "5: by= is ip, user"),
        ([AUTH], {"by": ["ip"]}, "by= is ip, user"),
        ([AUTH], {"exempt_when": True}, "True: exempt_when= is a function"),
        ([AUTH], {"exempt_when": "x"}, "'x': exempt_when= is a function"),
    ],
)
def test_a_limit_of_an_endpoint(
    limited: Any, limits: Any, given: dict[str, Any], said: str
) -> None:
    """Limits of an endpoint that would raise at each request, or limit nothing, are refused where they are put."""
    assert said in refused(lambda: limited(*limits, **given))


async def awaited(*_: Any) -> bool:
    """Stand for a function whose answer nobody awaits: a coroutine is true of every request."""
    return False


class Awaited:
    async def __call__(self, *_: Any) -> bool:
        return False


AWAITED = [awaited, partial(awaited, 1), Awaited()]


@pytest.mark.parametrize("given", AWAITED, ids=["function", "partial", "object"])
def test_a_coroutine_function_that_nobody_would_await(given: Any) -> None:
    """A coroutine function is refused where its answer is taken at once, since a coroutine is true of everybody."""
    makes: list[Callable[[], object]] = [
        lambda: StillroomLimits(Flask("x"), ROOM, exempt_when=given),
        lambda: StillroomLimits(Flask("x"), ROOM, render=given),
        lambda: Route("/x", count=given),
    ]
    for make, room in ((Wsgi, ROOM), (Asgi, ASYNC_ROOM)):
        names = ("exempt_when", "subject", "render")
        makes += [partial(make, app, room, **{name: given}) for name in names]
    frameworks = (on_flask, on_django, on_starlette, on_fastapi)
    makes += [partial(limited, AUTH, count=given) for limited in frameworks]
    for limited in (on_flask, on_django):
        makes.append(partial(limited, given))
        makes += [partial(limited, AUTH, **{name: given}) for name in ("by", "cost", "exempt_when")]
    for make in makes:
        assert "this one has to be awaited" in refused(make)


@pytest.mark.parametrize("given", [lambda: 1, lambda one, other: 1], ids=["none", "two"])
def test_a_function_that_takes_no_request(given: Any) -> None:
    """A function that can't be called with the request alone is refused where it is written."""
    makes: list[Callable[[], object]] = [
        lambda: StillroomLimits(Flask("x"), ROOM, exempt_when=given),
        lambda: Route("/x", count=given),
        lambda: Wsgi(app, ROOM, render=given),
        lambda: Asgi(app, ASYNC_ROOM, subject=given),
    ]
    for limited in (on_flask, on_django, on_starlette, on_fastapi):
        names = ("by", "cost", "exempt_when", "count")
        makes += [partial(limited, AUTH, **{name: given}) for name in names]
    for make in makes:
        assert "is called with one argument" in refused(make)


@pytest.mark.parametrize(
    "limited",
    [on_flask, on_starlette, on_fastapi, on_django],
    ids=["flask", "starlette", "fastapi", "django"],
)
def test_a_decorator_without_its_limits(limited: Any) -> None:
    """A bare `@limited` is told where it is written, or where a view with one parameter is called."""
    assert "did you mean @limited(AUTH)?" in refused(lambda: limited(lambda: "a view"))
    request = {on_starlette: Request({"type": "http"}), on_django: HttpRequest()}.get(limited)
    bare = limited(lambda request: "a view")
    if request is not None:
        assert "did you mean @limited(AUTH)?" in refused(lambda: bare(request))
    if limited is on_flask:  # which calls a view with the fields of the path
        said = refused(lambda: bare(id=7))
        assert "it was called as a view, with id; did you mean @limited(AUTH)?" in said


def test_a_fresh_session_where_there_is_none_of_ours() -> None:
    """Where an app has no sessions of Stillroom, `@fresh` says which line is missing."""
    flask = Flask("x")
    flask.secret_key = "x"
    with flask.test_request_context():
        assert "room.init_app(app)" in refused(fresh_in_flask(600)(lambda: "a view"))
    request = HttpRequest()
    assert "SESSION_ENGINE" in refused(lambda: fresh_in_django(600)(lambda request: "")(request))
    request.session = SessionStore()  # type: ignore[assignment]  # Django's own
    assert "SESSION_ENGINE" in refused(lambda: fresh_in_django(600)(lambda request: "")(request))


@pytest.mark.parametrize(
    ("option", "meant"), [("subject", "by=…"), ("exempt_when", "exempt_when=…")]
)
def test_an_option_of_a_table_that_is_not_there(option: str, meant: str) -> None:
    """What says how a table counts is refused without a table: it would say nothing of limits on endpoints."""

    def given(_: object) -> dict[str, str]:
        return {}

    for make, room in ((Wsgi, ROOM), (Asgi, ASYNC_ROOM)):
        said = refused(lambda it=make, room=room: it(app, room, **{option: given}))
        assert "give routes=Routes([…]) too. Endpoints take it" in said
        assert f"limited(API, {meant})" in said
        make(app, room, routes=Routes(), **{option: given})  # type: ignore[operator]
    assert "give routes=" in refused(lambda: ROOM.init_app(Flask("x"), subject=given))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": lambda answer: answer.status_code}, "no status_code, but headers, status; did"),
        ({"subject": lambda asked: asked.url}, "which has no url, but headers, method, path, peer"),
        ({"exempt_when": lambda asked: asked.header("X")}, "no header, but headers"),
        ({"render": lambda refusal: refusal.status_code}, "did you mean status?"),
        ({"render": lambda refusal: "slow down"}, "render= returns (content type, body)"),
        ({"render": lambda refusal: ("slow", "down")}, "not ('slow', 'down')"),
        ({"render": lambda refusal: ("text/plain", {})}, "not ('text/plain', {})"),
        ({"subject": lambda asked: None}, "returned a NoneType; it returns a mapping"),
        ({"subject": lambda asked: "ann"}, "returned a str; it returns a mapping"),
    ],
)
def test_a_function_that_takes_ours_for_a_frameworks_own(
    options: dict[str, Any], said: str
) -> None:
    """A function that wants an attribute of a framework's response or request is told what there is."""

    def answering(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return []

    own = {"count": options.pop("count")} if "count" in options else {}
    routes = Routes([Route("/", [Limit("own_words", 0, 60)] if not own else [TEN], **own)])
    client = Client(Wsgi(answering, ROOM, routes=routes, **options))
    assert said in refused(lambda: client.get("/"))


def test_a_functions_own_mistake_is_its_own() -> None:
    """An AttributeError about something else comes as it is."""
    with pytest.raises(AttributeError, match="'NoneType' object"):
        told("count", lambda answer: answer.headers.get("x").lower(), Answered(200, {}))


def test_what_is_no_app_of_flask() -> None:
    """Limits of what is no Flask app are refused; for a blueprint it is said what to write."""
    for given in (Blueprint("b", __name__), FastAPI(), app):
        assert "limited(…)(blueprint)" in refused(lambda it=given: StillroomLimits(it, ROOM))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (fresh_in_flask(600), "is put on a view"),
        (fresh_in_django(600), "is put on a view"),
        (Pages(ROOM).page(), "is put on a function"),
        (Pages, "a Stillroom or AsyncStillroom"),
        (partial(lifespan, ASYNC_ROOM), "a function of the app"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(call: Any, said: str) -> None:
    """What raises when it is to be shown is refused as anything else that is not meant."""
    deep = reduce(lambda inner, _: [inner], range(5_000), list[Any]())
    assert said in refused(lambda: call(deep))


def test_what_is_no_lifespan() -> None:
    """What can't be called is refused as a lifespan where it is written."""
    assert "a function of the app" in refused(lambda: lifespan(ASYNC_ROOM, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("by", "meant"), [("X-API-Key", "Header('X-API-Key')?"), ("IP", "ip?")])
def test_by_is_written_in_another_way(by: str, meant: str) -> None:
    """A header's name as `by=`, or a kind in capitals, is answered with what was meant."""
    assert f"did you mean {meant}" in refused(lambda: on_fastapi(AUTH, by=by))


def test_fresh_is_put_on_a_view() -> None:
    """`@fresh` on a class or on what is no view is refused, with what is written for a class of views."""
    for fresh, meant in (
        (fresh_in_flask, "decorators = [fresh(…)]"),
        (fresh_in_django, '@method_decorator(fresh(…), name="dispatch")'),
    ):
        assert meant in refused(lambda it=fresh: it(600)(MethodView))
        assert "is put on a view, not on '/pay'" in refused(lambda it=fresh: it(600)("/pay"))


def test_limits_are_put_around_a_router_of_fastapi() -> None:
    """`limited(…)(router)` is refused, which Flask's blueprints take: the app would include the bare router."""
    for kind in (APIRouter, type("Versioned", (APIRouter,), {})):
        said = refused(lambda kind=kind: on_starlette(AUTH)(kind()))
        assert "APIRouter(dependencies=[Depends(limited(…))])" in said


def test_what_goes_around_a_view_of_ninja_stands_below_its_decorator() -> None:
    """Above `@api.get` of Django Ninja, which keeps the bare function, a decorator of ours is refused."""

    def known(request: HttpRequest) -> str:
        return "Ninja has it"

    known._ninja_operation = object()  # type: ignore[attr-defined]
    for name, put_on in (
        ("limited", on_django(AUTH)),
        ("fresh", fresh_in_django(600)),
        ("cache_page", page_in_django(60)),
    ):
        said = refused(lambda put_on=put_on: put_on(known))
        assert f"known is in its API already, which would call it without @{name}(…)" in said


def test_limits_are_put_on_what_a_route_leads_to() -> None:
    """`limited(…)` around a route of Starlette is refused, with what to write: a router could not use it."""
    for route in (Path_("/a", str), Mount("/a", routes=[]), WebSocketRoute("/a", str)):
        said = refused(lambda route=route: on_starlette(AUTH)(route))
        assert f"{type(route).__name__}(path, limited(…)(endpoint))" in said
        assert "Mount(path, app=limited(…)(app))" in said


def test_exempt_is_put_on_an_endpoint() -> None:
    """`exempt` on what holds endpoints, or is none, is refused: nobody would look for the mark there."""
    view = object.__new__(type("View", (), {"get": lambda self: "a view"}))
    holders = (Blueprint("b", __name__), APIRouter(), Flask("x"), path("a", str), [str], None)
    for exempt in (flask_exempt, starlette_exempt, django_exempt):
        for given in holders:
            said = refused(lambda it=exempt, given=given: it(given))
            assert "put it on each, or give exempt_when=" in said
        assert is_exempt(exempt(view.get))


def test_a_class_in_the_place_of_what_is_made_of_it() -> None:
    """`by=Header` and `limited(Limit)` are told where they are written: a class is no function of a request."""
    for limited in (on_flask, on_django, on_starlette, on_fastapi):
        assert "did you mean Header(…)?" in refused(lambda it=limited: it(AUTH, by=Header))
        assert "did you mean Limit(…)?" in refused(lambda it=limited: it(Limit))


def test_options_that_have_another_name_elsewhere() -> None:
    """An option of slowapi or Flask-Limiter is answered with its name here."""
    for limited in (on_flask, on_django, on_starlette, on_fastapi):
        for name, meant in (("key_func", "by"), ("deduct_when", "count")):
            given = {name: lambda request: "x"}
            said = refused(lambda it=limited, given=given: it(AUTH, **given))
            assert f"{name!r}; did you mean {meant}?" in said


def test_a_decorator_in_the_place_of_a_dependency() -> None:
    """Starlette's decorator as a dependency of FastAPI is refused at the route: it asks visitors for `app`."""
    fastapi = FastAPI()

    def add() -> None:
        fastapi.get("/", dependencies=[Depends(on_starlette(AUTH))])(lambda: "a view")

    assert "import it from stillroom.web.fastapi" in refused(add)


def test_what_a_session_is_changed_by() -> None:
    """`session.mutate` refuses a coroutine function, which nobody would await, and what is no function."""
    session = WebSession(ROOM.operations.sessions, None, SessionCookie(), None, {})
    for given in (*AWAITED, {"n": 1}):
        assert "mutate" in refused(lambda given=given: session.mutate(given))


def test_a_row_of_django_is_no_argument() -> None:
    """A row of Django as an argument of a loader is refused where the loader is written, with what to give."""

    def load(product: Product) -> int:
        return 1

    said = refused(lambda: ROOM.cache.cached("row:{product}")(load))
    assert (
        "{product}: tests.support.djangoshop.models.Product is a row of Django's; give its pk"
        in said
    )


def test_a_room_says_what_the_other_one_has() -> None:
    """A room of the wrong face is told which one the framework takes."""
    with pytest.raises(AttributeError, match=r"Flask takes a Stillroom\(\)"):
        ASYNC_ROOM.init_app(Flask("x"))  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"FastAPI and Starlette take an AsyncStillroom\(\)"):
        FastAPI(lifespan=ROOM.lifespan)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("service", "name", "meant"),
    [
        (ROOM.cache, "delete", "invalidate"),
        (ASYNC_ROOM.cache, "delete_pattern", "invalidate_by_pattern"),
        (ROOM.sessions, "delete", "destroy"),
        (ROOM.limits, "hit", "check"),
    ],
)
def test_a_method_that_has_another_name_elsewhere(service: Any, name: str, meant: str) -> None:
    """A method of django-redis, cashews or limits is answered with its name here."""
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; did you mean {meant}\?"):
        getattr(service, name)
    assert callable(getattr(service, meant))
    assert not hasattr(service, "nothing")


@pytest.mark.parametrize("given", AWAITED, ids=["function", "partial", "object"])
def test_functions_of_a_request_may_be_awaited_in_asgi(given: Any) -> None:
    """In Starlette and FastAPI each function of the request may be a coroutine function."""
    for limited in (on_starlette, on_fastapi):
        limited(given)
        limited(AUTH, by=given, cost=given, exempt_when=given)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Route("/x", methods=None), "methods is a list"),
        (lambda: Route("/x", TWINS), "two limits of one request have this name"),
        (lambda: Routes(Route("/x")), "did you mean [Route(…)]?"),
        (lambda: Routes(None), "a list of Route(…)s"),
        (lambda: Routes("/x"), "'/x': Routes takes a list"),
        (lambda: Routes([], default=TWINS), "two limits of one request have this name"),
    ],
)
def test_a_route(make: Any, said: str) -> None:
    """A route or a table that can't be meant is refused with what was probably meant."""
    with pytest.raises(InvalidLimit) as error:
        make()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": None}, "name=None: a str"),
        ({"name": 5}, "name=5: a str"),
        ({"name": "sid", "domain": 5}, "domain=5: a str"),
        ({"name": "sid", "path": None}, "path=None: a str"),
        ({"name": "sid", "secure": "no"}, "secure='no': True or False"),
        ({"http_only": None}, "http_only=None: True or False"),
        ({"persistent": "no"}, "persistent='no': True or False"),
    ],
)
def test_a_cookie(given: dict[str, Any], said: str) -> None:
    """A cookie whose attributes have the wrong type is refused: "no" is not taken for yes."""
    with pytest.raises(SettingsError) as error:
        SessionCookie(**given)
    assert said in str(error.value)


def test_the_name_of_a_header_has_no_case() -> None:
    """`proxy_header` is taken as proxies' documents write it, and a slip is told."""
    assert Settings(**OFFLINE, proxy_header="X-Real-IP").proxy_header == "x-real-ip"
    with pytest.raises(SettingsError, match=r"did you mean x-forwarded-for\?"):
        Settings(**OFFLINE, proxy_header="X-Forwarded-Fro")
    with pytest.raises(SettingsError, match="at least 16 characters, not 5"):
        Settings(**OFFLINE, health_token="short")
