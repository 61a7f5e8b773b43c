"""The health endpoints without a web server: a request in, a response out.

| path            | asks Redis | answers                                                                     |
|-----------------|------------|-----------------------------------------------------------------------------|
| `/health`       | 1 in 2 s   | `application/health+json`: 200 pass or warn, 503 fail                       |
| `/health/live`  | never      | 200: this process answers                                                   |
| `/health/ready` | 1 in 2 s   | 200, or 503 before Redis has answered once, or while a required role is away|
| `/metrics`      | 1 in 2 s   | Prometheus text; guarded like the details unless `metrics_open`             |
| `/status`       | each time  | a page for operators, guarded like the details: see status/                 |
| `/operate`      | each act   | a page on which operators act: for who has the token, see operate.py        |

Everybody sees the status. The details are for who has the token, or comes from an operator's network directly: a
request that a proxy passed on has the proxy's address, which says nothing about who sent it. Where a token is set,
no network is an operator's unless the setting health_networks says so: a proxy may add no header.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stillroom.acts import act
from stillroom.cache.loaders import Loaders
from stillroom.errors import WHO_MAY, RedisUnavailable, StillroomError
from stillroom.health import rfc
from stillroom.health.metrics import MEDIA_TYPE as METRICS_TYPE
from stillroom.health.metrics import exposition
from stillroom.health.past import Past
from stillroom.health.report import Report
from stillroom.health.system import find_psutil
from stillroom.room import Stillroom
from stillroom.settings import Settings
from stillroom.web import operate
from stillroom.web.status import HEADERS as STATUS_HEADERS
from stillroom.web.status import render, view_of

HELD_S = 2.0  # one check serves everybody for this long
WAIT_S = 0.25  # for a check under way; longer than one takes, unless a name can't be resolved
STALE_S = 30.0  # so old may a report be that is served because a new one does not come

# The beginnings of the headers that proxies, CDNs and platforms add.
FORWARDED = (
    "forwarded",
    "via",
    "x-forwarded",
    "x-real-ip",
    "x-client-ip",
    "client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "x-original-",
    "x-rewrite-url",
    "x-proxyuser-ip",
    "x-scheme",
    "x-url-scheme",
    "front-end-https",
    "x-varnish",
    "x-nginx-",
    "cdn-loop",
    "cf-",
    "fastly-",
    "fly-",
    "do-connecting-ip",
    "x-amzn-",
    "x-amz-cf-",
    "x-appengine-",
    "x-azure-",
    "x-arr-",
    "x-envoy-",
    "x-nf-",
    "x-vercel-",
)
TOKEN_TODO = "set STILLROOM_HEALTH_TOKEN"
METHODS = ("GET", "HEAD")

LIVE, READY, HEALTH, METRICS, STATUS = "live", "ready", "health", "metrics", "status"
OPERATE = "operate"
# The schemes that open the details. A browser can't be given a bearer token, but asks its user for a password.
GUARDED: Mapping[str, str] = {
    METRICS: 'Bearer realm="stillroom"',
    STATUS: 'Basic realm="stillroom", charset="UTF-8"',
    OPERATE: 'Basic realm="stillroom", charset="UTF-8"',
}
ROUTES: Mapping[str, str] = {
    "/health": HEALTH,
    "/health/live": LIVE,
    "/health/ready": READY,
    "/metrics": METRICS,
    "/status": STATUS,
    "/operate": OPERATE,
}


class Request(NamedTuple):
    """Hold the parts of a request that matter here. Names of headers are in lower case."""

    method: str
    path: str  # below where the app is mounted …
    mount: str  # … which is here
    peer: str | None  # the address it came from
    headers: Mapping[str, str]
    query: str = ""
    body: bytes = b""  # of a form


class Response(NamedTuple):
    """Hold the answer to a request."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class Held(NamedTuple):
    """A report, and when it was made (time.monotonic())."""

    report: Report
    at: float

    def age(self) -> float:
        return time.monotonic() - self.at

    @property
    def is_fresh(self) -> bool:
        return self.age() < HELD_S


class Endpoints:
    """Decide who may see which endpoint, and make the answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        token = settings.health_token
        self._token = token.get_secret_value().encode() if token else None
        self._networks = _networks(settings.operators)
        self._proxies = _networks(settings.proxy_networks)
        self._was_ready = False
        find_psutil()  # now, and not while the first request waits

    def route(self, request: Request) -> str | None:
        """Return which endpoint this is; None for a path that is not ours."""
        path, mounted_as = request.path.rstrip("/"), request.mount.rstrip("/").rpartition("/")[2]
        # Also where the app is mounted at /health itself.
        return ROUTES.get(path) or ROUTES.get(f"/{mounted_as}{path}")

    def at_once(self, request: Request) -> Response | None:
        """Return the answer that needs no report, or None: one is needed."""
        route = self.route(request)
        if route is None:
            return _text(404, "not found")
        if route == OPERATE:
            return self._refused(request)
        if request.method not in METHODS:
            return _text(405, "GET or HEAD", ("Allow", ", ".join(METHODS)))
        if route == LIVE:
            return _health(200, rfc.public_json("pass"))
        is_open = route not in GUARDED or (route == METRICS and self._settings.metrics_open)
        if not is_open and not self.is_operator(request):
            if self._token is None:  # no login could succeed, so none is asked for
                return _text(403, f"for operators: {TOKEN_TODO}")
            return _text(401, "for operators", ("WWW-Authenticate", GUARDED[route]))
        return None

    def answer(self, request: Request, held: Held | None) -> Response:
        """Return the answer. `held` None: no report could be made in time."""
        route = self.route(request)
        if route == READY:
            return self._ready(held)
        if held is None:
            if route == METRICS:
                return _text(503, "no report in time")
            return _health(503, rfc.public_json("fail"))
        if route == METRICS:
            headers = [("Content-Type", METRICS_TYPE), *NEVER_STORED]
            return Response(200, headers, exposition(held.report, held.age()))
        status = 503 if held.report.status == "fail" else 200
        if self.is_operator(request):
            return _health(status, rfc.details_json(held.report, held.age()))
        return _health(status, rfc.public_json(held.report.status))

    # The operators' page

    def is_operating(self, request: Request) -> bool:
        """Return whether `operate` answers this request, in a thread that may wait for Redis."""
        return self.route(request) == OPERATE

    def is_act(self, request: Request) -> bool:
        """Return whether the request has a body to read, up to operate.BODY_LIMIT bytes."""
        return request.method == "POST" and self.is_operating(request)

    def _refused(self, request: Request) -> Response | None:
        """Return why the caller may not act here, or None. The token is asked for from every network."""
        if request.method not in (*METHODS, "POST"):
            return _text(405, "GET, HEAD or POST", ("Allow", ", ".join((*METHODS, "POST"))))
        if self._token is None:
            return _text(404, f"for operators: {TOKEN_TODO}")
        if not self._has_token(request):
            return _text(401, "for operators", ("WWW-Authenticate", GUARDED[OPERATE]))
        return None

    def operate(self, request: Request, loaders: Loaders) -> Response:
        """Do what a form says, and answer with the page. Takes as long as Redis does."""
        secret, at = self._token or b"", time.time()
        if request.method != "POST":
            return _page(200, operate.render(secret, at))
        form = operate.form_of(request.body)
        given = form.pop(operate.CODE_FIELD, "")
        if not operate.is_from_here(request.headers) or not operate.is_good(given, secret, at):
            said = "This form is too old, or stood on another page. Nothing was done: try again."
            return _page(403, operate.render(secret, at, wrong=said))
        try:
            with Stillroom(self._settings) as room:
                room.cache.loaders.adopt(loaders)
                done = act(room, form.pop("act", ""), form, _who(request))
        except (StillroomError, ValueError, LookupError) as error:
            return _page(200, operate.render(secret, at, wrong=_why(error)))
        return _page(200, operate.render(secret, at, done))

    def is_page(self, request: Request) -> bool:
        """Return whether `page` answers this request, with health.past(hours), instead of `answer`."""
        return self.route(request) == STATUS

    def hours(self, request: Request) -> float:
        """Return how many hours of the past the page is to show."""
        return view_of(request.query).choice.hours

    def page(self, request: Request, held: Held | None, past: Past) -> Response:
        """Return the page at /status. Takes a tenth of a second of CPU: not for an event loop's thread."""
        if held is None:
            return _text(503, "no report in time")
        text = render(
            held.report,
            past.history,
            past.patterns,
            flower_url=self._settings.flower_url,
            now=held.report.time + held.age(),
            view=view_of(request.query),
            since=past.since,
            figures=past.figures,
        )
        return Response(200, STATUS_HEADERS, text.encode())

    def is_operator(self, request: Request) -> bool:
        """Return whether the caller may see the details."""
        kind = request.headers.get("authorization", "").partition(" ")[0]
        if self._token and kind.lower() == "bearer":
            return self._has_token(request)
        if self._has_token(request):
            return True
        if any(name.startswith(FORWARDED) for name in request.headers):
            return False
        return self._is_near(request.peer)

    def _has_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not self._token:
            return False
        if kind.lower() == "bearer":
            # A header is Latin-1 to the server, and may be UTF-8 to whoever wrote it.
            return hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        return hmac.compare_digest(_password(kind, given), self._token)

    def _is_near(self, peer: str | None) -> bool:
        try:
            address = ipaddress.ip_address(peer or "")
        except ValueError:  # a Unix socket, or a server that does not say
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        is_proxy = any(address in network for network in self._proxies)  # even if it adds no header
        return not is_proxy and any(address in network for network in self._networks)

    def _ready(self, held: Held | None) -> Response:
        """Answer ready if the room was connected once and has the roles that the settings require."""
        up = [s.connection.is_up for s in held.report.servers] if held else []
        self._was_ready = self._was_ready or bool(up and all(up))
        away = {
            role
            for server in (held.report.servers if held else ())
            if not server.connection.is_up
            for role in server.roles
        }
        unknown = held is None and bool(self._settings.ready_requires)
        missing = away & set(self._settings.ready_requires)
        is_ready = self._was_ready and not missing and not unknown
        return _health(200 if is_ready else 503, rfc.public_json("pass" if is_ready else "fail"))


def _networks(texts: Sequence[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(text) for text in texts]


def _why(error: Exception) -> str:
    """Return why an act failed, for the operator."""
    if isinstance(error, RedisUnavailable) and error.lacks_right:
        return f"Not allowed: {error.detail}; {WHO_MAY}."
    return f"This failed: {error}"


def _who(request: Request) -> str:
    """Return the actor for the log: the name that a browser was given, and the address."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    name = b""
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            name = base64.b64decode(given).partition(b":")[0]
    return f"{name.decode(errors='replace') or 'an operator'} at {request.peer or 'no address'}"


def _page(status: int, text: str) -> Response:
    return Response(status, operate.HEADERS, text.encode())


def _password(kind: str, given: str) -> bytes:
    """Return the password of HTTP's Basic authentication, whatever the user name (RFC 7617)."""
    try:
        return base64.b64decode(given if kind.lower() == "basic" else "").partition(b":")[2]
    except ValueError:
        return b""


def has_past(held: Held | None) -> bool:
    """Return whether to ask for the history: where the state's server is away, that would be a second timeout."""
    servers = held.report.servers if held else ()
    return any(server.connection.is_up and "state" in server.roles for server in servers)


NEVER_STORED = [("Cache-Control", "no-store")]


def sized(response: Response) -> list[tuple[str, str]]:
    """Return all headers, with the length of the body that GET gets."""
    return [*response.headers, ("Content-Length", str(len(response.body)))]


def _health(status: int, body: bytes) -> Response:
    return Response(status, [("Content-Type", rfc.MEDIA_TYPE), *NEVER_STORED], body)


def _text(status: int, sentence: str, *headers: tuple[str, str]) -> Response:
    kind = ("Content-Type", "text/plain; charset=utf-8")
    return Response(status, [kind, *NEVER_STORED, *headers], f"{sentence}\n".encode())
