"""Limits on endpoints of Starlette, and what FastAPI's share with them: see starlette.py and fastapi.py."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.util import find_spec
from typing import Annotated, Any, TypeVar

from anyio import from_thread
from starlette import __version__ as starlette_version
from starlette._utils import is_async_callable
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stillroom.errors import InvalidLimit, SettingsError
from stillroom.limits import Decision
from stillroom.limits.routes import Counted
from stillroom.misuse import explained, name_of, takes
from stillroom.web.asgi import LIMITER, StillroomMiddleware
from stillroom.web.carriers import LOST
from stillroom.web.cors import Learned, Unanswered, is_preflight
from stillroom.web.limited import (
    MARK,
    By,
    Here,
    Limitation,
    Limited,
    When,
    carried,
    declared,
    exempted,
    is_exempt,
    run_async,
)
from stillroom.web.problem import Answer
from stillroom.web.sockets import POLICY_VIOLATION, can_answer, refuse
from stillroom.web.visit import RENDERING, VISIT, Visit
from stillroom.within import note_within

E = TypeVar("E")

CONNECTION = "stillroom_connection"  # by which FastAPI hands a decorated endpoint its request
# Whether what a handler of errors returns answers a handshake, too. Before, the server made a 500 of it.
ANSWERS_HANDSHAKES = tuple(map(int, starlette_version.split(".")[:2])) >= (0, 41)


class _Endpoint:
    """Stands for what a decorator is put on. FastAPI asks for its schema where the decorator is a dependency."""

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        raise InvalidLimit(
            "limited",
            "it is a decorator here; for Depends(limited(…)) import it from stillroom.web.fastapi",
        )


class LimitExceeded(HTTPException):
    """A request was refused at its endpoint: answered with 429 or 503, problem+json.

    An app answers in its own words with `@app.exception_handler(LimitExceeded)`, or with one for 429; what its
    client is told of limits is added to that answer. `decision` says what there is to say.
    """

    def __init__(self, decision: Decision, answer: Answer) -> None:
        super().__init__(answer.status, _said(decision), dict(answer.headers))
        self.decision = decision
        self.answer = answer


@explained
def limited(
    *limits: Limitation,
    by: By = None,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    count: Counted = "all",
    exempt_when: When = None,
) -> Callable[[E], E]:
    """Put limits on an endpoint: `@limited(AUTH, count="failures")`.

    On a function, sync or async, for http or a websocket, in FastAPI also one that yields; on a method of a class,
    or the whole class; or around an ASGI app: `Mount("/api", app=limited(API)(api))`, `Mount("/api", routes,
    middleware=[Middleware(limited(API))])`.

    - `limits`: Limits, or one function of the request that returns them (tiers). A limit's name is its bucket: all
      endpoints that carry the same limit share it.
    - `by`: "ip"; "user", the session's, which is read first, in a round trip of its own; "ip&user";
      `Header("X-API-Key")`; or a function of the request that returns a name, or a mapping of kinds to names. A
      request without a name counts by address. Default: as each limit says.
    - `cost`: a number or a function of the request.
    - `count`: "all"; "failures", requests that are answered with 400 or more; or a function of the answer (see
      Answered) that says whether the request counts. What does not count is given back.
    - `exempt_when`: a function of the request.

    The functions of the request may be coroutine functions.

    Needs StillroomMiddleware further out. Raises InvalidLimit. Redis away: each limit does what its `away` says.
    """
    declaration = declared(limits, by, cost, count, exempt_when)

    # An endpoint, too; by this name older Starlettes give a middleware its app.
    def put_on(app: E) -> E:
        if isinstance(app, type):
            made: Any = _limited_class(app, declaration)
        elif isinstance(app, BaseRoute):
            name = type(app).__name__
            raise InvalidLimit(
                app,
                f"limits are put on what a route leads to: {name}(path, limited(…)(endpoint)), or for an app "
                "Mount(path, app=limited(…)(app))",
            )
        elif not callable(app):
            meant = "; did you mean @limited(AUTH)?" if isinstance(app, HTTPConnection) else ""
            raise InvalidLimit(app, f"limits are put on a function, a class or an ASGI app{meant}")
        elif any(kind.__name__ == "APIRouter" for kind in type(app).__mro__):
            # The app would include it as it is, without what is around it.
            raise InvalidLimit(
                app,
                "a router of FastAPI takes limits as APIRouter(dependencies=[Depends(limited(…))]), with limited "
                "from stillroom.web.fastapi",
            )
        else:
            limit = LimitedApp if _is_app(app) else _limited_function
            made = limit(app, declaration)
        found: E = made
        return found

    put_on.__annotations__["app"] = _Endpoint
    setattr(put_on, MARK, (declaration,))  # a Middleware(limited(…)) is known by it
    return put_on


def exempt(endpoint: E) -> E:
    """Free an endpoint of FastAPI from the limits that its routers and its app put on it, and all its dependencies.

    What `@limited` puts on the endpoint itself counts all the same. What stands in front of the routing knows no
    endpoint: the middleware's table, and limits around an ASGI app.
    """
    return exempted(endpoint)


async def charge(
    connection: HTTPConnection, declaration: Limited, *, is_own: bool = False
) -> Decision | None:
    """Charge this request. Returns the denial, if it is one. Raises SettingsError without the middleware.

    `is_own`: the endpoint itself carries the limits.
    """
    scope = connection.scope
    endpoint = scope.get("endpoint")
    if RENDERING in scope or (is_exempt(endpoint) and not is_own):
        return None
    limiter, visit = _entered(scope)
    due = declaration.at_once(visit.client)
    if due is None:
        due = await run_async(declaration.of(_Here(connection, visit)))
    if due is None:
        return None
    name = str(getattr(scope.get("route"), "path", "") or getattr(endpoint, "__name__", ""))
    # By its id: an endpoint may be an object that can't be hashed.
    await limiter.charge(visit, due, name, id(endpoint or declaration))
    return visit.refused


async def check(connection: HTTPConnection, declaration: Limited, *, is_own: bool = False) -> None:
    """Charge this request. Raises LimitExceeded if it is over a limit, or what closes a websocket with 1008."""
    denial = await charge(connection, declaration, is_own=is_own)
    if denial is None:
        return
    scope = connection.scope
    if scope["type"] == "websocket":
        may_answer = ANSWERS_HANDSHAKES and can_answer(scope)
        if denial.banned or not may_answer:
            raise WebSocketException(POLICY_VIOLATION, _said(denial))
    handlers = scope.get("starlette.exception_handlers")
    if handlers:  # an app that has its own handler goes on to have it
        handlers[0].setdefault(LimitExceeded, _answered)
    raise LimitExceeded(denial, _entered(scope)[0].refusal(scope))


class LimitedApp:
    """An ASGI app behind limits. A preflight is let through: the app's own CORS layer answers it.

    A function has no such layer: it is an endpoint that answers OPTIONS itself, and is charged for a preflight too.
    So is a client whose last preflight no CORS layer has answered.
    """

    def __init__(self, app: Any, declaration: Limited) -> None:
        self.app: ASGIApp = app
        self._declaration = declaration
        setattr(self, MARK, (declaration,))
        self._is_endpoint = inspect.isroutine(app)
        self._unanswered = Unanswered()
        self._learned = Learned()

    @property
    def routes(self) -> list[Any]:
        """Return the app's routes."""
        return list(getattr(self.app, "routes", []))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            connection = HTTPConnection(scope)
            can_learn = self._is_preflight(connection)
            is_free = can_learn and not self._charges(scope)
            if not is_free and not await self._admits(connection, send):
                return
            if can_learn:
                send = self._watching(scope, send)
        await self.app(scope, receive, send)

    async def _admits(self, connection: HTTPConnection, send: Send) -> bool:
        """Return whether the request may go on. If not, it has been answered."""
        scope = connection.scope
        denial = await charge(connection, self._declaration)
        if denial is None:
            return True
        limiter = _entered(scope)[0]
        answer = limiter.refusal(scope)
        if scope["type"] == "websocket":
            await refuse(send, answer, can_answer(scope) and not denial.banned, POLICY_VIOLATION)
        else:
            # The app's CORS layer is behind the limits, and a page may read no answer that has not passed it.
            # A function has no such layer. Asked, it would do its work for a client that is refused.
            asks = not self._is_endpoint
            cors = await limiter.cors_within(self.app, self._learned, scope) if asks else []
            answered = answer._replace(headers=[*answer.headers, *cors])
            await _response(answered)(scope, _nothing, send)
        return False

    def _is_preflight(self, connection: HTTPConnection) -> bool:
        method = connection.scope.get("method", "GET")
        return not self._is_endpoint and is_preflight(method, connection.headers.get)

    def _charges(self, scope: Scope) -> bool:
        """Count a preflight of this client, and return whether it is charged."""
        return self._unanswered.charges(_entered(scope)[1].client, "", time.monotonic())

    def _watching(self, scope: Scope, send: Send) -> Send:
        """Return what passes the answer to a preflight on, and learns from it."""

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start":
                client = _entered(scope)[1].client
                headers = Headers(raw=[*message.get("headers", ())]).items()
                self._unanswered.learn(client, "", time.monotonic(), headers)
            await send(message)

        return watching


class _Here(Here):
    """The request as Starlette shows it."""

    async def user(self) -> str | None:
        session = self._visit.session
        if session is None:
            raise SettingsError(
                "a limit counts by user, and this request has no session: StillroomMiddleware needs sessions=True"
            )
        await session.load()  # type: ignore[attr-defined]
        return session.user_id


def _entered(scope: Scope) -> tuple[StillroomMiddleware, Visit]:
    try:
        return scope[LIMITER], scope[VISIT]
    except KeyError:
        raise SettingsError(
            "this endpoint is limited, and there is no StillroomMiddleware around it: "
            "app.add_middleware(StillroomMiddleware, room=room) comes behind the line that adds limits as a "
            "middleware, because the last one added is the outermost"
        ) from None


def _limited_function(endpoint: Any, declaration: Limited) -> Any:
    """Wrap a function that is charged before it is called, wherever the framework calls it from."""
    is_async = is_async_callable(endpoint)
    if not is_async and _yields(endpoint) and find_spec("fastapi"):
        return _limited_stream(endpoint, declaration)
    # Where the same decorator is further in, it wants the connection, too.
    passes_on = CONNECTION in inspect.signature(endpoint).parameters

    @functools.wraps(endpoint)
    async def charged(*args: Any, **kwargs: Any) -> Any:
        given = (kwargs.pop(CONNECTION, None), *args, *kwargs.values())
        connection = _connection_in(given, endpoint)
        await check(connection, declaration, is_own=True)
        if passes_on:
            kwargs[CONNECTION] = connection
        if is_async:
            return await endpoint(*args, **kwargs)
        answer = await run_in_threadpool(endpoint, *args, **kwargs)
        # A decorator in between may hide that it is a coroutine function.
        return await answer if inspect.isawaitable(answer) else answer

    if not is_async:
        # Whoever looks behind a decorator further out, as FastAPI does, is to see that this one is awaited.
        del charged.__wrapped__
    setattr(charged, MARK, (declaration, *carried(endpoint)))
    note_within(endpoint, charged, LOST)
    charged.__signature__ = _with_connection(endpoint)  # type: ignore[attr-defined]
    return charged


def _limited_stream(endpoint: Any, declaration: Limited) -> Any:
    """Wrap a generator. FastAPI calls it when its response begins, so a dependency charges: the first of all.

    A decorator may have made an endpoint of Starlette's of it, which is called in a thread, without dependencies.
    """
    from fastapi import Depends

    async def check_limits(connection: HTTPConnection) -> None:
        await check(connection, declaration, is_own=True)

    name = f"{CONNECTION}_{len(carried(endpoint))}"  # there may be several decorators

    @functools.wraps(endpoint)
    def charged(*args: Any, **kwargs: Any) -> Any:
        if name not in kwargs:
            connection = _connection_in((*args, *kwargs.values()), endpoint)
            from_thread.run(check_limits, connection)
        kwargs.pop(name, None)
        return endpoint(*args, **kwargs)

    setattr(charged, MARK, (declaration, *carried(endpoint)))
    note_within(endpoint, charged, LOST)
    first = inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[None, Depends(check_limits)],
    )
    signature = _meaning(endpoint)
    parameters = [first, *signature.parameters.values()]
    charged.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return charged


def _yields(endpoint: Any) -> bool:
    """Return whether a generator is behind an endpoint, which FastAPI takes for one then."""
    function = inspect.unwrap(endpoint)
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


def _connection_in(given: Iterable[Any], endpoint: Any) -> HTTPConnection:
    """Return the request or websocket among an endpoint's arguments. Raises SettingsError where there is none."""
    for one in given:
        if isinstance(one, HTTPConnection):
            return one
    raise SettingsError(f"{name_of(endpoint)} is limited, and is called without its request")


def _with_connection(endpoint: Any) -> inspect.Signature:
    """Return the endpoint's signature with a request, because FastAPI passes only what a signature names."""
    signature = _meaning(endpoint)
    known = [one for one in signature.parameters.values() if one.name != CONNECTION]
    last = [one for one in known if one.kind is inspect.Parameter.VAR_KEYWORD]
    wanted = inspect.Parameter(
        CONNECTION, inspect.Parameter.KEYWORD_ONLY, annotation=HTTPConnection
    )
    return signature.replace(parameters=[*[one for one in known if one not in last], wanted, *last])


def _meaning(endpoint: Any) -> inspect.Signature:
    """Return the endpoint's signature. Annotations that are texts mean what they mean in the endpoint's module.

    Before 0.124 FastAPI would look for their names in this one.
    """
    signature = inspect.signature(endpoint)
    names = getattr(inspect.unwrap(endpoint), "__globals__", {})
    parameters = signature.parameters.values()
    return signature.replace(
        parameters=[one.replace(annotation=_meant(one.annotation, names)) for one in parameters],
        return_annotation=_meant(signature.return_annotation, names),
    )


def _meant(annotation: Any, names: dict[str, Any]) -> Any:
    """Return what an annotation means, or the annotation where its names are known to type checkers alone."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))
    except Exception:
        return annotation


def _limited_class(endpoint: type, declaration: Limited) -> type:
    """Limit all methods of a class of endpoints (HTTPEndpoint, WebSocketEndpoint) together."""
    if not hasattr(endpoint, "dispatch"):
        raise InvalidLimit(endpoint.__name__, "it has no dispatch: put the limits on its methods")

    async def dispatch(self: Any) -> None:
        connection = (
            Request(self.scope) if self.scope["type"] == "http" else HTTPConnection(self.scope)
        )
        await check(connection, declaration, is_own=True)
        await endpoint.dispatch(self)

    marks = {MARK: (declaration, *carried(endpoint)), "dispatch": dispatch}
    told = {"__doc__": endpoint.__doc__, "__module__": endpoint.__module__}
    return type(endpoint.__name__, (endpoint,), {**told, **marks})


def _is_app(endpoint: Any) -> bool:
    """Return whether this is called as an ASGI app and not with a request."""
    if not inspect.isroutine(endpoint) and not isinstance(endpoint, functools.partial):
        return takes(endpoint, 3)  # an object may be an endpoint of FastAPI
    names = list(inspect.signature(endpoint).parameters)
    return names[:1] == ["scope"] or names[:2] == ["self", "scope"]


def _said(denial: Decision) -> str:
    """Return the reason in the few words that a close has room for."""
    return str(denial.problem().get("title", ""))


def _answered(_: object, refused: Exception) -> Response:
    assert isinstance(refused, LimitExceeded)
    return _response(refused.answer)


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers))


async def _nothing() -> Any:
    return {"type": "http.disconnect"}
