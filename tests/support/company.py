"""Run all roles of the stack on one server: every act of each role, once, as its Redis user."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from typer.testing import CliRunner

import redis
from stillroom import API, AUTH, Limit, Settings, Stillroom
from stillroom.acts import ACTS, act
from stillroom.cli import app as command_line
from stillroom.embedded import EmbeddedServer, free_port
from stillroom_workers.schedule import SCHEDULE
from tests.support import sessions as session_time
from tests.support.celery_process import CeleryProcess, until
from tests.support.cluster import RedisCluster
from tests.support.entries import age
from tests.support.roles import (
    Witness,
    admin,
    environment_of,
    server_with_roles,
    settings_of,
    url_of,
)

ROOT = Path(__file__).parents[2]
ENTRY = b"stillroom:{0}:e:product:1"
WORKER = ("worker", "--without-gossip", "--without-mingle", "-l", "INFO")
ORDER = {"loader": "product", "args": {"id": 3}, "key": "product:3", "token": "0" * 16}
MESSAGES: dict[str, dict[str, Any]] = {
    "stillroom.refresh": ORDER,
    "stillroom.refresh_many": {"orders": [ORDER]},
    "stillroom.invalidate_keys": {"keys": ["a"]},
    "stillroom.invalidate_tags": {"tags": ["t"], "soft": True},
    "stillroom.invalidate_pattern": {"pattern": "z*"},
}
MESSAGE = json.dumps(
    {
        "body": "W1tdLCB7fSwgbnVsbF0=",  # [[], {}, null]
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "stillroom.trim_marks", "id": "held", "lang": "py"},
        "properties": {
            "delivery_tag": "held",
            "body_encoding": "base64",
            "delivery_info": {
                "exchange": "stillroom.maintenance",
                "routing_key": "stillroom.maintenance",
            },
        },
    }
)
COMMANDS = [
    ["health"],
    ["invalidate", "--tag", "t", "--pattern", "x*", "--wait"],
    ["invalidate", "--all"],
    ["sessions", "list", "people"],
    ["sessions", "count"],
    ["sessions", "end", "people"],
    ["bans", "add", "203.0.113.50", "--for", "60s"],
    ["bans", "list"],
    ["bans", "lift", "203.0.113.50"],
    ["bans", "add", "198.51.100.0/25", "--for", "1s"],
    ["limits", "set", "few", "5/60s", "--for", "60s"],
    ["limits", "set", "few", "4/60s", "--for", "60s"],
    ["limits", "show"],
    ["limits", "peek", "203.0.113.7", "few", "--rate", "4/60s"],
    ["limits", "unset", "few"],
    ["limits", "reset", "203.0.113.7", "few"],
    ["abuse", "rules"],
    ["dead-letters", "list"],
    ["explain", "product:1"],
    ["loaders"],
    ["refresh", "product:1"],
    ["pause", "refresh", "--for", "1s"],
    ["resume", "refresh"],
    ["settings"],
    ["agree"],
]
# What an operator does on /operate, in the order of its acts; {…}: what is made for it.
ACTS_DONE: dict[str, dict[str, str]] = {
    "look": {"key": "product:1"},
    "load": {"key": "product:1"},
    "invalidate": {"key": "product:1"},
    "invalidate_tag": {"tag": "t", "soft": "yes"},
    "invalidate_pattern": {"pattern": "x*"},
    "sessions": {"user": "acted"},
    "end_session": {"user": "acted", "handle": "{handle}"},
    "end_sessions": {"user": "acted"},
    "bans": {},
    "ban": {"subject": "203.0.113.60", "for": "1m"},
    "lift": {"subject": "203.0.113.60"},
    "limits": {},
    "peek": {"subject": "203.0.113.7", "limit": "few"},
    "reset": {"subject": "203.0.113.7", "limit": "few"},
    "letters": {},
    "retry": {"id": "{retried}"},
    "drop": {"id": "{dropped}"},
    "pause": {"for": "1m"},
    "resume": {},
}
LOOKS = [
    "INFO",
    "DBSIZE",
    "SCAN 0",
    "ZCARD stillroom:{0}:todo",
    "LLEN stillroom.refresh",
    "ACL LOG",
    "ACL LIST",
    "ACL WHOAMI",
    "CLIENT LIST",
    "CONFIG GET maxmemory*",
    "SLOWLOG GET",
    "SLOWLOG LEN",
    "LATENCY LATEST",
    "LATENCY DOCTOR",
    "MEMORY DOCTOR",
    "MEMORY STATS",
]


class Company:
    """The processes of all roles on one server; with a `cluster`, their state is there.

    `client`: the test's own, which reads and writes all that there is.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        folder: Path,
        client: Any,
        witness: Any = None,
        cluster: RedisCluster | None = None,
    ) -> None:
        self.server, self.folder = server, folder
        self.witness, self.cluster = witness, cluster
        self.acl = folder / "users.acl"
        self.admin = client
        self.flower_port = free_port()
        self.rules = folder / "rules.toml"
        self.rules.write_text("[rules.credential_stuffing]\nshadow = false\n")

    def password(self, role: str) -> str:
        return (self.folder / f"{role}_password").read_text()

    def environment(self, role: str) -> dict[str, str]:
        """Return the environment that the stack gives a process of this role."""
        broker = "producer" if role == "web" else role
        return environment_of(self.server, self.folder, role, broker, self.cluster) | {
            "STILLROOM_LOADERS": "shop",
            "STILLROOM_ABUSE_RULES": str(self.rules),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "deploy"), *filter(None, sys.path)]),
        }

    def settings(self, role: str, broker: str = "", **changes: Any) -> Settings:
        """Return the settings of a room of this role in the test's process."""
        return settings_of(self.server, self.folder, role, broker, self.cluster, **changes)

    @contextmanager
    def process(
        self, role: str, *arguments: str, app: str = "stillroom_workers"
    ) -> Iterator[CeleryProcess]:
        """Start `celery …` as this role; it ends well when asked to."""
        log = self.folder / f"{role}.log"
        process = CeleryProcess(log, self.environment(role), *arguments, app=app)
        try:
            yield process
            assert process.terminate() == 0, process.log
        finally:
            process.kill()

    @contextmanager
    def client(self, role: str) -> Iterator[Any]:
        """Return a plain client as this role."""
        url, password = url_of(self.server, role), self.password(role)
        with redis.Redis.from_url(url, password=password) as client:
            yield client

    def command(self, role: str, *arguments: str) -> str:
        """Run `stillroom …` as this role in this process, because starting Python for each would take long."""
        environment = self.environment(role) | {"STILLROOM_LOADERS": "tests.support.company_shop"}
        done = CliRunner().invoke(command_line, arguments, env=environment)
        assert done.exit_code == 0, (
            f"{role}: {' '.join(arguments)}: {done.output} {done.exception!r}"
        )
        return str(done.stdout)


@contextmanager
def company_at_work(folder: Path, binary: str | None) -> Iterator[Company]:
    """Let every role do its work at the same time, on one server, before the block begins."""
    with server_with_roles(folder, binary) as server, Witness(server) as witness:
        company = Company(server, folder, admin(server), witness)
        do_all_work(company)
        yield company  # all have ended: what a role says in its last moments was heard too


def do_all_work(company: Company) -> None:
    """Start the processes of every role, have each act done once, and end them."""
    with ExitStack() as at_work:
        worker = at_work.enter_context(company.process("worker", *WORKER))
        beat = ("beat", "-l", "INFO", "--pidfile=")
        at_work.enter_context(company.process("beat", *beat, app="tests.support.quick_beat"))
        worker.await_line(" ready.", 200)
        _work_as_web(company)
        _work_as_producer(company, worker)
        _come_back_to_what_a_killed_worker_held(company, worker)
        # Flower starts only now: it, too, gives back a killed worker's messages, and then the worker need not.
        flower = ("flower", "--address=127.0.0.1", f"--port={company.flower_port}")
        at_work.enter_context(company.process("flower", *flower))
        _work_as_flower(company)
        for role in ("web", "worker"):  # people type them in the container of either
            for words in COMMANDS:
                company.command(role, *words)
        _use_dead_letters(company)
        _operate(company)
        _look(company)


def _work_as_web(company: Company) -> None:
    """Work as an app's process: every operation, and a stale value that a worker loads again."""
    settings = company.settings("web", "producer", marks_limit=100)
    with Stillroom(settings) as room, Stillroom(settings) as late:
        options: Any = {"ttl": 60, "swr": 600, "tags": ["product:{id}"], "name": "product"}
        load = room.cache.cached("product:{id}", **options)(_load_here)
        load(1)
        age(company.admin, ENTRY, 61)
        assert load(1)["loaded"] == 0
        until(lambda: load(1)["loaded"] > 0, "the worker's value")
        _use_cache(room)
        room.cache.set("old", 1, ttl=60, tags=["t"])
        room.cache.invalidate_by_tag(*(f"other:{n}" for n in range(150)))
        # More was invalidated than this process remembers: it asks.
        assert late.cache.get("old") == 1
        _order_work(company, room, load)
        _use_sessions(room, company.admin)
        _use_limits(room)
        _use_abuse(room, company.admin)
        _use_health(room, company.admin)
    for rehearsal in ("doctor", "check"):  # of what an app does: a worker makes no sessions
        company.command("web", rehearsal)


def _load_here(id: int) -> dict[str, Any]:
    return {"id": id, "loaded": 0}


def _few(n: int) -> int:
    return n


def _use_cache(room: Any) -> None:
    room.cache.set("a", 1, ttl=60, tags=["t"])
    room.cache.set_many({"b": 1, "c": 2}, ttl=60, tags=["t"])
    assert room.cache.get_many(["a", "b"]) == {"a": 1, "b": 1}
    room.cache.get_entry("a")
    room.cache.get_or_set("d", lambda: 1, ttl=60)
    room.cache.get_or_set_many(["e", "f"], lambda keys: dict.fromkeys(keys, 1), ttl=60)
    assert room.cache.cached("few:{n}", at_once=2)(_few)(1) == 1
    with pytest.raises(ZeroDivisionError):
        room.cache.get_or_set("g", lambda: 1 // 0, ttl=60)
    room.cache.invalidate("a")
    room.cache.invalidate_many(["b"])
    room.cache.invalidate_by_tag("t", soft=True)
    room.cache.get_many(["c"])
    room.cache.invalidate_by_tag("t")
    room.cache.invalidate_by_pattern("d*")
    room.cache.get_many(["c", "d"])
    room.cache.clear()


def _order_work(company: Company, room: Any, load: Any) -> None:
    """Order work for which the worker needs all its rights: hot entries, old marks, patterns to sweep."""
    company.admin.zadd("stillroom:{0}:marks", {"t:long-ago": 1})
    for policy in ("allkeys-lfu", "noeviction"):
        company.admin.config_set("maxmemory-policy", policy)
        room.tasks.load(load, 2)
        until(lambda: (room.cache.get("product:2") or {}).get("loaded"), "a load that was ordered")
        room.tasks.invalidate_tags("product:2", soft=True)
        until(lambda: not company.admin.zcard("stillroom:{0}:todo"), "all that was ordered")
    room.tasks.invalidate_keys("e")
    room.tasks.invalidate_pattern("f*")


def _use_sessions(room: Any, admin: Any) -> None:
    with room.lock("import", wait=1), room.semaphore("reports", 2, wait=1) as held:
        room.state.run(room._locks_body.renew("reports", held._token, 1.0))
    sessions = room.sessions
    first = sessions.create("u1", {"cart": []}, tags=["mobile"], max_per_user=3)
    session_time.age(admin, room, first.handle, 3_600)
    assert sessions.get(first.token)
    sessions.touch(first)
    sessions.update(first, {"theme": "dark"}, remove=["cart"])
    sessions.mutate(first, lambda data: data | {"n": 1})
    second = sessions.rotate(first)
    sessions.get(first.token)
    third = sessions.create("u1", {}, replaces=second)
    for _ in range(4):
        sessions.create("u1", {}, max_per_user=3)
    sessions.end("u1", sessions.list_for_user("u1")[0].handle)
    sessions.destroy(third)
    sessions.destroy_by_tag("mobile")
    sessions.create("people", {})
    sessions.create("u2", {})
    sessions.destroy_for_user("u2")
    sessions.count("u1")
    sessions.count()
    _use_sessions_of_browsers(room)
    forgotten = sessions.create("u3", {})
    record = session_time.record_of(room, forgotten.handle)
    session_time.age(admin, room, forgotten.handle, 2 * 86_400)
    until(lambda: not admin.exists(record), "the sweep of a session that ended")


def _use_sessions_of_browsers(room: Any) -> None:
    """Send the further commands of the middlewares."""
    body, run = room._sessions_body, room.state.run
    visitor = room.sessions.create(None, {"cart": []})
    ended = room.sessions.create(None, {})
    room.sessions.destroy(ended)
    run(body.begin(ended.token, {}))
    session = run(body.succeed(visitor.token, "u4", {}, device="a browser"))
    assert run(body.log_out(session.token))
    assert run(body.is_late(session.token))
    session = room.sessions.create("u4", {}, device="another")
    room.sessions.get(room.sessions.confirm(session).token, fresh=60)
    run(body.log_out(room.sessions.create(None, {}).token, if_empty=True))
    room.sessions.create("u5", {}, tags=["mobile"])
    room.sessions.destroy_all()


def _use_limits(room: Any) -> None:
    few = Limit("few", 2, 60)
    for n in range(5):
        room.limits.check({"ip": "203.0.113.7", "user": "ann"}, [few, API], route=f"/{n}")
    room.limits.peek("203.0.113.8", [few])
    room.limits.refund(room.limits.reserve("203.0.113.8", [AUTH]))
    room.limits.commit(room.limits.reserve("203.0.113.8", [AUTH]))
    room.limits.settle(room.limits.reserve("203.0.113.8", [API], cost=3), 5)
    with room.limits.hold("203.0.113.8", [Limit("held", 2, 60, in_flight=True)]):
        room.limits.wait("203.0.113.8", [Limit("shadow", 1, 60, shadow=True)])
    room.limits.reset("203.0.113.7", [few])


def _use_abuse(room: Any, admin: Any) -> None:
    """Guess passwords until the ban, write an unreadable event, and leave one of a killed worker."""
    admin.xadd("stillroom:abuse", {"what": "no event"})
    until(lambda: admin.xinfo_groups("stillroom:abuse"), "the workers' group", 30)
    left = admin.xadd("stillroom:abuse", {"kind": "csrf_fail", "ip": "203.0.113.9"})
    about = {"idle": 120_000, "force": True, "justid": True}
    admin.xclaim("stillroom:abuse", "workers", "worker", 0, [left], **about)
    for n in range(60):
        room.abuse.report("auth_fail", ip="203.0.113.9", user=f"user{n}", route="/login")
    room.abuse.report("auth_ok", ip="203.0.113.9", user="user1")
    until(lambda: admin.xlen("stillroom:abuse:log"), "a pattern", 30)
    until(lambda: admin.llen("stillroom:bans:times"), "a ban by a rule", 30)
    until(lambda: admin.xlen("stillroom:abuse:aside"), "an event set aside", 30)


def _use_health(room: Any, admin: Any) -> None:
    until(lambda: admin.xlen("stillroom:health"), "a snapshot", 30)
    tomorrow = f"{int(time.time() + 86_400) * 1_000}-0"  # the clock stood ahead for a moment
    admin.xadd("stillroom:health", {"snapshot": "{}"}, id=tomorrow)
    until(lambda: not admin.xrange("stillroom:health", tomorrow), "its end", 30)
    room.health.check()
    room.health.examine()
    room.health.history()
    room.health.past()


def _work_as_producer(company: Company, worker: CeleryProcess) -> None:
    """Work as any Celery client: every task by its name, and an element that no worker can make a task of."""
    broker = company.settings("producer").broker
    with Celery(broker=broker, set_as_current=False) as stranger:
        for name, message in MESSAGES.items():
            queue = "stillroom.refresh" if "refresh" in name else "stillroom.maintenance"
            stranger.send_task(name, kwargs=message, queue=queue, ignore_result=True)
    with company.client("producer") as client:
        client.lpush("stillroom.maintenance", b"no message")
    for name in MESSAGES:
        worker.await_line(f"Task {name}")
    until(lambda: company.admin.xlen("stillroom:dead-letters") == 1, "a dead letter")
    for tick in SCHEDULE:
        worker.await_line(f"Task {tick.task}[")


def _use_dead_letters(company: Company) -> None:
    """Use dead letters with the rights of a worker's container, which may publish and delete."""
    (letter,) = json.loads(company.command("worker", "dead-letters", "list", "--json"))
    company.command("worker", "dead-letters", "show", letter["id"])
    with company.client("producer") as client:
        message = json.loads(MESSAGE)
        message["headers"] |= {"task": "stillroom.unknown", "id": "later"}
        message["properties"]["delivery_tag"] = "later"
        client.lpush("stillroom.maintenance", json.dumps(message))
    until(lambda: company.admin.xlen("stillroom:dead-letters") == 2, "another letter")
    _, other = json.loads(company.command("worker", "dead-letters", "list", "--json"))
    company.command("worker", "dead-letters", "retry", other["id"])
    company.command("worker", "dead-letters", "drop", letter["id"])


def _operate(company: Company) -> None:
    """Do all that an operator can do on the page, which is served with the rights of `web`."""
    settings = company.settings("web", "producer")
    body = json.dumps(
        {"task": "stillroom.trim_marks", "queue": "stillroom.maintenance", "args": [], "kwargs": {}}
    )
    letter = {"kind": "message", "body": body, "reason": "a test", "tries": 1, "cut": 0}
    made = [company.admin.xadd("stillroom:dead-letters", letter).decode() for _ in range(2)]
    assert set(ACTS_DONE) == set(ACTS)
    with Stillroom(settings) as room:
        room.cache.cached("product:{id}", ttl=60, name="product")(_load_here)(1)
        handle = room.sessions.create("acted").handle
        names = {"handle": handle, "retried": made[0], "dropped": made[1]}
        for name, form in ACTS_DONE.items():
            given = {field: text.format(**names) for field, text in form.items()}
            act(room, name, given, "a person")


def _come_back_to_what_a_killed_worker_held(company: Company, worker: CeleryProcess) -> None:
    """Let a message whose visibility timeout is over be delivered again."""
    queue = "stillroom.maintenance"
    message = json.loads(MESSAGE)
    held = json.dumps([message, queue, queue])
    company.admin.hset("stillroom:unacked", "held", held)
    company.admin.zadd("stillroom:unacked_index", {"held": 1})
    worker.await_line("trim_marks[held]")


def _work_as_flower(company: Company) -> None:
    """Load Flower's pages, which ask workers by remote control and the broker for its queues."""
    for path, text in {
        "healthcheck": "OK",
        "workers": "celery@",
        "broker": "stillroom.maintenance",
        "metrics": 'task="stillroom.reclaim"',
    }.items():
        until(lambda path=path, text=text: text in _page(company, path), f"{text} on {path}")


def _page(company: Company, path: str) -> str:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{company.flower_port}/{path}", timeout=10
        ) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return str(error)


def _look(company: Company) -> None:
    """Look as a person with redis-cli, a container's check, and an exporter of metrics do."""
    with company.client("ops") as ops:
        for command in LOOKS:
            ops.execute_command(*command.split())
    with company.client("health") as health:
        health.info()
