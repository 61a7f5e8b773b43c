"""`stillroom bans` and `stillroom abuse` work as a person types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom import BanRefused
from stillroom.abuse.rules import BUILT_IN
from stillroom.cli import app
from tests.support.abuse import put


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command and return what it prints."""
    monkeypatch.setenv("REDIS_URL", server.url)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments)
        if isinstance(result.exception, BanRefused):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_add_list_and_lift(run: Any, make_room: Any) -> None:
    """A ban is in force when the command returns and gone when lifted, and text is not taken for markup."""
    room = make_room()
    said = run("bans", "add", "203.0.113.9", "--for", "10m", "--reason", "[red]loud")
    assert said.startswith("203.0.113.9 is banned until ")
    assert not room.limits.check("203.0.113.9", [_default()]).allowed
    run("bans", "add", "2001:db8:1::/48", "--for", "30d")
    shown = run("bans", "list")
    assert "203.0.113.9" in shown
    assert "operator" in shown
    assert "[red]loud" in shown
    assert "2 bans" in shown
    assert "1 ban;" in run("bans", "list", "--limit", "1")
    assert "the ban of 203.0.113.9 is lifted" in run("bans", "lift", "203.0.113.9")
    assert "203.0.113.9 was not banned\n" in run("bans", "lift", "203.0.113.9")
    assert [ban.subject for ban in room.abuse.bans()] == ["2001:db8:1::/48"]


def test_a_ban_without_a_reason_is_a_whole_sentence_in_the_log(
    run: Any, make_room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's line on a ban ends with the reason, or with who banned."""
    make_room()
    run("bans", "add", "203.0.113.7", "--for", "1h")
    run("bans", "add", "203.0.113.8", "--for", "1h", "--reason", "spam")
    of_abuse = [one.message for one in caplog.records if one.name == "stillroom.abuse"]
    assert of_abuse == [
        "203.0.113.7 is banned for 3600 s by an operator",
        "203.0.113.8 is banned for 3600 s by an operator: spam",
    ]


def test_a_network_is_banned_and_lifted_by_its_name(run: Any, make_room: Any) -> None:
    """A network is banned and lifted by name, and lifting one of its addresses says what is banned."""
    room = make_room()
    assert run("bans", "add", "203.0.113.9/24", "--for", "10m").startswith("203.0.113.0/24 is")
    assert "203.0.113.0/24" in run("bans", "list")
    assert room.limits.check("203.0.113.77", [_default()]).banned
    said = run("bans", "lift", "203.0.113.77")
    assert "203.0.113.77 was not banned; 203.0.113.0/24 is" in said
    assert "is lifted" in run("bans", "lift", "203.0.113.0/24")
    assert make_room().limits.check("203.0.113.78", [_default()])


def test_who_lifts_a_ban_hears_of_others_that_hold(run: Any, make_room: Any) -> None:
    """Where an address is banned by itself and with its network, lifting one ban names the other one."""
    room = make_room()
    for subject in ("203.0.113.7", "203.0.113.0/24"):
        room.abuse.ban(subject, 600)
    said = run("bans", "lift", "203.0.113.7")
    assert said.startswith("the ban of 203.0.113.7 is lifted; 203.0.113.0/24 is banned\n")
    for subject in ("203.0.113.7", "203.0.113.9"):
        room.abuse.ban(subject, 600)
    said = run("bans", "lift", "203.0.113.0/24")
    assert "203.0.113.9, 203.0.113.7 are banned" in said
    assert "; there may be more: --limit" in run("bans", "list", "--limit", "1")
    assert "2 bans\n" in run("bans", "list", "--limit", "3")


def test_a_ban_of_no_address_is_in_nobody_s_way(run: Any, make_room: Any, client: Any) -> None:
    """A ban whose subject somebody else wrote, and which is no address, does not keep others from being lifted."""
    room = make_room()
    room.abuse.ban("203.0.113.7", 600)
    client.zadd(room.keys.bans, {"everybody": 4e12})
    client.set(room.keys.ban("everybody"), "{}")
    assert run("bans", "lift", "203.0.113.7") == "the ban of 203.0.113.7 is lifted\n"


def _default() -> Any:
    from stillroom import DEFAULT

    return DEFAULT


def test_what_a_rule_banned_is_listed_with_it(
    run: Any, make_room: Any, client: Any, rules: Path
) -> None:
    """A rule's ban is listed with the rule's name in the operator's place."""
    room = make_room(abuse_rules=rules)
    put(client, room, "denied", ip="203.0.113.9", n="64")
    room.abuse.scan()
    assert "hammer" in run("bans", "list")


def test_a_mistake_is_a_sentence(run: Any) -> None:
    """An invalid time and a client that cannot be banned are answered with a sentence."""
    assert "90s, 30m, 2h or 7d" in run("bans", "add", "203.0.113.9", "--for", "soon", code=2)
    assert "--for" in run("bans", "add", "203.0.113.9", code=2)
    with pytest.raises(BanRefused, match="is private"):
        run("bans", "add", "10.0.0.1", "--for", "10m")
    assert "0 bans" in run("bans", "list")


def test_the_rules_in_force_are_shown(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rules in force are shown with the operator's changes, without asking a server."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    shown = run("abuse", "rules")
    assert all(name in shown for name in BUILT_IN)
    assert shown.count("would ban 300 s (shadow)") == 5
    (path := tmp_path / "rules.toml").write_text("[rules.scanner]\nshadow = false\nban = 60")
    monkeypatch.setenv("STILLROOM_ABUSE_RULES", str(path))
    assert "ban 60 s" in run("abuse", "rules")
