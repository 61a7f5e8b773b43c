"""Every command that prints something for people prints it as one JSON document, too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.dead_messages import KIND
from stillroom.limits import Limit
from tests.cli.test_dead_letters import ORDER

RUN_UNTIL_THEY_ARE_STOPPED = {"up", "worker"}  # what they print is a log
EVIL = "ünï\x1b[31m\u202e"  # chosen by a visitor

MODULE = """
from stillroom import AUTH, Route, Routes, Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", tags=["products"])
def product(number: int) -> int:
    return number
routes = Routes([Route("/login", [AUTH], methods=["POST"])])
"""

# Each command with arguments, and what its document holds. {name}: what the fixture has made.
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "--version": ([], {"stillroom", "python"}),
    "abuse rules": ([], {"name", "kinds", "threshold"}),
    "agree": ([], {"setting", "agreed", "mine"}),
    "bans add": (["203.0.113.8", "--for", "1m", "--reason", EVIL], {"subject", "until", "reason"}),
    "bans lift": (["203.0.113.5"], {"subject", "was_banned"}),
    "bans list": ([], {"subject", "until", "reason"}),
    "check": ([], {"status", "about", "sentence"}),
    "dead-letters drop": (["{letter}"], {"dropped"}),
    "dead-letters list": ([], {"id", "kind", "body"}),
    "dead-letters retry": (["{letter}"], {"retried"}),
    "dead-letters show": (["{letter}"], {"id", "kind", "body"}),
    "docs": (["howto/tags"], {"page", "text"}),
    "doctor": ([], {"status", "about", "sentence"}),
    "explain": (["product:7"], {"outcome", "why"}),
    "health": ([], {"status", "servers"}),
    "invalidate": (["product:7", "--tag", EVIL], {"held_a_value", "tags", "freed"}),
    "limits peek": (["203.0.113.7", "auth"], {"banned", "limits"}),
    "limits reset": (["203.0.113.7", "shop"], {"reset", "by", "had_used"}),
    "limits set": (["shop", "5/1m"], {"name", "quota", "until"}),
    "limits show": ([], {"names", "changes"}),
    "limits unset": (["shop"], {"unset", "was_changed"}),
    "loaders": ([], {"name", "key", "loads"}),
    "move-state": (["--from", "{before}", "--replace"], {"shards", "keys", "bans"}),
    "pause": (["refresh"], {"paused", "seconds"}),
    "refresh": (["product:8"], {"key", "loader"}),
    "resume": (["refresh"], {"resumed", "was_paused"}),
    "routes": ([], {"path", "limits"}),
    "secrets": (["{folder}"], {"folder", "files"}),
    "sessions count": ([], {"sessions"}),
    "sessions end": (["u1"], {"ended"}),
    "sessions list": (["u1"], {"handle", "last_seen", "meta"}),
    "settings": ([], {"name", "value", "source"}),
    "show": (["product:7"], {"outcome", "tags", "loader"}),
}


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command that does something, by the words that call it."""
    children = getattr(command, "commands", {})
    if not children:
        yield name, command
    for word, child in children.items():
        yield from leaves(child, f"{name} {word}".strip())


ALL = dict(leaves(typer.main.get_command(app)))


@pytest.fixture
def made(
    server: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """Make something for each command to find, with texts that visitors chose, and return their names."""
    name = f"printed_{abs(hash(tmp_path)):x}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("STILLROOM_LOADERS", name)
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "p" * 40)
    room = make_room(session_peppers="p" * 40)
    room.cache.set("product:7", 7)
    room.sessions.create("u1", tags=["mobile"], meta={"agent": EVIL})
    room.abuse.ban("203.0.113.5", 600, EVIL)
    room.limits.check("203.0.113.7", [Limit("shop", 100, 60)])
    letter = room.state.run(room.dead_letters.add(KIND, json.dumps(ORDER), EVIL))
    yield {
        "letter": str(letter),
        "folder": str(tmp_path / "secrets"),
        "before": f"{server.url}/1",
    }
    if name in sys.modules:
        sys.modules.pop(name).room.close()


def test_each_command_has_the_option() -> None:
    """Each command has --json and is in the table, but those that run until they are stopped."""
    assert set(ALL) - RUN_UNTIL_THEY_ARE_STOPPED == set(COMMANDS) - {"--version"}
    for name, command in ALL.items():
        options = [option for one in command.params for option in one.opts]
        assert ("--json" in options) == (name not in RUN_UNTIL_THEY_ARE_STOPPED), name


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_printed_is_one_document(name: str, made: dict[str, str]) -> None:
    """What a command prints with --json is one JSON document in ASCII, with the fields that people are shown."""
    arguments, fields = COMMANDS[name]
    words = [*name.split(), *[word.format(**made) for word in arguments], "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 1), (result.output, result.exception)
    assert result.stdout.isascii()
    document = json.loads(result.stdout)
    first = document[0] if isinstance(document, list) else document
    assert fields <= set(first), document


def test_a_number_that_json_lacks_is_text(
    made: dict[str, str], make_room: Callable[..., Any]
) -> None:
    """NaN and Infinity in a value or in the meta of a session are text, because other programs read neither."""
    room = make_room(session_peppers="p" * 40)
    room.cache.set("odd", {"a": float("nan"), "b": [float("-inf"), 1e300, 7]})
    room.sessions.create("u2", meta={"score": float("inf")})
    found = [
        json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout, parse_constant=pytest.fail)
        for words in (["show", "odd", "--value"], ["sessions", "list", "u2"])
    ]
    assert found[0]["value"] == {"a": "NaN", "b": ["-Infinity", 1e300, 7]}
    assert found[1][0]["meta"] == {"score": "Infinity"}


def test_the_pages_are_listed_as_json() -> None:
    """Without a page `docs` lists their names."""
    pages = json.loads(CliRunner().invoke(app, ["docs", "--json"]).stdout)
    assert {"howto/tags", "operating"} <= set(pages)


def test_no_secret_is_in_the_document(made: dict[str, str]) -> None:
    """The document of `secrets` names files and holds nothing of what is in them."""
    printed = CliRunner().invoke(app, ["secrets", made["folder"], "--json"]).stdout
    for path in Path(made["folder"]).iterdir():
        assert path.read_text().strip() not in printed


def test_a_mistake_is_no_output(made: dict[str, str]) -> None:
    """A mistake is told on stderr, so a program that reads the document reads nothing."""
    result = CliRunner().invoke(app, ["bans", "add", "nobody", "--for", "1m", "--json"])
    assert result.exit_code != 0
    assert result.stdout == ""


def test_the_progress_is_no_output(
    made: dict[str, str], make_room: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document of `invalidate --wait` stands alone on stdout and says whether the memory was freed."""
    make_room().cache.set("tagged", 1, tags=["t"])
    monkeypatch.setattr(sys.modules["stillroom.cli.invalidate"], "WORKER_WITHIN_S", 0.0)
    result = CliRunner().invoke(app, ["invalidate", "--tag", "t", "--wait", "--json"])
    assert json.loads(result.stdout)["freed"] is True
