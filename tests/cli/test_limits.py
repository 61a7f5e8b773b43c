"""`stillroom limits` works as a person types it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom import AUTH, Limit
from stillroom.cli import app
from stillroom.cli.doctor import rights

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


def test_what_the_doctor_used_is_no_limit_of_an_app(run: Any, make_room: Any) -> None:
    """The limit that `stillroom doctor` rehearses with is not listed among those of the app."""
    room = make_room()
    list(rights(room))
    assert "as the app says: none is known" in run("show")
    room.limits.check(IP, [AUTH])
    assert "as the app says: auth\n" in run("show")


MODULE = """
from flask import Flask
from stillroom import AUTH, Limit, Stillroom
from stillroom.web.flask import StillroomLimits, limited
room = Stillroom()
app = Flask(__name__)
StillroomLimits(app, room, default=[Limit("rest", 100, 60)])
app.add_url_rule("/login", "login", limited(AUTH)(lambda: ""), methods=["POST"])
app.add_url_rule("/mine", "mine", limited(Limit("mine", 10, 60), by="user")(lambda: ""))
"""


def test_what_somebody_has_used_is_shown(
    run: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a subject has used is shown by the limits that the app has, or that are changed for now."""
    name = f"peeked_{abs(hash(tmp_path)):x}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "p" * 40)
    room = make_room(session_peppers="p" * 40)
    for _ in range(3):
        room.limits.check(IP, [AUTH])
    room.limits.check({"user": "ann"}, [Limit("mine", 10, 60, by="user")])
    app = ("--app", f"{name}:app")
    shown = run("peek", IP, *app)
    assert re.search(r"auth +│ +5/5m +│ +3 +│ +2", shown)
    assert re.search(r"rest +│ +100/1m +│ +0 +│ +100", shown)
    told = json.loads(run("peek", "ann", "mine", "--by", "user", *app, "--json").rstrip("'"))
    assert [(one["name"], one["used"], one["left"]) for one in told["limits"]] == [("mine", 1, 9)]
    run("set", "auth", "4/5m")
    assert re.search(r"auth +│ +4/5m +│ +3 +│ +1", run("peek", IP, "auth", *app))
    run("unset", "auth")
    assert re.search(r"auth +│ +9/5m +│ +3 +│ +6", run("peek", IP, "auth", "--rate", "9/5m"))
    assert "did you mean auth?" in run("peek", IP, "auht", *app, code=1)
    said = run("peek", IP, code=1)
    assert "no limit by ip is in" in said
    assert "; it counts by user; --app" in run("peek", "ann", "mine", "--by", "usr", *app, code=1)
    assert "; those there count by ip, user; --app" in run(
        "peek", "ann", "--by", "usr", *app, code=1
    )
    assert "--app says where the limits are" in said
    assert room.limits.peek(IP, [AUTH]).remaining == 2
    sys.modules.pop(name).room.close()


def test_a_name_nobody_uses_is_refused(run: Any, make_room: Any) -> None:
    """An unused name is refused with the probable one, and nothing is changed."""
    room = make_room()
    room.limits.check(IP, [AUTH, Limit("api", 10, 60)])
    assert "'apii'" in (said := run("set", "apii", "2/1h", code=1))
    assert "did you mean api?" in said
    assert room.limits.changes() == []
    assert "did you mean auth?" in run("reset", IP, "auht", code=1)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("set auth 2", ("RATE", "2000/1h")),
        ("set auth 5/999d", ("RATE", "window")),
        ("set auth 2/1h --for soon", ("--for", "soon")),
        ("set auth 2/1h --for 400d", ("--for", "30")),
        ("peek 203.0.113.9 auth --rate 5", ("--rate", "2000/1h")),
        ("peek 203.0.113.9 --rate 5/300s", ("--rate", "say its name")),
    ],
)
def test_what_cannot_be_read_is_refused(
    run: Any, make_room: Any, command: str, said: tuple[str, str]
) -> None:
    """A rate or time that cannot be read is wrong usage (2), which names the option and shows the right form."""
    make_room().limits.check(IP, [AUTH])
    refused = run(*command.split(), code=2)
    assert all(word in refused for word in said)


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
    assert "this user has used nothing" in run("reset", "ann", "mine", "--by", "user")
    assert room.limits.peek(IP, [AUTH]).remaining == 5
    assert room.limits.peek({"user": "ann"}, [mine]).remaining == 3


def test_who_was_not_counted_is_not_told_as_forgotten(
    run: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever spells the subject or its kind otherwise than the app reads that nothing was counted there."""
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "q" * 32)
    room, search = make_room(session_peppers="q" * 32), Limit("search", 3, 60, by="x_api_key")
    room.limits.check({"x_api_key": "k1"}, [search])
    assert "this user has used nothing" in run("reset", "k1", "search", "--by", "user")
    said = run("reset", "k2", "search", "--by", "x_api_key")
    assert (
        "this x_api_key has used nothing. By what search counts, `stillroom routes` shows" in said
    )
    assert room.limits.peek({"x_api_key": "k1"}, [search]).remaining == 2
    assert "is forgotten" in run("reset", "k1", "search", "--by", "X-API-Key")
    assert "'ann' is no address: say --by user" in run("reset", "ann", "search", code=2)
