"""`stillroom limits` works as a person types it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom import AUTH, Limit
from stillroom.cli import app

IP = "203.0.113.9"


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command and return what it prints."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["limits", *arguments])
        assert result.exit_code == code, result.output
        return result.output + repr(result.exception or "")

    return run


def read_now(room: Any) -> None:
    """Let a second pass, so that the next check reads the changed limits."""
    room._limits_body._changes.due = 0.0


def test_a_limit_is_changed_shown_and_restored(run: Any, make_room: Any) -> None:
    """A change holds in a running process, shows who made it, and treats text as no markup."""
    room = make_room()
    assert room.limits.check(IP, [AUTH]).remaining == 4
    assert re.match(r"auth is 2/1h until .+ UTC", run("set", "auth", "2/1h", "--for", "2h"))
    shown = run("show")
    assert re.search(r"auth\b.*2/1h", shown)
    assert "as the app says: none is known" in shown
    read_now(room)
    room.limits.check("203.0.113.1", [AUTH])
    assert [bool(room.limits.check(IP, [AUTH])) for _ in range(2)] == [True, False]
    assert "auth is what the app says" in run("unset", "auth")
    assert "auth was not changed" in run("unset", "auth")
    assert "as the app says: auth" in run("show")


def test_a_name_nobody_uses_is_refused(run: Any, make_room: Any) -> None:
    """An unused name is refused with the probable one, and nothing is changed."""
    room = make_room()
    room.limits.check(IP, [AUTH, Limit("api", 10, 60)])
    assert "'apii'" in (said := run("set", "apii", "2/1h", code=1))
    assert "did you mean api?" in said
    assert room.limits.changes() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("auth", "2"), "2000/1h"),
        (("auth", "5/999d"), "window"),
        (("auth", "2/1h", "--for", "soon"), "soon"),
        (("auth", "2/1h", "--for", "400d"), "30"),
    ],
)
def test_what_cannot_be_read_is_refused(
    run: Any, make_room: Any, arguments: tuple[str, ...], said: str
) -> None:
    """A rate or time that cannot be read is refused with the given text and the right form."""
    make_room().limits.check(IP, [AUTH])
    assert said in run("set", *arguments, code=1)


def test_what_somebody_has_used_is_forgotten(
    run: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's used quota is reset by address, or by another subject, whose hash needs the app's pepper."""
    pepper = "q" * 32
    room, mine = make_room(session_peppers=pepper), Limit("mine", 3, 60, by="user")
    for _ in range(2):
        room.limits.check({"ip": IP, "user": "ann"}, [AUTH, mine])
    assert "is forgotten" in run("reset", IP, "auth")
    assert "PEPPERS" in run("reset", "ann", "mine", "--by", "user", code=1)
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", pepper)
    assert "is forgotten" in run("reset", "ann", "mine", "--by", "user")
    assert room.limits.peek(IP, [AUTH]).remaining == 5
    assert room.limits.peek({"user": "ann"}, [mine]).remaining == 3
