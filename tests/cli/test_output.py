"""The command prints any text as text, in any encoding and width, and to an output that fails."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import tempfile
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest

from stillroom.dead_messages import KIND
from stillroom.embedded import EmbeddedServer
from tests.cli.test_dead_letters import ORDER
from tests.support import nursery
from tests.support.health import count_in_last_minute
from tests.support.processes import STILLROOM
from tests.unit.test_shown import HOSTILE

pytestmark = pytest.mark.any_server

EVIL = "Mozilla \x1b]0;owned\x07\x9b31m\u202e\n10:00:00  FORGED  [red]x[/red] — ünï"
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run(server: EmbeddedServer) -> Run:
    """Run the command in a process of its own; return its bytes."""

    def run(
        *arguments: str, into: str = "", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        words = [STILLROOM, *arguments]
        variables = os.environ | {"REDIS_URL": server.url} | environment
        if not into:
            return nursery.run(words, variables)
        words = ["sh", "-c", f'exec "$@" {into}', "sh", *words]
        return subprocess.run(words, env=variables, capture_output=True, timeout=60, check=False)

    return run


@pytest.fixture
def visited(make_room: Any, client: Any) -> None:
    """Let a visitor, a banned client and a producer choose hostile text."""
    room = make_room(session_peppers="p" * 32)
    for text in (EVIL, *HOSTILE[:5]):
        room.sessions.create("u1", tags=["mobile"], meta={"agent": text})
    room.abuse.ban("203.0.113.5", 600, EVIL.replace("\n", " "))
    room.state.run(room.dead_letters.add("message", json.dumps({"task": EVIL}), EVIL))
    room.limits.change("api", 5, 60, 600, by=EVIL[:60])
    room.upkeep.pause("refresh", 600, by=EVIL)
    room.state.run(room.agreed.compare())
    for name, said in client.hgetall(room.keys.agreed).items():
        value, moment, _ = said.split(b"\t")
        client.hset(room.keys.agreed, name, b"\t".join([value, moment, f"[/red]{EVIL}".encode()]))


COMMANDS = [
    ("sessions", "list", "u1"),
    ("bans", "list"),
    ("abuse", "rules"),
    ("dead-letters", "list"),
    ("doctor",),
    ("health",),
    ("health", "--json"),
    ("agree",),
    ("agree", "--json"),
    ("limits", "show"),
    ("invalidate", EVIL),
    ("bans", "lift", "203.0.113.99"),
    ("bans", "add", "no\x1b[31maddress", "--for", "1m"),
    ("dead-letters", "drop", "\x1b[31m"),
    ("dead-letters", "list", "--json"),
]


@pytest.mark.usefixtures("visited")
@pytest.mark.parametrize(
    "encoding",
    [
        "utf-8",
        "ascii",
        *(pytest.param(one, marks=pytest.mark.full) for one in ("latin-1", "cp1252")),
    ],
)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words)[:30])
def test_text_of_others_is_text(run: Run, command: tuple[str, ...], encoding: str) -> None:
    """Foreign text makes no escape sequence, forged row or traceback on any terminal."""
    done = run(*command, PYTHONIOENCODING=encoding, COLUMNS="60")
    printed = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r\x00")
    assert not any(line.startswith("10:00:00  FORGED") for line in printed.splitlines())
    assert done.returncode in (0, 1, 2)
    if "--json" in command:
        json.loads(done.stdout)


def on_a_terminal(words: Sequence[str], environment: Mapping[str, str], columns: int) -> str:
    """Run a program on a terminal of so many columns; return what is shown."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    child = nursery.start(words, environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = []
    with suppress(OSError):  # the end of a terminal that nobody writes to any more
        while some := os.read(ours, 65_536):
            shown.append(some)
    os.close(ours)
    assert child.wait(60) in (0, 1)
    return b"".join(shown).decode()


@pytest.mark.usefixtures("visited")
@pytest.mark.parametrize("command", COMMANDS[:6], ids=" ".join)
def test_a_narrow_terminal_shows_it_too(server: EmbeddedServer, command: tuple[str, ...]) -> None:
    """A real terminal of twenty columns wraps the output."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"REDIS_URL": server.url, "TERM": "xterm"}
    shown = on_a_terminal([STILLROOM, *command], environment, 20)
    assert "Traceback" not in shown
    assert not any(evil in shown for evil in ("\x1b]0", "\x9b", "\u202e"))
    assert len(shown) > 20


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_cuts_no_word_off(
    server: EmbeddedServer, client: Any, make_room: Any, columns: int
) -> None:
    """What an operator types again, or looks for, is not cut off on a terminal that is too narrow for a table."""
    room = make_room(session_peppers="p" * 32)
    count_in_last_minute(client, room, **{"loader:hits:catalogue_of_all_products": 7})
    session = room.sessions.create("u1", meta={"agent": "Mozilla/5.0 (X11; Linux x86_64)"})
    letter = room.state.run(room.dead_letters.add("message", "{}", "because"))
    room.abuse.ban("2001:db8:1:2::/64", 600, "credential stuffing of the login, by somebody")

    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"REDIS_URL": server.url, "TERM": "xterm"}

    def shown(*command: str) -> str:
        return "".join(on_a_terminal([STILLROOM, *command], environment, columns).split())

    assert session.handle in shown("sessions", "list", "u1")
    assert letter in shown("dead-letters", "list")
    assert "2001:db8:1:2::/64" in shown("bans", "list")
    assert "catalogue_of_all_products" in shown("loaders")


@pytest.mark.parametrize(
    "command", [("health",), ("doctor",), ("abuse", "rules"), ("health", "--json")]
)
def test_an_output_that_is_full_is_a_sentence(
    server: EmbeddedServer, command: tuple[str, ...]
) -> None:
    """A full disk is one line on stderr and exit code 1."""
    words, environment = [STILLROOM, *command], os.environ | {"REDIS_URL": server.url}
    with open("/dev/full", "wb") as full, tempfile.TemporaryFile() as said:
        assert nursery.start(words, environment, stdout=full, stderr=said).wait(60) == 1
        said.seek(0)
        told = said.read().decode()
    assert told.splitlines()[-1] == "can't write the output: No space left on device"
    assert "Traceback" not in told


@pytest.mark.parametrize("command", [("abuse", "rules"), ("sessions", "count"), ("doctor",)])
def test_whoever_stops_reading_hears_no_complaint(
    server: EmbeddedServer, command: tuple[str, ...]
) -> None:
    """A reader that stops, as in `stillroom abuse rules | head -1`, causes no complaint and no exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    with tempfile.TemporaryFile() as said:
        environment = os.environ | {"REDIS_URL": server.url, "STILLROOM_SESSION_PEPPERS": "p" * 32}
        child = nursery.start([STILLROOM, *command], environment, stdout=writer, stderr=said)
        os.close(writer)
        assert child.wait(60) == 0
        said.seek(0)
        assert said.read() == b""


def test_all_is_done_though_nobody_reads_on(server: EmbeddedServer, make_room: Any) -> None:
    """A command of several acts does them all before it says so, to a reader that may have gone."""
    room = make_room()
    room.cache.set("a", 1)
    room.cache.set("b", 1, tags=["t"])
    for _ in range(2):
        room.state.run(room.dead_letters.add(KIND, json.dumps(ORDER), "because"))
    environment = os.environ | {"REDIS_URL": server.url}
    for command in (("invalidate", "a", "--tag", "t"), ("dead-letters", "retry", "--all")):
        reader, writer = os.pipe()
        os.close(reader)
        child = nursery.start([STILLROOM, *command], environment, stdout=writer)
        os.close(writer)
        assert child.wait(60) == 0
    assert room.cache.get("b") is None
    assert room.state.run(room.dead_letters.list(10)) == []


def test_a_refused_letter_is_named_though_nobody_reads_on(
    server: EmbeddedServer, make_room: Any
) -> None:
    """What `dead-letters retry --all` can't send is said on stderr, also where nobody reads what it sent."""
    room = make_room()
    for body in (ORDER, {}):
        room.state.run(room.dead_letters.add(KIND, json.dumps(body), "because"))
    reader, writer = os.pipe()
    os.close(reader)
    with tempfile.TemporaryFile() as said:
        command = [STILLROOM, "dead-letters", "retry", "--all"]
        environment = os.environ | {"REDIS_URL": server.url}
        child = nursery.start(command, environment, stdout=writer, stderr=said)
        os.close(writer)
        assert child.wait(60) == 0
        said.seek(0)
        assert b"no task can be made of this letter" in said.read()


def test_a_closed_output_is_no_traceback(run: Run) -> None:
    """A command whose output is closed does its work, and says nothing."""
    done = run("limits", "unset", "api", into=">&-")
    assert (done.returncode, done.stderr) == (0, b"")
