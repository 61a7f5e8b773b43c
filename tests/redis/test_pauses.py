"""`stillroom pause refresh` makes workers leave refreshes alone for a while and ends by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom import InvalidArgument, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache import ordering, reclaim
from stillroom.cli import app
from stillroom.pauses import Pauses
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room

pytestmark = pytest.mark.usefixtures("calm_machine")


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, places: dict[str, Any]) -> Iterator[Any]:
    with open_room(request.param, Settings(**places | PATIENT), NoDispatch()) as room:
        yield room


def look_again(room: Any) -> None:
    """Let a second pass, so that the pause is read again."""
    pauses: Pauses = getattr(room, "inner", room)._pauses
    pauses._due = 0.0


def test_refreshes_are_paused_and_go_on(room: Any, client: Any) -> None:
    """A pause is seen within a second, is a finding while it lasts, and ends by itself."""
    assert room.upkeep.refreshes_are_paused() is False
    room.upkeep.pause("refresh", 600, by="ann")
    assert room.upkeep.refreshes_are_paused() is False, "asked once a second"
    look_again(room)
    assert room.upkeep.refreshes_are_paused() is True
    (paused,) = room.upkeep.pauses()
    assert (paused.what, paused.by) == ("refresh", "ann")
    assert 0 < client.pttl(room.keys.paused("refresh")) <= 600_000
    (found,) = [one for one in room.health.check().advice if one.code == "paused"]
    assert "for 10 min more, by ann" in found.what
    assert room.upkeep.resume("refresh") is True
    assert room.upkeep.resume("refresh") is False
    look_again(room)
    assert room.upkeep.refreshes_are_paused() is False
    assert not [one for one in room.health.check().advice if one.code == "paused"]


def test_who_paused_forges_no_line_of_the_log(room: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A finding is logged on one line of text, whatever name the one who pauses gives himself."""
    room.upkeep.pause("refresh", 600, by="ann\x1b[2J\r\nCRITICAL forged\u202e")
    room.upkeep.snapshot()
    (line,) = [one for one in caplog.messages if "Refreshes are paused" in one]
    assert line.isprintable()
    assert r"by ann\x1b[2J\r\nCRITICAL" in line


def test_workers_load_nothing_meanwhile(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft invalidations and orders to load wait for the end of a pause; other orders are carried out in it."""
    loads: list[int] = []

    @room.cache.cached("product:{id}", ttl=600, swr=600, tags=["products"])
    def product(id: int) -> int:
        loads.append(id)
        return len(loads)

    monkeypatch.setattr(ordering, "PUT_OFF_MS", 1)
    monkeypatch.setattr(reclaim, "PUT_OFF_MS", 1)
    assert [product(1), product(2)] == [1, 2]
    room.cache.set("page", "old", tags=["pages"])
    room.upkeep.pause("refresh", 600)
    look_again(room)
    room.cache.invalidate_by_tag("products", soft=True)
    room.upkeep.order_load("product", {"id": 3})
    room.tasks.invalidate_tags("pages")
    report = room.upkeep.reclaim(budget=0.2)
    assert (loads, report["left"], report["refreshed"]) == ([1, 2], 2, 0)
    assert room.cache.get("page") is None
    room.upkeep.resume("refresh")
    look_again(room)
    assert room.upkeep.reclaim()["left"] == 0
    assert sorted(loads[2:]) == [1, 2, 3]


def test_what_another_writer_put_there_pauses_too(room: Any, client: Any) -> None:
    """A pause that another program wrote counts without a name; a key without a TTL is no pause."""
    client.set(room.keys.paused("refresh"), b"\xff", px=60_000)
    assert [one.by for one in room.upkeep.pauses()] == [""]
    assert room.upkeep.refreshes_are_paused() is True


def test_a_pause_of_no_finite_length_pauses_too(room: Any, client: Any) -> None:
    """A pause whose length another program wrote as infinite lasts as long as its key."""
    client.set(room.keys.paused("refresh"), b'{"ms": 1e400}', px=60_000)
    assert room.upkeep.refreshes_are_paused() is True


@pytest.mark.parametrize(
    ("what", "seconds"),
    [("refreshs", 60), ("refresh", 0), ("refresh", 1e9), ("refresh", "10m"), ("refresh", True)],
)
def test_what_cannot_be_meant_is_refused(room: Any, what: str, seconds: Any) -> None:
    """A pause that cannot be meant is refused with what is allowed."""
    with pytest.raises(InvalidArgument, match=r"did you mean refresh|1 to 86,400|seconds, or a"):
        room.upkeep.pause(what, seconds)
    assert room.upkeep.pauses() == []


def test_who_does_not_answer_pauses_nothing() -> None:
    """When Redis is away a worker goes on, and a person is told so."""
    settings = Settings(redis_url="redis://127.0.0.1:1", **PATIENT)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        assert room.upkeep.refreshes_are_paused() is False
        with pytest.raises(RedisUnavailable):
            room.upkeep.pause("refresh", 60)


def test_the_command_pauses_and_resumes(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command pauses and resumes, and answers in words or as JSON."""
    monkeypatch.setenv("REDIS_URL", server.url)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    assert "refresh is paused for 10m" in run("pause", "refresh", "--for", "10m")
    assert json.loads(run("pause", "refresh", "--json")) == {"paused": "refresh", "seconds": 600}
    assert "refresh goes on" in run("resume", "refresh")
    told = json.loads(run("resume", "refresh", "--json"))
    assert told == {"resumed": "refresh", "was_paused": False}


def test_a_user_without_a_name_may_pause(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that runs as any uid nobody has a login name: the pause says the number."""
    monkeypatch.setenv("REDIS_URL", server.url)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    result = CliRunner().invoke(app, ["pause", "refresh"])
    assert result.exit_code == 0, result.output
    with Stillroom(Settings(redis_url=server.url, **PATIENT), dispatch=NoDispatch()) as room:
        assert [one.by for one in room.upkeep.pauses()] == ["uid 4000000000"]
