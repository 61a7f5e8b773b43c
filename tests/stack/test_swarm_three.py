"""stack.ha.yml on a real Swarm of one node: the primary's container is killed under load, and everybody goes on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.stack.test_swarm import OUR_SERVICES, assert_nothing_was_lost
from tests.support.swarm import (
    Swarm,
    build_image,
    customers,
    docker,
    guide,
    require_engine,
    swarm_with_stack,
    until,
)

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(600)]
SERVERS = {"redis", "redis-2", "redis-3"}
SENTINELS = {"sentinel-1", "sentinel-2", "sentinel-3"}
# From the kill to the next write: two seconds of silence, a vote, and a busy machine.
BACK_WITHIN_S = 20.0
# A process of the app's own: it writes all the time, and says how long it was without an answer at most.
WRITER = """
import sys, time
from stillroom import SessionStoreUnavailable, Settings, Stillroom

def done(act, *given):
    while True:
        try:
            return act(*given)
        except SessionStoreUnavailable:
            time.sleep(0.05)

longest, last, ends, kept = 0.0, time.monotonic(), time.monotonic() + float(sys.argv[1]), []
with Stillroom(Settings(command_timeout=0.5, call_timeout=1)) as room:
    while time.monotonic() < ends:
        kept.append(done(room.sessions.create, "writer").token)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        time.sleep(0.1)
    lost = sum(done(room.sessions.get, token) is None for token in kept)
print(longest, len(kept), lost)
"""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    require_engine()
    build_image()
    with swarm_with_stack(tmp_path_factory.mktemp("stack"), deploy_three) as swarm:
        until(lambda: followers(swarm) == 2 and is_agreed(swarm), "three of each", 60)
        yield swarm


def deploy_three(swarm: Swarm) -> None:
    """Deploy as the guide says; from nothing, because a rolling update of everything takes its time."""
    secrets, deploy, *_ = guide()["Three servers"]
    swarm.type(secrets)
    swarm.type(deploy, DOWN_AFTER_MS="2000")


def is_agreed(swarm: Swarm) -> bool:
    """Return whether each Sentinel knows the two others."""
    question = "sentinel master stillroom"
    return all("num-other-sentinels\n2\n" in ask(swarm, one, question) for one in SENTINELS)


def ask(swarm: Swarm, service: str, *words: str) -> str:
    """Return the output of redis-cli in a container: as `sentinel` for a Sentinel, as `health` for a server."""
    role, port = ("sentinel", "26379") if service in SENTINELS else ("health", "6379")
    line = f"REDISCLI_AUTH=$(cat /run/secrets/{role}_password) redis-cli -p {port} --user {role} "
    (container,) = swarm.containers(service)
    return docker("exec", container, "sh", "-c", line + " ".join(words))


def primary(swarm: Swarm) -> str:
    return ask(swarm, "sentinel-1", "sentinel get-master-addr-by-name stillroom").split()[0]


def is_another_primary(swarm: Swarm, old: str) -> bool:
    """Kill the old primary, again where it is back before the Sentinels agree; return whether another is one."""
    for container in swarm.containers(old):
        swarm.kill(container)
    return primary(swarm) != old


def followers(swarm: Swarm) -> int:
    return ask(swarm, primary(swarm), "info replication").count("state=online")


def started(swarm: Swarm) -> dict[str, Any]:
    """Our containers and when the process in each was started."""
    ids = [one for service in OUR_SERVICES for one in swarm.containers(service)]
    return {one["Id"]: one["State"]["StartedAt"] for one in json.loads(docker("inspect", *ids))}


@contextmanager
def writing(swarm: Swarm, seconds: float) -> Iterator[list[str]]:
    """Let a process in a container of the app write for so long. Gives what it has printed, after the block."""
    command = ["docker", "exec", swarm.containers("web")[0], "python", "-c", WRITER, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told: list[str] = []
        yield told
        out, _ = process.communicate(timeout=seconds + 30)
        told += out.split()


def test_everybody_goes_on_when_the_primary_is_killed(swarm: Swarm) -> None:
    """Another takes over, no process is restarted, what was acknowledged is there, and the killed one follows."""
    assert set(swarm.services()) == OUR_SERVICES | SERVERS | SENTINELS | {"redis-cache"}
    ask_sentinel, doctor = guide()["Three servers"][2:4]
    before, old = started(swarm), primary(swarm)
    assert swarm.type(ask_sentinel).split() == [old, "6379"]
    told = f"the primary is {old}:6379; it is followed by"
    until(lambda: told in swarm.type(f"{doctor} || true"), "all replicas and Sentinels", 30)
    with customers(35, 100) as report:
        with writing(swarm, 25) as written:
            time.sleep(5)  # customers at work
            until(lambda: is_another_primary(swarm, old), "another primary", 60)
        assert_nothing_was_lost(report())
    longest, count, lost = map(float, written)
    print(f"{count:.0f} sessions, {longest:.1f} s without an answer at most")
    assert longest < BACK_WITHIN_S
    assert lost == 0
    swarm.await_healthy()
    until(lambda: followers(swarm) == 2, "the killed one follows", 60)
    assert primary(swarm) != old
    assert started(swarm) == before


@pytest.mark.full
def test_it_goes_back_to_one(swarm: Swarm) -> None:
    """As the guide says: the first server becomes the primary, then the rest is taken away; sessions are there."""
    stop, ask_sentinel, deploy = guide()["Three servers"][4:]
    with writing(swarm, 3):
        pass
    before = sessions(swarm)
    assert before
    swarm.type(stop)
    first = ["redis", "6379"]
    until(lambda: swarm.type(ask_sentinel).split() == first, "the first as the primary", 60)
    swarm.type(deploy)
    until(lambda: set(swarm.services()) == OUR_SERVICES | {"redis", "redis-cache"}, "one", 60)
    until(lambda: swarm.states("redis") == {"completed"}, "the one server", 90)
    swarm.await_updates()  # nobody was rolled back to an address that is gone
    assert sessions(swarm) >= before


def sessions(swarm: Swarm) -> set[str]:
    return set(swarm.redis().scan_iter("stillroom:{s*}:s:*", count=1_000))
