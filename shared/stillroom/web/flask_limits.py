"""Limits on views and blueprints of Flask: see flask.py."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flask import Blueprint, Flask, Response, current_app, g, request, session
from werkzeug.exceptions import HTTPException

from stillroom.errors import InvalidLimit, SettingsError
from stillroom.limits import Decision, Limit
from stillroom.limits.limit import check_limits
from stillroom.limits.routes import Counted
from stillroom.misuse import explained
from stillroom.room import Stillroom
from stillroom.web.carriers import FLASK_EXTENSION, LOST, WITHIN, lost_views
from stillroom.web.cors import EXPOSE, exposing, is_preflight
from stillroom.web.ending import lacking
from stillroom.web.endpoints import Charger
from stillroom.web.fetched import is_meant_in_environ
from stillroom.web.gate import Asked, Gate
from stillroom.web.limited import EXEMPT, MARK, By, Limitation, Limited, When, carried, declared
from stillroom.web.placing import checked_room
from stillroom.web.problem import Answer
from stillroom.web.refusal import Render
from stillroom.web.request_session import RequestSession
from stillroom.web.visit import RENDERING, Visit
from stillroom.web.within import budgeted
from stillroom.web.wsgi import VISIT

V = TypeVar("V")
HERE = "_stillroom_visit"  # on flask.g

log = logging.getLogger("stillroom.web")


class LimitExceeded(HTTPException):
    """A request was refused at its view: 429 or 503, problem+json.

    An app answers in its own words with `@app.errorhandler(429)`, or `@app.errorhandler(LimitExceeded)`; what its
    client is told of limits is added to that answer. `decision` says what there is to say.
    """

    def __init__(self, decision: Decision, answer: Answer) -> None:
        response = Response(answer.body, answer.status, answer.headers)
        super().__init__(decision.problem().get("detail"), response)
        self.code = answer.status
        self.decision = decision


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
        self._exempt_when = exempt_when
        self._render = render
        if app is not None:
            self.init_app(app, room)

    def init_app(self, app: Flask, room: Stillroom | None) -> None:
        """Keep this app's limits in this room."""
        room = checked_room(room, Stillroom, type(self).__name__)
        gate = Gate(room, render=self._render)
        gate.reads_headers = bool(room.settings.trusted_proxies)
        self._charger = Charger(gate, room.state)
        app.extensions[FLASK_EXTENSION] = self
        app.wsgi_app = budgeted(room, app.wsgi_app)  # type: ignore[method-assign]
        self._has_told = False
        # In front of what others have registered: they may be dear, and look at the session.
        app.before_request_funcs.setdefault(None, []).insert(0, self._begin)
        app.after_request_funcs.setdefault(None, []).insert(0, self._end)  # called last

    def charge(self, declarations: Sequence[Limited]) -> None:
        """Charge the request for this. Raises LimitExceeded."""
        visit = self._visit()
        rule, view = request.url_rule, current_app.view_functions.get(request.endpoint or "")
        name = rule.rule if rule is not None else request.path
        key = view if view is not None else self
        if not self._charger.admits(visit, declarations, _Here(visit), name, key):
            raise self._refusal(visit)

    def _begin(self) -> None:
        if not self._has_told:
            self._has_told = True
            for name in lost_views(current_app):
                log.warning("the view %s %s", name, LOST)
        visit = self._visit()
        view = current_app.view_functions.get(request.endpoint or "")
        visit.exempt = (
            RENDERING in request.environ
            or _is_answered_by_flask()
            or getattr(view, EXEMPT, False)
            or bool(self._exempt_when and self._exempt_when(request))
        )
        if visit.refused is None and (declarations := _declared_for(view) or self._default):
            self.charge(declarations)

    def _end(self, response: Response) -> Response:
        visit: Visit | None = getattr(g, HERE, None)
        if visit is None:
            return response
        around: Visit | None = request.environ.get(VISIT)
        if around is visit:  # the middleware around the app ends and tells it
            self._charger.gate.learn(visit)
            return response
        self._charger.end(visit, response.status_code, list(response.headers))
        if visit.is_holding:
            response.call_on_close(lambda: self._charger.let_go(visit))
        if visit.decisions:
            told = list(visit.headers().items())
            response.headers.extend(lacking(response.headers, told))
            if request.headers.get("Origin") and (exposed := exposing(list(response.headers))):
                response.headers[EXPOSE.title()] = exposed
        return response

    def _visit(self) -> Visit:
        """Return the visit of this request, begun here or by the middleware around the app."""
        known: Visit | None = getattr(g, HERE, None)
        if known is not None:
            return known
        visit: Visit | None = request.environ.get(VISIT)
        if visit is None:
            headers = list(request.headers) if self._charger.gate.reads_headers else []
            path = request.root_path + request.path
            asked = Asked(request.method, path, request.remote_addr, headers)
            is_meant = functools.partial(is_meant_in_environ, request.environ)
            visit = self._charger.gate.visit(asked, None, is_meant)
        own = session._get_current_object()  # type: ignore[attr-defined]
        if isinstance(own, RequestSession):
            visit.session = own
        setattr(g, HERE, visit)
        return visit

    def _refusal(self, visit: Visit) -> LimitExceeded:
        assert visit.refused is not None
        answer = self._charger.gate.refusal(visit, list(request.headers))
        return LimitExceeded(visit.refused, answer)


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

    `limits`: Limits, or one function of the request that returns them (tiers). A limit's name is its bucket: all
    views that carry it share it. `by`: "ip"; "user", the session's, which is read first, in a round trip of its
    own; "ip&user"; Header("X-API-Key"); or a function of the request that returns a name, or a mapping of kinds to
    names. Who has no name is counted by address. None: as each limit says. `cost`: a number or a function of the
    request. `count`: "all"; "failures", those answered with 400 or more; or a function of the answer (see Answered)
    that says whether it counts. What does not is given back. `exempt_when`: a function of the request.

    Needs StillroomLimits(app, room). Raises InvalidLimit for what can't be meant. Redis away: each limit does
    what its `away` says.
    """
    declaration = declared(limits, by, cost, count, exempt_when)

    def put_on(view: V) -> V:
        if isinstance(view, Blueprint):
            setattr(view, MARK, (declaration, *carried(view)))
            view.before_request(lambda: _extension().charge([declaration]))
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


def exempt(view: V) -> V:
    """Free a view from all limits but those of the middleware's table: its blueprints', and the default."""
    setattr(view, EXEMPT, True)
    return view


class _Here:
    """The request as Flask shows it."""

    def __init__(self, visit: Visit) -> None:
        self.request = request._get_current_object()  # type: ignore[attr-defined]
        self._visit = visit

    def address(self) -> str:
        return self._visit.client

    def header(self, name: str) -> str | None:
        value: str | None = self.request.headers.get(name)
        return value

    def user(self) -> str | None:
        """Return the user of our session, or in another kind of session the user that Flask-Login keeps there."""
        own = self._visit.session
        if own is not None:
            return own.user_id
        user = session.get("_user_id")
        return None if user is None else str(user)


def _extension() -> StillroomLimits:
    found: StillroomLimits | None = current_app.extensions.get(FLASK_EXTENSION)
    if found is None:
        raise SettingsError("a view is limited, and the app has no StillroomLimits(app, room)")
    return found


def _declared_for(view: Any) -> list[Limited]:
    """Return the limits of the request's blueprints and view, outermost first."""
    blueprints = [current_app.blueprints[name] for name in reversed(request.blueprints)]
    kind = getattr(view, "view_class", None)
    method = getattr(kind, "get" if request.method == "HEAD" else request.method.lower(), None)
    carriers = [*blueprints, kind, view, method]
    return [one for carrier in carriers for one in carried(carrier)]


def _is_answered_by_flask() -> bool:
    """Return whether this is a preflight that does not reach its view."""
    if not is_preflight(request.method, request.headers.get):
        return False
    rule = request.url_rule
    return rule is None or bool(getattr(rule, "provide_automatic_options", False))


def _limited(view: Any, declaration: Limited) -> Any:
    """Return the view with its limits. It is charged here unless it was already, wherever it is called from."""
    if inspect.iscoroutinefunction(view):

        @functools.wraps(view)
        async def charged_async(*args: Any, **kwargs: Any) -> Any:
            _extension().charge([declaration])
            return await view(*args, **kwargs)

        made: Any = charged_async
    else:

        @functools.wraps(view)
        def charged(*args: Any, **kwargs: Any) -> Any:
            _extension().charge([declaration])
            return view(*args, **kwargs)

        made = charged
    setattr(made, MARK, (declaration, *carried(view)))
    with contextlib.suppress(AttributeError):  # of a bound method
        setattr(view, WITHIN, True)
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
