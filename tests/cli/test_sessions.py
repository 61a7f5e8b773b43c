"""`stillroom sessions` works as a person types it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command and return what it prints."""
    monkeypatch.setenv("REDIS_URL", server.url)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["sessions", *arguments])
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_list_shows_handles_and_no_tokens(run: Any, make_room: Any) -> None:
    """The list shows handles and meta without tokens, and no text is taken for markup."""
    sessions = make_room().sessions
    made = [
        sessions.create("u1", tags=["mobile"], meta={"agent": "[red]Firefox"}) for _ in range(2)
    ]
    sessions.create("u2")
    shown = run("list", "u1")
    assert all(one.handle in shown and one.token not in shown for one in made)
    assert all(one.token[3:] not in shown for one in made)
    assert "mobile" in shown
    assert "[red]Firefox" in shown
    assert "2 sessions" in shown
    assert "0 sessions" in run("list", "nobody")
    assert "3 sessions" in run("count")


def test_end_ends_one_all_but_one_or_all(run: Any, make_room: Any) -> None:
    """`end` ends one session, all but one, or all of a user, without the app's pepper."""
    sessions = make_room().sessions
    made = [sessions.create("u1") for _ in range(4)]
    assert "1 session ended" in run("end", "u1", "--handle", made[0].handle)
    assert "0 sessions ended" in run("end", "u2", "--handle", made[1].handle)
    assert "2 sessions ended" in run("end", "u1", "--keep", made[1].handle)
    assert [sessions.get(one) is not None for one in made] == [False, True, False, False]
    assert "give one" in run("end", "u1", "--handle", "a", "--keep", "b", code=2)
    assert "1 session ended" in run("end", "u1")
    assert sessions.count() == 0


def test_all_ends_everybodys(run: Any, make_room: Any) -> None:
    """`--all` ends all users' and anonymous sessions, and is refused beside a user or a handle."""
    sessions = make_room().sessions
    made = [sessions.create(user) for user in ("u1", "u2", None)]
    for slip in (("u1", "--all"), ("--all", "--keep", made[0].handle), ()):
        assert "say whose" in run("end", *slip, code=2)
    assert sessions.count() == 3
    assert "3 sessions ended" in run("end", "--all")
    assert [sessions.get(one) for one in made] == [None] * 3
