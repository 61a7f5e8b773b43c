"""Any request to the health endpoints, with Redis well, away or frozen, gets a documented answer and
never a 500.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.web import HealthASGI, HealthWSGI

TOKEN = "a-token-for-operators-only"
STATUSES = {200, 401, 404, 405, 503}


class Check(BaseModel):
    """An entry of the draft's `checks`, with our own fields."""

    model_config = ConfigDict(extra="allow")

    componentType: Literal["datastore", "component", "system"]  # noqa: N815  # the draft's name
    status: Literal["pass", "warn", "fail"] | None


class Health(BaseModel):
    """The draft's document, of which the public gets `status` only."""

    model_config = ConfigDict(extra="allow")

    status: Literal["pass", "warn", "fail"]
    checks: dict[str, list[Check]] | None = None


paths = st.one_of(
    st.sampled_from(
        ["/health", "/health/live", "/health/ready", "/metrics", "/status", "/health/"]
    ),
    st.text(alphabet=st.characters(max_codepoint=255), max_size=30).map("/".__add__),
)
values = st.text(alphabet=st.characters(max_codepoint=255), max_size=40)
headers = st.dictionaries(
    st.sampled_from(["authorization", "x-forwarded-for", "forwarded", "via", "host", "accept"]),
    st.one_of(
        values,
        st.just(f"Bearer {TOKEN}"),
        values.map("Bearer ".__add__),
        values.map("Basic ".__add__),
    ),
    max_size=4,
)
peers = st.one_of(
    st.none(), st.sampled_from(["127.0.0.1", "::1", "203.0.113.9", "::ffff:127.0.0.1"]), values
)
methods = st.one_of(st.sampled_from(["GET", "HEAD", "POST", "OPTIONS"]), st.text(max_size=8))

Requester = Callable[[str, str, dict[str, str], Any], tuple[int, bytes]]


def by_wsgi(app: HealthWSGI) -> Requester:
    def ask(method: str, path: str, given: dict[str, str], peer: Any) -> tuple[int, bytes]:
        environ = {f"HTTP_{name.upper().replace('-', '_')}": text for name, text in given.items()}
        environ |= {"REQUEST_METHOD": method, "PATH_INFO": path} | (
            {"REMOTE_ADDR": peer} if peer else {}
        )
        statuses: list[str] = []
        body = b"".join(app(environ, lambda status, _: statuses.append(status)))
        return int(statuses[0].split()[0]), body

    return ask


def by_asgi(app: HealthASGI, loop: asyncio.AbstractEventLoop) -> Requester:
    def ask(method: str, path: str, given: dict[str, str], peer: Any) -> tuple[int, bytes]:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in given.items()],
            "client": (peer, 1) if peer else None,
        }
        loop.run_until_complete(app(scope, send, send))
        return messages[0]["status"], messages[1]["body"]

    return ask


@pytest.fixture(params=["well", "killed", "frozen"])
def settings_of_room(
    request: pytest.FixtureRequest, own_server: EmbeddedServer
) -> Iterator[Settings]:
    if request.param == "killed":
        own_server.kill()
    if request.param == "frozen":
        own_server.freeze()
    yield Settings(redis_url=own_server.url, health_token=TOKEN)
    if request.param == "frozen":
        own_server.thaw()


@pytest.fixture(params=["wsgi", "asgi"])
def ask(request: pytest.FixtureRequest, settings_of_room: Settings) -> Iterator[Requester]:
    if request.param == "wsgi":
        with Stillroom(settings_of_room, dispatch=NoDispatch()) as room:
            yield by_wsgi(HealthWSGI(room))
        return
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        async_room = AsyncStillroom(settings_of_room, dispatch=NoDispatch())
        yield by_asgi(HealthASGI(async_room), loop)
        loop.run_until_complete(async_room.close())


def test_every_answer_has_its_shape(ask: Requester) -> None:
    """Every answer has a documented status and the body that it declares, and only operators see details."""

    @settings(max_examples=60, deadline=None)
    @given(method=methods, path=paths, given_headers=headers, peer=peers)
    def any_request(method: str, path: str, given_headers: dict[str, str], peer: Any) -> None:
        status, body = ask(method, path, given_headers, peer)
        assert status in STATUSES
        if method == "HEAD":
            assert body == b""
        elif status in (200, 503) and path.startswith("/metrics"):
            assert status == 503 or list(text_string_to_metric_families(body.decode()))
        elif status in (200, 503) and path.rstrip("/") == "/status":
            assert body.startswith(b"<!doctype html>" if status == 200 else b"no report")
        elif status in (200, 503):
            health = Health.model_validate_json(body)
            is_public = set(json.loads(body)) == {"status"}
            assert is_public or health.checks
            if (
                given_headers.get("authorization", "") != f"Bearer {TOKEN}"
                and "via" in given_headers
            ):
                assert is_public

    any_request()
