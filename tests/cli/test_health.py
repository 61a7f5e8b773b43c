"""`stillroom health` and `stillroom doctor`, as a person and as a script run them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import NoDispatch, Settings, Stillroom, keys
from stillroom.cache import shard_keys
from stillroom.cli.doctor import Line, examined, rights
from stillroom.cli.health import console, shown
from stillroom.embedded import EmbeddedServer
from stillroom.keys import OF_A_SHARD, OF_THE_STATE
from stillroom.moving import ARRIVING, LEFT, Side
from stillroom.scripts import session_shut
from tests.support.crowd import PATIENT
from tests.support.health import count_in_last_minute
from tests.support.processes import STILLROOM, WITHIN, attended, run_to_end

pytestmark = pytest.mark.usefixtures("calm_machine")
SECRET = "canary-password-7f3a"


@pytest.fixture(autouse=True)
def no_psutil_in_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide psutil, so that the findings do not depend on the machine."""
    (tmp_path / "psutil.py").write_text("raise ImportError")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )


def run(url: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return run_to_end([STILLROOM, *arguments], env=os.environ | {"REDIS_URL": url} | changes)


def test_a_script_reads_the_exit_code_and_the_json(own_server: EmbeddedServer) -> None:
    """The exit code is 0 while nothing fails, and stdout is one document, the report. --strict minds warnings."""
    done = run(own_server.url, "health", "--json", "--strict")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "pass"
    with redis.Redis.from_url(own_server.url) as client:
        client.xadd("stillroom:dead-letters", {"kind": "message"})
    assert run(own_server.url, "health", "--json").returncode == 0
    strict = run(own_server.url, "health", "--json", "--strict")
    assert (strict.returncode, json.loads(strict.stdout)["status"]) == (1, "warn")


def test_a_failure_is_exit_code_1() -> None:
    """Nobody listens there: the table says so, with what to do; a mistake in the settings is 2."""
    done = run("redis://127.0.0.1:1", "health")
    assert done.returncode == 1
    assert "no (refused)" in done.stdout
    assert "Is the server running" in done.stdout
    assert run("redis://127.0.0.1:1", "health", STILLROOM_HEALTH_TOKEN="short").returncode == 2


def test_watching_ends_with_ctrl_c(own_server: EmbeddedServer) -> None:
    """A line of JSON every two seconds, and a normal end."""
    command = [STILLROOM, "health", "--watch", "--json"]
    environment = os.environ | {"REDIS_URL": own_server.url}
    with attended(command, environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        times = [json.loads(process.stdout.readline())["time"] for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN) == 0
    assert 1.5 < times[1] - times[0] < 10


def test_watching_in_a_pipe_tells_each_report(own_server: EmbeddedServer) -> None:
    """Without a terminal a whole report is written every two seconds, until the reader has seen enough."""
    command = [STILLROOM, "health", "--watch"]
    environment = os.environ | {"REDIS_URL": own_server.url}
    with attended(command, environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        statuses = (line for line in process.stdout if " UTC, in " in line)
        assert next(statuses) != next(statuses)
        process.stdout.close()
        assert process.wait(WITHIN) == 0


def text_of(report: Any) -> str:
    printer = console()
    with printer.capture() as captured:
        printer.print(shown(report))
    return captured.get()


def test_a_person_reads_the_table(make_room: Any, client: Any) -> None:
    """Status first, then servers, services and advice; what is not known is a question mark or left out."""
    room = make_room()
    count_in_last_minute(client, room, hits=900, misses=100)
    client.xadd(room.keys.dead_letters, {"kind": "message"})
    text = text_of(room.health.check())
    assert text.startswith("WARN")
    assert "hit ratio 90%, hits 900" in text
    assert "no limit" in text
    assert "1 dead letter waits" in text
    assert "good: None." in text
    assert "to do: `stillroom dead-letters list`" in text
    assert "None," not in text


# The doctor


def lines_about(room: Stillroom, about: str) -> list[Line]:
    return [line for line in examined(room) if line.about == about]


def test_a_healthy_server_has_a_right_line_for_everything(make_room: Any, client: Any) -> None:
    """Each thing looked at is told of, and nothing of the rehearsal is left."""
    client.config_set("maxmemory", "1gb")
    room = make_room()
    room.health.ticked("stillroom.snapshot_health")
    lines = list(examined(room))
    client.config_set("maxmemory", "0")
    assert {line.status for line in lines} == {"pass"}, lines
    told = {line.about for line in lines}
    assert told >= {
        "settings",
        "redis connection",
        "redis memory",
        "redis version",
        "redis clock",
        "redis clients",
        "redis operations",
        "redis persistence",
        "redis MEMORY DOCTOR",
        "rights to cache",
        "rights to sessions",
        "pending work",
    }
    left = list(client.keys("*:s:*") + client.keys("*:e:*"))
    assert left == []


def test_what_is_wrong_is_said_with_what_to_do(make_room: Any, client: Any) -> None:
    """An eviction policy that loses tasks is a failure, and the doctor names the setting that cures it."""
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        lines = list(examined(make_room()))
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    wrong = {line.about: line for line in lines if line.status != "pass"}
    assert set(wrong) == {"redis memory"}
    policy = next(line for line in lines if line.about == "redis memory")
    assert policy.status == "fail"
    assert "allkeys-lru may throw away queued tasks" in policy.sentence
    assert "STILLROOM_CACHE_URL" in policy.sentence


@pytest.mark.parametrize(
    ("why", "status", "says"),
    [
        (LEFT, "fail", "16 of 256 shards have moved to another server"),
        (ARRIVING, "warn", "16 of 256 shards are on their way to this server"),
    ],
)
def test_shards_that_a_move_has_shut_are_told(
    make_room: Any, why: bytes, status: str, says: str
) -> None:
    """The doctor says that sessions are unavailable because they have moved, and takes no right for missing."""
    room = make_room()
    shut = [session_shut([room.keys.revocations(shard)], why) for shard in range(16)]
    Side(room.keys, room.state.run).ask(shut)
    (line,) = lines_about(room, "sessions")
    assert (line.status, says in line.sentence) == (status, True)
    assert "move-state" in line.sentence
    (rights,) = lines_about(room, "rights to sessions")
    assert (rights.status, "tryagain" in rights.sentence) == ("warn", True)


def test_without_psutil_the_machine_is_unknown(
    make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Null in the report, no finding, and the doctor says what would tell."""
    monkeypatch.undo()  # look at this machine after all
    monkeypatch.setitem(sys.modules, "psutil", None)
    room = make_room()
    report = room.health.check()
    assert report.system is None
    assert not [found for found in report.advice if found.component == "system"]
    (line,) = lines_about(room, "system")
    assert "stillroom[health]" in line.sentence


@pytest.fixture
def limited(server: EmbeddedServer) -> Iterator[Any]:
    """A user that lacks rights; → how to say which."""
    with redis.Redis.from_url(server.url) as client:

        def give(*rights: str) -> str:
            client.execute_command(
                "ACL", "SETUSER", "limited", "on", f">{SECRET}", "~*", "&*", "+@all", *rights
            )
            return f"redis://limited:{SECRET}@127.0.0.1:{server.port}"

        yield give
        client.execute_command("ACL", "DELUSER", "limited")


@pytest.mark.parametrize(
    ("rights", "about", "status", "says"),
    [
        ("-info", "redis connection", "warn", "noperm"),
        ("-evalsha", "rights to sessions", "fail", "noperm"),
        ("-mget", "rights to cache", "fail", "noperm"),
        ("-evalsha", "rights to limits", "fail", "noperm"),
        ("-xadd", "rights to abuse", "fail", "noperm"),
        ("-time", "redis connection", "fail", "Give this user TIME"),
    ],
)
def test_missing_rights_are_found_by_trying(
    limited: Any, rights: str, about: str, status: str, says: str
) -> None:
    """What the app does is done once, as this user. Without TIME no connection is begun at all."""
    settings = Settings(**{"redis_url": limited(rights)} | PATIENT)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        lines = list(examined(room))
    found = {line.about: line for line in lines if line.status != "pass"}
    assert found[about].status == status
    assert says in found[about].sentence
    assert SECRET not in repr(lines)


@pytest.mark.parametrize("name", [*OF_A_SHARD, *OF_THE_STATE])
def test_a_key_that_another_program_has_written_is_named(
    make_room: Any, client: Any, name: str
) -> None:
    """The doctor names a key in whose place there is one of another type, and says what to do."""
    room = make_room(shards=2)
    own = shard_keys(room.settings)[1 if name in OF_A_SHARD else 0]
    client.sadd(key := getattr(own, name), "foreign")
    (line,) = lines_about(room, "keys")
    assert line.status == "fail"
    kind = (OF_A_SHARD | OF_THE_STATE)[name]
    assert line.sentence.startswith(
        f"{key.decode()} is a set, where Stillroom has a {kind}. Another program"
    )


def test_the_doctor_knows_types_as_the_data_dictionary_does() -> None:
    """The types that the doctor looks for are those of the table in keys.py."""
    table = re.findall(r"^\| (ns:\S+) +\| (\w+)", keys.__doc__ or "", re.MULTILINE)
    told = {
        getattr(keys.Keys("ns"), name).decode(): kind
        for name, kind in (OF_A_SHARD | OF_THE_STATE).items()
    }
    assert told.items() <= set(table)


def test_two_doctors_are_not_in_each_others_way(
    make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one doctor holds what it rehearses with, another finds nothing wrong."""
    room, other = make_room(), make_room()
    found: list[Line] = []
    for service, name in ((room.cache, "get"), (room.limits, "refund"), (room.sessions, "update")):
        act = getattr(service, name)

        def meanwhile(*args: Any, act: Any = act) -> Any:
            found.extend(rights(other))
            return act(*args)

        monkeypatch.setattr(service, name, meanwhile)
    found += rights(room)
    assert len(found) == 20
    assert {line.status for line in found} == {"pass"}, found


def test_a_session_that_is_not_found_again_is_a_line(
    make_room: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that throws away what was just written fails a line, and not the whole examination."""
    room = make_room()
    update = room.sessions.update
    monkeypatch.setattr(room.sessions, "update", lambda *given: client.flushdb() and update(*given))
    found = {line.about: line for line in examined(room)}
    assert found["rights to sessions"].status == "fail"
    assert "is not found again" in found["rights to sessions"].sentence
    assert "pending work" in found


def test_what_would_be_lost_is_told(server: EmbeddedServer, own_server: EmbeddedServer) -> None:
    """The doctor says whether the server keeps a file, and praises no writes where nothing is written."""
    (kept,) = [line for line in lines_on(own_server) if line.about == "redis persistence"]
    (lost,) = [line for line in lines_on(server) if line.about == "redis persistence"]
    assert kept.sentence == "the last writes to the append-only file went well"
    assert lost.sentence.startswith("no append-only file: ")
    assert lost.sentence.endswith("changes since the last snapshot end with this server")


def test_a_refusal_is_told_for_what_it_is(own_server: EmbeddedServer) -> None:
    """A server that is full lacks memory, and its user no right: the doctor says so, and what to do."""
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory", "1")
    found = {line.about: line for line in lines_on(own_server)}
    for about in ("rights to cache", "rights to sessions", "rights to abuse"):
        assert found[about].status == "fail"
        assert "oom" in found[about].sentence
        assert found[about].sentence.endswith(
            "It is full: raise its maxmemory, or find out who fills it (MEMORY STATS)."
        )


def test_a_doctor_whose_user_may_not_count_hits_counts_as_nothing_that_happened(
    own_server: EmbeddedServer,
) -> None:
    """Whoever asks the doctor as a worker's user makes no finding about limits for a minute."""
    with redis.Redis.from_url(own_server.url) as client:
        keys = [f"~stillroom:{glob}" for glob in ("{[0-9]*", "{s*", "abuse*", "counts", "stats*")]
        client.execute_command("ACL", "SETUSER", "worker", "on", ">w", "+@all", *keys)
        settings = Settings(redis_url=own_server.url.replace("//", "//worker:w@"))
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            found = {line.about: line.status for line in examined(room)}
        assert found["rights to limits"] == "fail"
        assert b"limit_degraded" not in client.hgetall("stillroom:counts")


@pytest.mark.parametrize(
    ("command", "about", "says"),
    [
        ("XADD", "rights to abuse", "does not know a command"),
        ("GET", "rights to sessions", "does not know a command"),
    ],
)
def test_a_command_that_is_not_there_is_no_right_that_lacks(
    command: str, about: str, says: str
) -> None:
    """A command that the server does not know is told as such, and ends no examination."""
    with EmbeddedServer(options={"rename-command": f'{command} ""'}) as server:
        found = {line.about: line for line in lines_on(server)}
    assert found[about].status == "fail"
    assert says in found[about].sentence
    assert "Give this user" not in found[about].sentence
    assert "pending work" in found


@pytest.mark.parametrize(
    ("broker", "says"),
    [
        ("redis://127.0.0.1:1", "refused"),
        ("redis://nobody:{secret}@127.0.0.1:{port}", "invalid username-password"),
        ("redis://limited:{secret}@127.0.0.1:{port}", "'lpush'"),
        ("amqp://127.0.0.1:1", "refused"),
    ],
)
def test_a_broker_that_takes_no_orders_is_told(
    server: EmbeddedServer, client: Any, limited: Any, broker: str, says: str
) -> None:
    """The doctor tries whether orders can be published where they go, and publishes none."""
    limited("-lpush")
    url = broker.format(secret=SECRET, port=server.port)
    found = {line.about: line for line in lines_on(server, broker_url=url)}
    assert found["broker"].status == "fail"
    assert "the broker in STILLROOM_BROKER_URL" in found["broker"].sentence
    assert says in found["broker"].sentence
    assert SECRET not in found["broker"].sentence
    assert {line.about: line.status for line in lines_on(server)}["broker"] == "pass"
    assert not client.exists("stillroom.refresh", "stillroom.maintenance")


def lines_on(server: EmbeddedServer, **changes: Any) -> list[Line]:
    settings = Settings(**{"redis_url": server.url} | PATIENT | changes)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        return list(examined(room))


def test_the_doctor_as_a_command(own_server: EmbeddedServer) -> None:
    """Passwords are not printed; a server that is away is a failure with its reason and the system's words."""
    done = run(f"redis://:{SECRET}@127.0.0.1:1", "doctor")
    assert done.returncode == 1
    assert "✗ redis connection" in done.stdout
    assert "refused" in done.stdout
    assert "nothing answers at the address in REDIS_URL (Connection refused)" in done.stdout
    assert SECRET not in done.stdout + done.stderr
    assert run(own_server.url, "doctor").returncode == 0
