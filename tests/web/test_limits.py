"""A route table's limits hold through both middlewares and real HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import http_sfv
import pytest

from stillroom import AUTH, DEFAULT, Limit, Route, Routes, Stillroom
from stillroom.sessions.token import make_token
from stillroom.web.gate import Asked
from tests.support.monitor import READS_SESSION
from tests.support.web import Browser, ask
from tests.web.conftest import Serve
from tests.web.test_sessions import answered

TWO = Limit("two", 2, 60)
MANY = Limit("many", 1_000, 60)
NONE = Limit("none", 0, 60)
ROUTES = Routes(
    [
        Route("/cart/add", [TWO, MANY]),
        Route("/login", [AUTH], methods=["GET", "POST"]),
        Route("/plain", []),
    ],
    default=[MANY],
)


def read(value: str | None) -> dict[str, dict[str, Any]]:
    """Parse a list of structured fields with an independent parser into name → parameters."""
    found = http_sfv.List()
    found.parse((value or "").encode())
    return {item.value: dict(item.params) for item in found}


def test_every_response_says_how_its_client_stands(serve: Serve) -> None:
    """Every response with limits reports the client's state, also a failed one; a route without limits
    reports nothing.
    """
    with serve(routes=ROUTES) as port:
        for path in ("/cart/add?tea", "/fail/500?x", "/fail/404?x", "/who"):
            reply = ask(port, path)
            policies, state = read(reply.one("ratelimit-policy")), read(reply.one("ratelimit"))
            assert policies["many"] == {"q": 1_000, "w": 60}
            assert state.keys() == policies.keys()
            assert reply.one("x-ratelimit-limit") == ("2" if "add" in path else "1000")
        assert not [name for name, _ in ask(port, "/plain").headers if "ratelimit" in name.lower()]


def test_over_the_limit_the_app_is_not_called(serve: Serve, room: Stillroom) -> None:
    """Over the limit the answer is 429, problem+json with Retry-After, without calling the app or
    using the session.
    """
    called: list[str] = []
    with serve(called.append, routes=ROUTES) as port:
        browser = Browser(port)
        for item in ("tea", "jam"):
            assert browser.get(f"/cart/add?{item}").status == 200
        reply = browser.get("/cart/add?rum")
        assert (reply.status, reply.one("content-type")) == (429, "application/problem+json")
        problem = json.loads(reply.text)
        assert problem["violated-policies"] == ["two"]
        assert problem["type"].endswith("#quota-exceeded")
        assert 1 <= int(reply.one("retry-after") or 0) <= 60
        assert reply.one("cache-control") == "no-store"
        assert (reply.token, reply.all("vary")) == (None, [])
        head = browser.get("/cart/add?rum", "HEAD")
        assert (head.status, head.body) == (429, b"")
        assert browser.get("/cart").text == '["tea", "jam"]'
    assert called == ["/cart/add", "/cart/add", "/cart"]


@pytest.mark.parametrize(
    "path", ["//cart/add", "/cart/add/", "/cart/%61dd", "/cart/./add", "/x/../cart/add"]
)
def test_no_spelling_of_a_path_escapes_its_limit(serve: Serve, path: str) -> None:
    """No spelling of a path escapes its limit: the route is found by every path that a server could see."""
    with serve(routes=ROUTES) as port:
        for _ in range(2):
            ask(port, "/cart/add?x")
        assert ask(port, f"{path}?x").status == 429


def test_a_path_is_read_as_utf_8(serve: Serve) -> None:
    """A template with non-ASCII letters finds its path with both faces, sent raw or escaped."""
    with serve(routes=Routes([Route("/t\u00e9/{x}", [TWO])], default=[])) as port:
        for path in ("/t%C3%A9/plain", "/t%c3%a9/plain"):
            assert ask(port, path).one("x-ratelimit-limit") == "2"


def test_forwarding_headers_of_a_client_change_nothing(serve: Serve) -> None:
    """Forwarding headers from an untrusted peer change nothing about how it is counted."""
    with serve(routes=ROUTES) as port:
        for n in range(3):
            named = {"X-Forwarded-For": f"198.51.100.{n}", "Forwarded": f"for=198.51.100.{n}"}
            status = ask(port, "/cart/add?x", headers=named | {"X-Real-IP": f"10.0.0.{n}"}).status
            assert status == (200 if n < 2 else 429)


def test_a_trusted_proxy_is_believed_from_the_right(serve: Serve) -> None:
    """The address that a trusted proxy added counts, not one that the client sent before it."""
    with serve(routes=ROUTES, changes={"trusted_proxies": "127.0.0.0/8"}) as port:

        def status(chain: str) -> int:
            return ask(port, "/cart/add?x", headers={"X-Forwarded-For": chain}).status

        assert [status(f"1.1.1.{n}, 198.51.100.7") for n in range(3)] == [200, 200, 429]
        assert status("198.51.100.7, 198.51.100.8") == 200


def test_a_subject_of_the_apps_own(serve: Serve) -> None:
    """An API key is counted at every address; requests without a key share the empty key."""
    by_key = Limit("keyed", 1, 60, by="key")

    def subject(asked: Asked) -> dict[str, str]:
        return {"key": {name.lower(): v for name, v in asked.headers}.get("x-api-key", "")}

    with serve(routes=Routes([], default=[by_key]), subject=subject) as port:
        keys = ["a", "a", "b", ""]
        replies = [ask(port, "/plain", headers={"X-Api-Key": key}) for key in keys]
        assert [reply.status for reply in replies] == [200, 429, 200, 200]
        assert ask(port, "/plain").status == 429


def test_limits_and_session_are_one_round_trip(serve: Serve, client: Any) -> None:
    """Limits and session are one round trip once a route is known to use the session; other routes only check."""
    with serve(routes=Routes([], default=[MANY])) as port:
        browser = Browser(port)
        browser.get("/cart/add?tea")
        browser.get("/cart")
        _, commands = answered(client, lambda: browser.get("/cart"))
        assert commands == ["EVALSHA", *READS_SESSION]
        batches = room_trips(client, lambda: browser.get("/cart"))
        assert batches == 1
        browser.get("/plain")
        browser.get("/plain")
        _, commands = answered(client, lambda: browser.get("/plain"))
        assert commands == ["EVALSHA"]


def room_trips(client: Any, act: Any) -> int:
    """Return how often Redis had something to read from any client while `act` ran, without this question."""
    before = client.info("stats")["total_reads_processed"]
    act()
    after = client.info("stats")["total_reads_processed"]
    return int(after - before - 1)


def test_a_flood_of_the_denied_costs_redis_nothing(serve: Serve, client: Any) -> None:
    """A denied client with a cookie on a route that uses the session sends no command to Redis."""
    with serve(routes=Routes([], default=[Limit("few", 3, 3_600)])) as port:
        browser = Browser(port)
        statuses = [browser.get("/cart/add?tea").status for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        reply, commands = answered(client, lambda: browser.get("/cart/add?tea"))
        assert (reply.status, commands) == (429, [])


def test_an_unknown_token_beside_a_check(serve: Serve) -> None:
    """An unknown token with a check finds and writes nothing, the cookie is forgotten and the limit counted."""
    with serve(routes=Routes([], default=[DEFAULT])) as port:
        for left in (99, 98, 97):
            reply = Browser(port, make_token(3, b"x" * 32)).get("/cart")
            assert (reply.text, reply.token) == ("[]", "")
            assert read(reply.one("ratelimit"))["default"]["r"] == left


def test_limits_without_sessions(serve: Serve) -> None:
    """With `sessions=False` the app finds no session and no cookie is read."""
    with serve(lambda path: None, routes=ROUTES, sessions=False) as port:
        assert ask(port, "/plain").status == 200


@pytest.mark.parametrize(
    ("site", "destination", "is_told"),
    [
        (None, None, True),
        ("none", "document", True),
        ("same-origin", "empty", True),
        ("same-origin", "document", True),
        ("cross-site", "image", False),
        ("cross-site", "document", False),
        ("cross-site", "iframe", False),
        ("same-origin", "image", False),
        ("same-site", "script", False),
    ],
)
def test_only_what_a_client_meant_is_told_to_abuse(
    serve: Serve,
    room: Stillroom,
    client: Any,
    site: str | None,
    destination: str | None,
    is_told: bool,
) -> None:
    """Requests that another site's page or a missing image causes are not reported to abuse."""
    given = {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": destination}
    with serve(routes=ROUTES) as port:
        ask(port, "/fail/404?x", headers={k: v for k, v in given.items() if v is not None})
    assert client.xlen(room.keys.abuse) == is_told


@pytest.mark.parametrize("destination", ["document", "image"])
@pytest.mark.parametrize("limit", [NONE, replace(NONE, in_flight=True)], ids=["hits", "in flight"])
def test_a_denial_is_told_to_abuse_with_its_route(
    serve: Serve, room: Stillroom, client: Any, limit: Limit, destination: str
) -> None:
    """A denial tells abuse the template of its path. That of an image, which its page asked for, tells nothing."""
    routes = Routes([Route("/{path:path}", [limit])])
    with serve(routes=routes) as port:
        asked = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": destination}
        assert ask(port, "/plain", headers=asked).status == 429
    told = [(e[b"kind"], e[b"route"]) for _, e in client.xrange(room.keys.abuse)]
    assert told == ([(b"denied", b"/{path:path}")] if destination == "document" else [])


def test_what_is_not_found_and_whose_session_is_unknown_is_told_to_abuse(
    serve: Serve, room: Stillroom, client: Any
) -> None:
    """A missing page and an unknown session are reported to abuse by address, without a round trip of their own."""
    never = make_token(1, b"n" * 32)
    with serve(routes=ROUTES) as port:
        ask(port, "/fail/404?x")
        ask(port, "/who", headers={"Cookie": f"__Host-sid={never}"})
        ask(
            port, "/plain", headers={"Cookie": f"__Host-sid={never}"}
        )  # nobody looked: nobody knows
        ask(port, "/who")
    told = [fields for _, fields in client.xrange(room.keys.abuse)]
    assert sorted((e[b"kind"], e[b"ip"], e.get(b"route")) for e in told) == [
        (b"not_found", b"127.0.0.1", b"/fail/404"),
        (b"session_unknown", b"127.0.0.1", b"/{path:path}"),
    ]
