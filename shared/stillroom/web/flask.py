"""Flask: its own `session`, kept by the room, and limits on views and blueprints.

app.session_interface = StillroomSessions(room)
StillroomLimits(app, room)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial, wraps
from operator import itemgetter
from typing import Any, TypeVar, cast

from flask import Flask, Request, Response, abort, current_app, g, has_app_context, request
from flask import session as flasks_session
from flask.sessions import SessionInterface, SessionMixin

from stillroom.cache.cached import UNCACHED
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    SessionConflict,
    SessionEnded,
    SessionNotLoaded,
    SessionStoreUnavailable,
    SettingsError,
    StillroomError,
    in_code,
)
from stillroom.misuse import explained
from stillroom.operation import Operation
from stillroom.room import Stillroom
from stillroom.sessions import LONGEST_S, Session
from stillroom.web.carriers import UNASKED, lost_views
from stillroom.web.cors import kept
from stillroom.web.ending import ended, ending
from stillroom.web.flask_limits import LimitExceeded, StillroomLimits, exempt, limited
from stillroom.web.headers import varies
from stillroom.web.placing import checked_cookie, checked_room, checked_view
from stillroom.web.problem import Answer, failed
from stillroom.web.request_session import Login, RequestSession, WebSession
from stillroom.web.session_cookie import SAME_SITE, SessionCookie
from stillroom.web.session_data import Change
from stillroom.web.wsgi import ALONG
from stillroom.within import note_within

log = logging.getLogger("stillroom.web")

View = TypeVar("View", bound=Callable[..., Any])

USER = "_user_id"  # where Flask-Login keeps the user
FRESH = "_fresh"  # … and whether by a password, not by its "remember me" cookie
PERMANENT = "_permanent"
FLASHES = "_flashes"
# Flask's defaults: an app with these has set nothing.
FLASKS_NAME, FLASKS_LIFETIME = "session", 31 * 86_400
OWN = SessionCookie()
# On Flask.handle_exception: it knows of sessions that can't be read.
ANSWERS = "__stillroom_answers__"
# Where werkzeug's test client says that it keeps the context, for the test to look into when the response is over.
KEPT_OPEN = "werkzeug.debug.preserve_context"

__all__ = [
    "FlaskSession",
    "LimitExceeded",
    "StillroomLimits",
    "StillroomSessions",
    "exempt",
    "fresh",
    "limited",
    "session",
]


class FlaskSession(WebSession, SessionMixin):
    """`flask.session`: a WebSession, so that it also has `login`, `logout`, `renew`, `confirm` and `user_id`.

    It is read by the first look, and saved where something changed, in a list or dict too, whether or not somebody
    said `modified`. `clear()` is a logout, as it is in Flask. Who Flask-Login logs in (`_user_id`) is the session's
    user, and each login gets a new token.
    """

    accessed = False  # Flask says so when somebody has used `flask.session`
    _app: Flask
    _along: RequestSession | None = None  # the middleware's, which it may have read with the limits
    _may_be_lost = frozenset({FLASHES, PERMANENT})
    # It is to live for another time: another session, with the same in it.
    _has_another_life = False
    _has_another_cookie = False  # it is renewed for another lifetime, and for nothing else
    _is_said_modified = False
    _follows_flask_login = False  # whether Flask-Login names the user

    @property
    def permanent(self) -> bool:
        """Return whether the cookie outlives the browser. False unless somebody has set it, as in Flask."""
        return bool(self.get(PERMANENT, False))

    @permanent.setter
    def permanent(self, value: bool) -> None:
        if self.permanent != bool(value):
            self[PERMANENT] = bool(value)

    @property
    def modified(self) -> bool:
        """Return whether the request has changed the session. The app may set this, and need not."""
        return self._is_said_modified or self.has_changed

    @modified.setter
    def modified(self, value: bool) -> None:
        self._is_said_modified = bool(value)

    @property
    def new(self) -> bool:  # type: ignore[override]
        """Return whether there was no session before this request."""
        return self.found is None

    def _fail(self, error: StillroomError) -> None:
        super()._fail(error)
        _answer_failures(self._app)

    def _begin_login(self, login: Login) -> None:
        """Begin a login of the session, which wins over Flask-Login's in the same request."""
        if self._follows_flask_login:
            self._login, self._follows_flask_login = None, False
        super()._begin_login(login)

    def is_fresh(self, seconds: Duration) -> bool:
        """See WebSession.is_fresh. Who Flask-Login only remembers is not fresh."""
        return self.get(FRESH, True) is not False and super().is_fresh(seconds)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == PERMANENT and not value and key not in self:
            return  # it is not, and that alone begins no session
        confirms = key == FRESH and value is True and self.get(FRESH) is False
        if key == USER:
            self._follow(value)
        super().__setitem__(key, value)
        if confirms:
            self.confirm()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        if key == USER:
            self._follow(None)

    def mutate(self, change: Change) -> None:
        """See WebSession.mutate. A change of Flask-Login's user is a login, or a logout, as anywhere else."""
        before = self._look().get(USER)
        super().mutate(change)
        user_id = self._look().get(USER)
        if user_id != before:
            self._follow(user_id)
            if user_id is not None:  # a login has dropped it with another user's data
                super().__setitem__(USER, user_id)

    def _follow(self, user_id: Any) -> None:
        """Log in whom Flask-Login's login_user() or its "remember me" cookie names; None: log out."""
        if self._login is not None and not self._follows_flask_login:
            return
        if user_id is not None:
            self._log_in(str(user_id))
        elif self.user_id is not None:
            # The rest of the data belongs to no user: it begins an anonymous session.
            self._login, self._is_ended, self._follows_flask_login = None, True, False

    def _log_in(self, user_id: str) -> None:
        before, changed = self.user_id, (self._changed | self._mutated) - {USER}
        kept = {key: self[key] for key in changed if key in self}
        super().login(user_id)
        self._follows_flask_login = True
        if before not in (None, user_id):
            self.update(kept)

    def _settle(self) -> None:
        # Also for who looks when it is written.
        self._is_said_modified = self._is_said_modified or self._has_acted
        if self._is_ended and self._data and self._data.keys() == {PERMANENT}:
            self._data.clear()  # how long nothing is to be kept
        changed = self._changed | self._gone | self._mutated
        if self._login and self._follows_flask_login:
            is_fresh = self.get(FRESH, True) is not False
            self._login = Login(self._login.user_id, {"fresh": is_fresh})
        elif self._found is None or self._login or self._is_ended or PERMANENT not in changed:
            return
        elif self._has_lifetime:
            self._has_another_life = True
        elif not self._is_renewed:
            self._is_renewed = self._has_another_cookie = True  # for longer, or for less

    def _may_write(self) -> bool:
        return not self._touches or super()._may_write()

    def _writing(self) -> Operation[str | None]:
        if self._has_another_life:
            return (yield from self._beginning())
        try:
            cookie = yield from super()._writing()
        except (SessionEnded, SessionConflict):
            # Of several requests at once, each of which sets `permanent` alone, the first one has set it.
            if self._has_another_cookie and self._unwritten() == {PERMANENT}:
                return None
            raise
        found = self._found
        if self._token is None or found is None or self._login or self._is_ended:
            return cookie
        if self._is_emptied(found):
            is_gone = yield from self._body.log_out(
                self._token, if_empty=True, asked_us=self._asked_us
            )
            return self._cookie.clear() if is_gone else cookie
        if self._touches or self.permanent:
            return cookie
        if found.read_at - found.last_seen >= self._body.settings.session_touch:
            yield from self._body.touch(self._token)
        return cookie

    def _unwritten(self) -> set[str]:
        # What was removed is there again, where the session lives on under another request's token.
        removed = self._gone if self._has_another_life or self._has_another_cookie else set[str]()
        return super()._unwritten() | removed

    def _begun(self, fields: Mapping[str, Any]) -> Operation[Session[Any]]:
        if not self._has_another_life:
            return (yield from super()._begun(fields))
        assert self._token is not None
        assert self._found is not None
        found = self._found
        about: Mapping[str, Any] = {"tags": found.tags, "meta": found.meta, "fresh": False}
        given = {**about, **self._options()}
        return (yield from self._body.succeed(self._token, found.user_id, fields, **given))

    def _is_emptied(self, found: Session[Any]) -> bool:
        """Return whether an anonymous session is empty, so that Flask forgets it."""
        has_changed = bool(self._gone or self._mutated)
        return has_changed and not self._data and found.user_id is None and not self._is_renewed

    def _change(self) -> None:
        if not self._is_written or KEPT_OPEN not in self._request:
            super()._change()

    def _dropped_at_login(self) -> tuple[str, ...]:
        field = self._app.config.get("WTF_CSRF_FIELD_NAME")
        names = {*super()._dropped_at_login(), *([field] if field else ())}
        for name in names if has_app_context() else ():
            g.pop(name, None)  # Flask-WTF remembers it for the request
        return tuple(names)

    @property
    def _has_lifetime(self) -> bool:
        """Return whether PERMANENT_SESSION_LIFETIME was set."""
        return self._app.permanent_session_lifetime.total_seconds() != FLASKS_LIFETIME

    def _options(self) -> dict[str, Any]:
        if not self.permanent or not self._has_lifetime:
            return {}
        lifetime = min(lifetime_of(self._app), LONGEST_S)
        return {
            "idle": lifetime,
            "absolute": max(lifetime, self._body.settings.session_absolute),
        }

    def _kept_for(self, made: Session[Any]) -> float | None:
        return super()._kept_for(made) if self.permanent else None


# `flask.session`, with its type: a type checker does not know that it has `login`.
session = cast(FlaskSession, flasks_session)


@explained
class StillroomSessions(SessionInterface):
    """Keeps Flask's sessions in Redis.

    The cookie is `__Host-sid`, Secure and SameSite=Lax, for this host alone. What Flask's settings say of it
    holds: SESSION_COOKIE_NAME (then the cookie is Secure only if SESSION_COOKIE_SECURE says so), _DOMAIN and _PATH
    (then it is `__Secure-sid`), _HTTPONLY, _SAMESITE, _PARTITIONED. `cookie` says it all at once, and goes before
    them. A session lives as the room's settings say; a permanent one for PERMANENT_SESSION_LIFETIME, where that is
    set, up to 366 days. SESSION_REFRESH_EACH_REQUEST=False: to look at a permanent session does not keep it alive.
    A response of 5xx saves nothing. Redis away: the request that looks is answered with 503, the cookie untouched.
    Raises SettingsError for an AsyncStillroom.
    """

    def __init__(self, room: Stillroom, *, cookie: SessionCookie | None = None) -> None:
        self._room = checked_room(room, Stillroom, type(self).__name__)
        self._cookie = checked_cookie(cookie)
        self._cookies: dict[tuple[Any, ...], SessionCookie] = {}
        self._has_told = False

    def open_session(self, app: Flask, request: Request) -> FlaskSession:
        """Flask's first step in each request. Nothing is read yet."""
        if not self._has_told:
            self._has_told = True
            for why in (UNASKED, UNCACHED):
                for name in lost_views(app, why):
                    log.warning("the view %s %s", name, why)
        cookie = self._cookie or self.cookie_of(app)
        environ = request.environ
        token = cookie.read(environ.get("HTTP_COOKIE", ""))
        body, driver = self._room.operations.sessions, self._room.state
        opened = FlaskSession(body, driver, cookie, token, environ)
        opened._app = app
        opened._touches = app.config["SESSION_REFRESH_EACH_REQUEST"]
        # Taken once: each event of a socket (Flask-SocketIO) opens a session, with the environ of its handshake.
        if opened._touches and (along := environ.pop(ALONG, None)) is not None:
            opened._along = along
            opened.adopt(along)
        return opened

    def save_session(self, app: Flask, session: Any, response: Response) -> None:
        """Flask's last step: the session is written, or the response becomes one that says why not."""
        environ, headers = session._request, response.headers
        end = ended(session, headers)
        if end is None:
            act = ending(session, response.status_code, headers, environ["REQUEST_METHOD"])
            end = self._room.state.run(act)
        if session._along is not None and session.is_looked_at:
            session._along.taken_by = session.cookie
        if end.instead is None:
            for name in end.without:
                headers.remove(name)
            for name, value in end.headers:
                if name == "Vary" and varies(headers):
                    response.vary.add(value)  # to what the app says
                else:
                    headers.add(name, value)
        else:
            _replace(response, end.instead)

    def is_null_session(self, obj: object) -> bool:
        """Return whether there is nothing to save: `open_session` has raised, which Flask answers with a 500."""
        return obj is None

    def check(self, app: Flask) -> None:
        """Raise SettingsError for settings of the app that can't be meant, or that browsers refuse."""
        lifetime_of(app)
        if self._cookie is None:
            self.cookie_of(app)

    def cookie_of(self, app: Flask) -> SessionCookie:
        """Return the cookie that Flask's settings describe. Raises SettingsError for one that browsers refuse."""
        given = _given(app.config)
        cookie = self._cookies.get(given)
        if cookie is None:
            cookie = self._cookies[given] = _cookie_of(app.config)
        return cookie


def lifetime_of(app: Flask) -> float:
    """Return the seconds for which a permanent session lives. Raises SettingsError for none."""
    try:
        seconds = app.permanent_session_lifetime.total_seconds()
        if seconds > 0:
            return seconds
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass  # None, or a text: Flask takes it as it is
    given = app.config["PERMANENT_SESSION_LIFETIME"]
    raise SettingsError(
        f"PERMANENT_SESSION_LIFETIME={in_code(given):.100}: more than 0 seconds, or a timedelta"
    )


def _answer_failures(app: Flask) -> None:
    """Have this app answer 503 where its error page, or an `after_request` function, looks at the session again.

    Flask's handlers are over then: it would answer with a bare 500, or raise. The first failure does this, once.
    """
    handle = app.handle_exception
    if getattr(handle, ANSWERS, False):
        return

    def handled(e: Exception) -> Any:
        try:
            response = handle(e)
        except SessionStoreUnavailable as raised:
            if raised is e:  # it is to be propagated
                raise
            response = app.response_class(status=500)
        failure = getattr(session, "failure", None)
        if response.status_code == 500 and isinstance(failure, SessionStoreUnavailable):
            _replace(response, failed(failure, request.method))
        return response

    setattr(handled, ANSWERS, True)
    app.handle_exception = handled  # type: ignore[method-assign]
    has_its_own = getattr(app.log_exception, "__func__", None) is not Flask.log_exception
    if not has_its_own:
        app.log_exception = partial(_log_exception, app.log_exception)  # type: ignore[method-assign]


def _log_exception(log_it: Callable[..., None], *given: Any) -> None:
    """Log a session that can't be read in one line: that is no error of the app. `given`: Flask's arguments.

    While Redis is away each request that looks at its session would log a traceback.
    """
    error = given[-1][1]
    if isinstance(error, SessionStoreUnavailable):
        log.warning("a request was not answered for want of its session: %s", error)
    else:
        log_it(*given)


def _replace(response: Response, answer: Answer) -> None:
    """Make this answer of a response of the app's."""
    response.status_code = answer.status
    cors = kept(list(response.headers))  # a page of another origin may read this, too
    response.headers.clear()
    response.headers.extend([*answer.headers, *cors])
    response.set_data(answer.body)


_SETTINGS = (
    "SESSION_COOKIE_NAME",
    "SESSION_COOKIE_DOMAIN",
    "SESSION_COOKIE_PATH",
    "SESSION_COOKIE_HTTPONLY",
    "SESSION_COOKIE_SECURE",
    "SESSION_COOKIE_SAMESITE",
    "SESSION_COOKIE_PARTITIONED",
    "APPLICATION_ROOT",
)
_given = itemgetter(*_SETTINGS)


def _cookie_of(config: Any) -> SessionCookie:
    """Return the cookie. Raises SettingsError for one that browsers refuse."""
    name, domain, own_path, http_only, secure, same_site, partitioned, root = _given(config)
    domain, path = domain or None, own_path or root  # False is none, too
    is_named = name != FLASKS_NAME
    if not is_named:
        name = OWN.name if domain is None and path == "/" else "__Secure-sid"
    must_be_secure = not is_named or partitioned or name.startswith("__")
    same = OWN.same_site if same_site is None else str(same_site).capitalize()
    if same not in SAME_SITE:
        raise SettingsError(f"SESSION_COOKIE_SAMESITE={same_site!r}: Lax, Strict or None")
    return SessionCookie(
        name,
        secure=bool(secure or must_be_secure),
        same_site=same,
        domain=domain,
        path=path,
        http_only=bool(http_only),
        partitioned=bool(partitioned),
    )


@explained
def fresh(seconds: Duration) -> Callable[[View], View]:
    """Return a decorator: 401 unless the session's user has proved within so many seconds who they are.

    For views, sync or async, that change a password or an address; on a class of views in its `decorators`. It
    stands below `@app.route`. After the user has proved it again, call `session.confirm()`.
    """
    seconds = seconds_of("seconds", seconds, least=0)

    def decorated(view: View) -> View:
        checked_view(view, "decorators = [fresh(…)]")

        @wraps(view)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if not hasattr(session, "is_fresh"):
                raise SessionNotLoaded(
                    "this app's sessions are not Stillroom's, so none is fresh: room.init_app(app) comes first"
                )
            if not session.is_fresh(seconds):
                abort(401)
            return current_app.ensure_sync(view)(*args, **kwargs)

        note_within(view, checked, UNASKED)
        return checked  # type: ignore[return-value]

    return decorated
