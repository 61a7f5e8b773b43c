"""The health endpoints answer over real WSGI and ASGI servers, to each caller what it may see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import redis
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from stillroom.settings import LOOPBACK
from stillroom.web import HealthWSGI
from stillroom.web.health import HELD_S
from tests.support.crowd import PATIENT
from tests.support.threads import at_once
from tests.support.web import Reply, serving_health

pytestmark = pytest.mark.usefixtures("calm_machine")

TOKEN = "a-token-for-operators-only"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PASSED_ON = {"X-Forwarded-For": "203.0.113.7"}

Ask = Callable[..., Reply]
Serve = Callable[..., Ask]


@pytest.fixture(params=["wsgi", "asgi"])
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Serve the endpoints of a room with these settings; yield a function that asks them."""
    with serving_health(request.param) as serve:
        yield serve


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the settings patient; tests/faults tests how long an answer waits for a check."""
    for module in ("asgi_health", "wsgi_health"):
        monkeypatch.setattr(f"stillroom.web.{module}.WAIT_S", 10.0)


def settings_for(server: EmbeddedServer, **changes: Any) -> Settings:
    """Return settings with a token, and with this machine as an operator's network, which a token alone closes."""
    given = {"redis_url": server.url, "health_token": TOKEN, "health_networks": LOOPBACK}
    return Settings(**given | PATIENT | changes)


@pytest.fixture
def asking(serve: Serve, server: EmbeddedServer) -> Ask:
    return serve(settings_for(server))


def test_the_public_learns_the_status_and_no_more(asking: Ask) -> None:
    """The public is told one word, in the media type of the draft, which is never stored."""
    answer = asking("/health", headers=PASSED_ON)
    assert answer.status == 200
    assert answer.one("content-type") == "application/health+json"
    assert answer.one("cache-control") == "no-store"
    assert json.loads(answer.body) == {"status": "pass"}


def test_operators_see_the_details(asking: Ask) -> None:
    """Operators see each check's status and figures, with the token or from an operator's network."""
    for headers in (BEARER | PASSED_ON, {}):
        body = json.loads(asking("/health", headers=headers).body)
        assert body["status"] == "pass"
        assert body["version"] == "1"
        assert body["age_ms"] >= 0
        checks = body["checks"]
        assert {"redis:connection", "redis:memory", "cache:stats", "sessions:stats"} <= set(checks)
        for name, entries in checks.items():
            # No beat has ever ticked here: that is not known to be good.
            assert [entry["status"] for entry in entries] == [
                None if name == "tasks:beat" else "pass"
            ], name
        assert checks["redis:connection"][0]["observedUnit"] == "ms"
        assert checks["redis:memory"][0]["used"] > 0
        assert checks["redis:memory"][0]["limit"] is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"} | PASSED_ON,
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}é"} | PASSED_ON,
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Forwarded-Proto": "https"},
        {"X-Real-IP": "127.0.0.1"},
        {"CF-Connecting-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"True-Client-IP": "127.0.0.1"},
        {"X-Original-Forwarded-For": "127.0.0.1"},
        {"Fly-Client-IP": "127.0.0.1"},
        {"X-Amzn-Trace-Id": "Root=1"},
        {"CDN-Loop": "cdn"},
    ],
)
def test_others_do_not(asking: Ask, headers: dict[str, str]) -> None:
    """A wrong token, and a proxy inside an operator's network, see no details."""
    assert json.loads(asking("/health", headers=headers).body) == {"status": "pass"}
    answer = asking("/metrics", headers=headers)
    assert answer.status == 401
    assert answer.one("www-authenticate").startswith("Bearer")
    assert b"stillroom_" not in answer.body


def test_networks_are_a_setting(serve: Serve, server: EmbeddedServer) -> None:
    """Where loopback is no operator's network, it sees the status only."""
    asking = serve(settings_for(server, health_networks="10.0.0.0/8 fd00::/8"))
    assert json.loads(asking("/health").body) == {"status": "pass"}
    assert "checks" in json.loads(asking("/health", headers=BEARER).body)


def test_a_token_closes_what_is_open_to_this_machine(serve: Serve, server: EmbeddedServer) -> None:
    """A token closes what is open to this machine, because a proxy on it looks like an operator."""
    asking = serve(settings_for(server, health_networks=None))
    assert json.loads(asking("/health").body) == {"status": "pass"}
    assert asking("/status").status == asking("/metrics").status == 401
    assert "checks" in json.loads(asking("/health", headers=BEARER).body)
    asking = serve(settings_for(server, health_networks=None, health_token=None))
    assert "checks" in json.loads(asking("/health").body)
    assert asking("/metrics").status == 200


def test_where_no_token_is_set_none_is_asked_for(serve: Serve, server: EmbeddedServer) -> None:
    """Without a token an outsider is told which setting opens the page; a browser asks for no password."""
    settings = settings_for(server, health_networks="10.0.0.0/8", health_token=None)
    asking = serve(settings)
    for path in ("/status", "/metrics"):
        answer = asking(path)
        assert (answer.status, answer.body) == (403, b"for operators: set STILLROOM_HEALTH_TOKEN\n")
        assert answer.one("www-authenticate") is None


def test_a_trusted_proxy_is_no_operator(serve: Serve, server: EmbeddedServer) -> None:
    """A trusted proxy is no operator, though it stands in an operator's network and adds no header."""
    asking = serve(settings_for(server, trusted_proxies="127.0.0.1/32 unix"))
    assert json.loads(asking("/health").body) == {"status": "pass"}
    assert asking("/status").status == 401
    assert "checks" in json.loads(asking("/health", headers=BEARER).body)


def test_without_a_token_no_token_opens(serve: Serve, server: EmbeddedServer) -> None:
    """Without a configured token no token opens the details, an empty one included."""
    asking = serve(settings_for(server, health_token=None, health_networks=""))
    for given in ("", "None", TOKEN):
        headers = {"Authorization": f"Bearer {given}"}
        assert json.loads(asking("/health", headers=headers).body) == {"status": "pass"}


def test_alive_and_ready(asking: Ask) -> None:
    """/alive and /ready give the status only, to every caller."""
    for path in ("/health/live", "/health/ready", "/health/ready/"):
        answer = asking(path, headers=BEARER)
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "pass"})


def test_other_methods_and_paths(asking: Ask) -> None:
    """HEAD is GET without the body. Other methods and paths are refused with a sentence."""
    head = asking("/health", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.one("content-length")) > 0
    for method in ("POST", "DELETE", "PUT"):
        answer = asking("/health", method)
        assert (answer.status, answer.one("allow")) == (405, "GET, HEAD")
    assert asking("/").status == 404
    assert asking("/healthy").status == 404


def plain_wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


async def plain_asgi(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_it_may_wrap_an_app(serve: Serve, server: EmbeddedServer) -> None:
    """The endpoints may wrap an app, and all other paths go to the app."""
    asking = serve(settings_for(server), (plain_wsgi, plain_asgi))
    assert asking("/products/7").body == b"/products/7"
    assert asking("/health/live").status == 200
    assert json.loads(asking("/health", headers=PASSED_ON).body) == {"status": "pass"}


@pytest.mark.parametrize(
    ("mount", "path"),
    [
        ("", "/health"),
        ("/internal", "/health"),
        ("/health", ""),
        ("/health", "/live"),
        ("/metrics", "/"),
    ],
)
def test_it_may_be_mounted_anywhere(server: EmbeddedServer, mount: str, path: str) -> None:
    """The endpoints may be mounted under a prefix or at /health, in both kinds of framework."""
    answers = []
    environ = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": mount,
        "PATH_INFO": path,
        "REMOTE_ADDR": "127.0.0.1",
    }
    with Stillroom(settings_for(server), dispatch=NoDispatch()) as room:
        HealthWSGI(room)(environ, lambda status, _: answers.append(status))
    assert answers == ["200 OK"]


def test_metrics_are_read_by_prometheus(serve: Serve, server: EmbeddedServer, client: Any) -> None:
    """Prometheus reads the metrics: counters of all processes and gauges of the servers, without
    unknown samples.
    """
    keys = Keys("stillroom")
    counts = {"hits": 70, "stale": 20, "misses": 10, "limit_checks": 9, "sessions_created": 4}
    client.hset(
        keys.counts, mapping={**counts, "limit_would_deny:x.y": 3, "somebody else's {name}": 1}
    )
    answer = serve(settings_for(server))("/metrics")
    assert answer.status == 200
    assert answer.one("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    families = {f.name: f for f in text_string_to_metric_families(answer.body.decode())}
    requests = {s.labels["result"]: s.value for s in families["stillroom_cache_requests"].samples}
    assert requests == {"hit": 70, "stale": 20, "miss": 10}
    events = {s.labels["event"]: s.value for s in families["stillroom_events"].samples}
    assert events == {"sessions_created": 4}
    shadows = families["stillroom_limit_would_deny"].samples
    assert [(s.labels["limit"], s.value) for s in shadows] == [("x.y", 3)]
    assert families["stillroom_redis_up"].samples[0].labels == {"server": "redis"}
    assert families["stillroom_redis_up"].samples[0].value == 1
    assert families["stillroom_redis_memory_used_bytes"].samples[0].value > 0
    assert "stillroom_redis_memory_limit_bytes" not in families
    assert families["stillroom_redis_commands"].type == "counter"
    depths = {s.labels["queue"]: s.value for s in families["stillroom_queue_depth"].samples}
    assert depths == {"stillroom.refresh": 0, "stillroom.maintenance": 0}
    labels = {name for f in families.values() for s in f.samples for name in s.labels}
    assert labels <= {
        "server",
        "component",
        "code",
        "severity",
        "result",
        "outcome",
        "event",
        "limit",
        "queue",
    }


def test_metrics_may_be_open(serve: Serve, server: EmbeddedServer) -> None:
    """A setting opens the metrics to a scraper behind a proxy; the details stay closed."""
    asking = serve(settings_for(server, metrics_open=True))
    assert b"stillroom_health" in asking("/metrics", headers=PASSED_ON).body
    assert json.loads(asking("/health", headers=PASSED_ON).body) == {"status": "pass"}


def test_two_hundred_at_once_are_one_check(asking: Ask, server: EmbeddedServer) -> None:
    """Two hundred requests at once are answered by one check of Redis."""

    def checks() -> int:
        """Count the checks by their question for the slowlog's length, which nobody else asks."""
        with redis.Redis.from_url(server.url) as client:
            stats = client.info("commandstats").items()
        return sum(int(found["calls"]) for name, found in stats if "slowlog" in name)

    before, began = checks(), time.monotonic()
    statuses = at_once(200, lambda _: asking("/health").status)
    assert statuses == [200] * 200
    most = 1 + (time.monotonic() - began) / HELD_S  # a busy machine takes longer than one is held
    assert 1 <= checks() - before <= most


def test_a_finding_is_in_its_check(serve: Serve, server: EmbeddedServer, client: Any) -> None:
    """A finding is in its check with status, words and advice. A warning is no failure to a load balancer."""
    client.xadd(Keys("stillroom").dead_letters, {"kind": "message"})
    answer = serve(settings_for(server))("/health")
    body = json.loads(answer.body)
    assert (answer.status, body["status"]) == (200, "warn")
    (queues,) = body["checks"]["tasks:queues"]
    assert queues["status"] == "warn"
    assert "1 dead letter waits" in queues["output"]
    (advice,) = body["advice"]
    assert {"code", "severity", "component", "what", "good", "todo"} <= set(advice)
