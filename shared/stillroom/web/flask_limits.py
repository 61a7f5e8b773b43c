"""Limits on views and blueprints of Flask: see flask.py."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flask import Blueprint, Flask, Request, Response, current_app, request, session
from werkzeug.exceptions import HTTPException, ServiceUnavailable, TooManyRequests

from stillroom.errors import InvalidLimit, LoadShed, SettingsError
from stillroom.limits import Decision, Limit
from stillroom.limits.limit import check_limits
from stillroom.limits.routes import Counted
from stillroom.misuse import explained, refuse_other
from stillroom.room import Stillroom
from stillroom.web.carriers import FLASK_EXTENSION, LOST, lost_views
from stillroom.web.cors import is_preflight
from stillroom.web.endpoints import Charger, until_sent
from stillroom.web.fetched import is_meant_in_environ
from stillroom.web.gate import Asked, Gate
from stillroom.web.limited import (
    MARK,
    By,
    Here,
    Limitation,
    Limited,
    When,
    carried,
    declared_in_threads,
    exempted,
    is_exempt,
)
from stillroom.web.placing import checked_function, checked_room
from stillroom.web.problem import Answer, shed
from stillroom.web.refusal import Render
from stillroom.web.request_session import RequestSession
from stillroom.web.visit import RENDERING, VISIT, Visit
from stillroom.web.within import budgeted
from stillroom.within import note_within

P = TypeVar("P")
V = TypeVar("V")
NO_VIEW: Any = object()  # what a decorator is given that stands in the place of a view
TOLD = "stillroom.told"  # in the environ: the visit that the response tells of
HELD = "stillroom.held"  # in the environ: the visit, while it holds what is to be given back
HERE = "_stillroom_visit"  # on the request: flask.g may be shared by several

log = logging.getLogger("stillroom.web")


class LimitExceeded(HTTPException):
    """A request was refused at its view: 429 or 503, problem+json.

    An app answers in its own words with `@app.errorhandler(429)`, `@app.errorhandler(503)`, or for both
    `@app.errorhandler(LimitExceeded)`; what its client is told of limits is added to that answer. `decision` says
    what there is to say.
    """

    def __init__(self, decision: Decision, answer: Answer) -> None:
        response = Response(answer.body, answer.status, answer.headers)
        super().__init__(decision.problem().get("detail"), response)
        self.code = answer.status
        self.decision = decision


class _Denied(LimitExceeded, TooManyRequests):
    """A handler for 429 is found by its class."""


class _Undecided(LimitExceeded, ServiceUnavailable):
    """A handler for 503 is found by its class."""


@explained
class StillroomLimits:
    """Keeps the limits of an app's views: `StillroomLimits(app, room)`, or `init_app(app, room)` later.

    A request is charged for the view it came to, by Flask's own routing, before all other `before_request`
    functions: what the view carries, its blueprints, and, if none of these says anything, `default`: as for what
    is not found. The session is read in the same round trip, where the view's last request looked at it.

    `exempt_when`: a function of the request, such as `lambda request: request.headers.get("X-Probe") == PROBE`.
    `render` answers a refusal in the app's own words (see stillroom.web.Refusal); Flask's errorhandlers can, too.
    Raises SettingsError for an AsyncStillroom.
    """

    def __init__(
        self,
        app: Flask | None = None,
        room: Stillroom | None = None,
        *,
        default: Sequence[Limit] = (),
        exempt_when: Callable[[Any], bool] | None = None,
        render: Render | None = None,
    ) -> None:
        self.default = check_limits(default)  # for views that carry none
        self._default = (Limited(self.default),) if self.default else ()
        self._exempt_when = checked_function(
            "exempt_when", exempt_when, "whether no view charges it"
        )
        self._render = render
        if app is not None:
            self.init_app(app, room)

    def init_app(self, app: Flask, room: Stillroom | None) -> None:
        """Keep this app's limits in this room."""
        refuse_other("app", app, Flask, "a Flask app; a blueprint has limited(…)(blueprint)")
        room = checked_room(room, Stillroom, type(self).__name__)
        gate = Gate(room, render=self._render)
        gate.reads_headers = bool(room.settings.trusted_proxies)
        self._charger = Charger(gate, room.state)
        app.extensions[FLASK_EXTENSION] = self
        answer_shed_loads(app)
        _answer_late_refusals(app)
        letting_go = _LettingGo(_telling(app.wsgi_app), self._charger)
        app.wsgi_app = budgeted(room, letting_go)  # type: ignore[method-assign]
        self._has_told = False
        # By app and endpoint: the view, and what it and its blueprints declare. A class declares by method, too.
        self._declared: dict[tuple[Flask, str], tuple[Any, list[Limited]]] = {}
        # In front of what others have registered: they may be dear, and look at the session.
        app.before_request_funcs.setdefault(None, []).insert(0, self._begin)
        app.after_request_funcs.setdefault(None, []).insert(0, self._end)  # called last

    def charge(self, declarations: Sequence[Limited]) -> None:
        """Charge the request for this. Raises LimitExceeded."""
        asked = _now(request)
        view = _now(current_app).view_functions.get(asked.endpoint or "")
        self._charge(self._visit(asked), asked, view, declarations)

    def _charge(
        self, visit: Visit, asked: Request, view: Any, declarations: Sequence[Limited]
    ) -> None:
        rule = asked.url_rule
        name = rule.rule if rule is not None else asked.path
        # By its id: a view may be an object that can't be hashed.
        key, here = id(view), _Here(asked, visit)
        is_admitted = self._charger.admits(visit, declarations, here, name, key)
        if visit.is_holding and asked.environ.get(VISIT) is not visit:
            asked.environ[HELD] = visit, math.inf  # the middleware around the app gives back itself
        if not is_admitted:
            raise self._refusal(visit)

    def _begin(self) -> None:
        app, asked = _now(current_app), _now(request)
        if not self._has_told:
            self._has_told = True
            for name in lost_views(app):
                log.warning("the view %s %s", name, LOST)
        visit = self._visit(asked)
        view = app.view_functions.get(asked.endpoint or "")
        is_free = is_exempt(view)
        declarations = self._declared_for(app, asked, view) or (() if is_free else self._default)
        visit.exempt = (
            RENDERING in asked.environ
            or _is_answered_by_flask(asked)
            or (is_free and not declarations)
            or bool(self._exempt_when and self._exempt_when(request))
        )
        if declarations and visit.refused is None:
            self._charge(visit, asked, view, declarations)

    def _end(self, response: Response) -> Response:
        asked = _now(request)
        visit: Visit | None = getattr(asked, HERE, None)
        if visit is None:
            return response
        around: Visit | None = asked.environ.get(VISIT)
        if around is visit:  # the middleware around the app ends and tells it
            self._charger.gate.learn(visit)
            return response
        unknown = visit.session.unknown_token if visit.session is not None else None
        self._charger.end(visit, response.status_code, response.headers, unknown)
        if response.is_sequence:  # its client may send the next request when it has this body
            self._charger.let_go(visit)
        elif HELD in asked.environ:
            asked.environ[HELD] = visit, response.content_length or math.inf
        if visit.decisions:
            asked.environ[TOLD] = visit
        return response

    def _visit(self, asked: Request) -> Visit:
        """Return the visit of this request, begun here or by the middleware around the app."""
        known: Visit | None = getattr(asked, HERE, None)
        if known is not None:
            return known
        environ = asked.environ
        visit = self._charger.gate.own(environ.get(VISIT))
        if visit is None:
            headers = list(asked.headers) if self._charger.gate.reads_headers else []
            path = asked.root_path + asked.path
            is_meant = functools.partial(is_meant_in_environ, environ)
            seen = Asked(asked.method, path, asked.remote_addr, headers)
            visit = self._charger.gate.visit(seen, None, is_meant)
        own = _now(session)
        if isinstance(own, RequestSession):
            visit.session = own
        setattr(asked, HERE, visit)
        return visit

    def _declared_for(self, app: Flask, asked: Request, view: Any) -> list[Limited]:
        """Return the limits of the request's blueprints and view, outermost first."""
        place = app, asked.endpoint or ""
        known, found = self._declared.get(place, (None, []))
        if known is None or known is not view:
            found = _declared_for(app, asked, view)
            if view is not None and not hasattr(view, "view_class"):
                self._declared[place] = view, found
        return found

    def _refusal(self, visit: Visit) -> LimitExceeded:
        assert visit.refused is not None
        answer = self._charger.gate.refusal(visit, list(request.headers))
        kind = _Denied if answer.status == _Denied.code else _Undecided
        # Flask looks for a handler of the status first, which is meant for others where there is one for refusals.
        handlers = [current_app.error_handler_spec[of][None] for of in (*request.blueprints, None)]
        has_own = any(LimitExceeded in known for known in handlers)
        return (LimitExceeded if has_own else kind)(visit.refused, answer)


@explained
def limited(
    *limits: Limitation,
    by: By = None,
    cost: int | Callable[[Any], int] = 1,
    count: Counted = "all",
    exempt_when: When = None,
) -> Callable[[V], V]:
    """Put limits on a view or a blueprint: `@limited(AUTH, count="failures")` below `@app.post("/login")`.

    On a function, sync or async; on a class of views, its `decorators`, or a method of it; on a Blueprint:
    `limited(API, by="user")(blueprint)`.

    - `limits`: Limits, or one function of the request that returns them (tiers). A limit's name is its bucket: all
      views that carry the same limit share it.
    - `by`: "ip"; "user", the session's, which is read first, in a round trip of its own; "ip&user";
      `Header("X-API-Key")`; or a function of the request that returns a name, or a mapping of kinds to names. A
      request without a name counts by address. Default: as each limit says.
    - `cost`: a number or a function of the request.
    - `count`: "all"; "failures", requests that are answered with 400 or more; or a function of the answer (see
      Answered) that says whether the request counts. What does not count is given back.
    - `exempt_when`: a function of the request.

    Needs StillroomLimits(app, room). Raises InvalidLimit. Redis away: each limit does what its `away` says.
    """
    declaration = declared_in_threads(limits, by, cost, count, exempt_when)

    def put_on(view: V = NO_VIEW, /, **parameters: Any) -> V:
        if view is NO_VIEW:  # Flask calls it as a view, with the fields of the path
            what = f"with {', '.join(parameters)}" if parameters else "without parameters"
            raise InvalidLimit(
                limits[0], f"it was called as a view, {what}; did you mean @limited(AUTH)?"
            )
        if isinstance(view, Blueprint):
            setattr(view, MARK, (declaration, *carried(view)))
            view.before_request(lambda: _charge_for_blueprint(declaration))
            return view
        if isinstance(view, Flask) or not callable(view):
            meant = (
                "StillroomLimits(app, room, default=[…])" if isinstance(view, Flask) else "a view"
            )
            raise InvalidLimit(
                view, f"limits are put on a view or a blueprint; did you mean {meant}?"
            )
        made: Any = (
            _limited_class(view, declaration)
            if isinstance(view, type)
            else _limited(view, declaration)
        )
        found: V = made
        return found

    return put_on


def answer_shed_loads(app: Flask) -> None:
    """Have a load that found no place be a 503, unless the app has its own answer. Flask would make a 500 of it."""
    if LoadShed not in app.error_handler_spec[None][None]:
        app.register_error_handler(LoadShed, _answer_shed)


def _answer_shed(error: LoadShed) -> Response:
    answer = shed(error)
    return Response(answer.body, answer.status, answer.headers)


def _answer_late_refusals(app: Flask) -> None:
    """Have Flask answer LimitExceeded from an error handler or an `after_request` function as it does from a view.

    Flask itself answers with a 500.
    """
    handle = app.handle_exception

    def handled(e: Exception) -> Any:
        if not isinstance(e, LimitExceeded):
            return handle(e)
        try:
            answer = app.handle_user_exception(e)
        except Exception as error:  # its handler is refused, too, or fails
            return handle(error)
        return app.finalize_request(answer, from_error_handler=True)

    app.handle_exception = handled  # type: ignore[method-assign]


def exempt(view: V) -> V:
    """Free a view, or a class of views, from the limits of its blueprints, and from the default.

    What `@limited` puts on the view itself counts all the same, and so does the middleware's table.
    """
    return exempted(view)


class _Here(Here):
    """The request as Flask shows it."""

    def user(self) -> str | None:
        """Return the user of our session, or in another kind of session the user that Flask-Login keeps there."""
        own = self._visit.session
        if own is not None:
            return own.user_id
        user = session.get("_user_id")
        return None if user is None else str(user)


def _telling(app: Any) -> Any:
    """Return the WSGI app, whose responses tell how their clients stand.

    Not in Flask's own response: Werkzeug looks through each header that is added there, and again when it sends it.
    """

    def called(environ: dict[str, Any], start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            visit: Visit | None = environ.pop(TOLD, None)
            if visit is not None:
                of_page = bool(environ.get("HTTP_ORIGIN"))
                told, replaced = visit.telling(headers, is_of_page=of_page)
                if replaced:
                    headers = [pair for pair in headers if pair[0].lower() not in replaced]
                headers = [*headers, *told]
            return start_response(status, headers, *exc_info)

        return app(environ, start)

    return called


class _LettingGo:
    """The WSGI app, each request of which gives back what it holds, however it ends.

    Flask calls no `after_request` function where an error is propagated, or where one of them raises.
    """

    def __init__(self, app: Any, charger: Charger) -> None:
        self._app = app
        self._charger = charger

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        try:
            body = self._app(environ, start_response)
        except BaseException:
            if (held := environ.pop(HELD, None)) is not None:
                self._charger.let_go(held[0])
            raise
        visit, length = environ.pop(HELD, (None, math.inf))
        if visit is None or not visit.is_holding:
            return body
        return _Held(body, length, functools.partial(self._charger.let_go, visit))


class _Held:
    """A body that is still to be sent, for which a place in flight is held."""

    def __init__(self, body: Any, length: float, let_go: Callable[[], None]) -> None:
        self._body = body
        self._length = length
        self._let_go = let_go

    def __iter__(self) -> Iterator[bytes]:
        return until_sent(self._body, self._length, self._let_go)

    def close(self) -> None:
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._let_go()


def _now(proxy: P) -> P:
    """Return what one of Flask's proxies stands for now. Each use of the proxy itself would look for it again."""
    found: P = proxy._get_current_object()  # type: ignore[attr-defined]
    return found


def _extension() -> StillroomLimits:
    found: StillroomLimits | None = current_app.extensions.get(FLASK_EXTENSION)
    if found is None:
        raise SettingsError("a view is limited, and the app has no StillroomLimits(app, room)")
    return found


def _charge_once(declaration: Limited) -> None:
    """Charge the request, unless that was done before its view was called. Raises LimitExceeded."""
    visit: Visit | None = getattr(_now(request), HERE, None)
    if visit is None or not visit.has_charged(declaration):
        _extension().charge([declaration])


def _charge_for_blueprint(declaration: Limited) -> None:
    """Charge the request for the blueprint of its view, unless that is free from it. Raises LimitExceeded."""
    view = _now(current_app).view_functions.get(_now(request).endpoint or "")
    if not is_exempt(view):
        _charge_once(declaration)


def _declared_for(app: Flask, asked: Request, view: Any) -> list[Limited]:
    outer = () if is_exempt(view) else reversed(asked.blueprints)
    blueprints = [app.blueprints[name] for name in outer]
    kind = getattr(view, "view_class", None)
    method = getattr(kind, "get" if asked.method == "HEAD" else asked.method.lower(), None)
    carriers = [*blueprints, kind, view, method]
    return [one for carrier in carriers for one in carried(carrier)]


def _is_answered_by_flask(asked: Request) -> bool:
    """Return whether this is a preflight that does not reach its view."""
    if asked.method != "OPTIONS" or not is_preflight(asked.method, asked.headers.get):
        return False
    rule = asked.url_rule
    return rule is None or bool(getattr(rule, "provide_automatic_options", False))


def _limited(view: Any, declaration: Limited) -> Any:
    """Return the view with its limits. It is charged here unless it was already, wherever it is called from."""
    if inspect.iscoroutinefunction(view):

        @functools.wraps(view)
        async def charged_async(*args: Any, **kwargs: Any) -> Any:
            _charge_once(declaration)
            return await view(*args, **kwargs)

        made: Any = charged_async
    else:

        @functools.wraps(view)
        def charged(*args: Any, **kwargs: Any) -> Any:
            _charge_once(declaration)
            return view(*args, **kwargs)

        made = charged
    setattr(made, MARK, (declaration, *carried(view)))
    note_within(view, made, LOST)
    return made


def _limited_class(view: type, declaration: Limited) -> type:
    """Limit all methods of a class of views together."""
    if not hasattr(view, "dispatch_request"):
        raise InvalidLimit(
            view.__name__, "it has no dispatch_request: put the limits on its methods"
        )
    guarded = _limited(view.dispatch_request, declaration)
    told = {"__doc__": view.__doc__, "__module__": view.__module__}
    marks = {MARK: (declaration, *carried(view)), "dispatch_request": guarded}
    return type(view.__name__, (view,), {**told, **marks})
