"""`stillroom agree` works as a person types it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.errors import SettingsDiffer, SettingsError
from tests.support.crowd import PATIENT


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a command with these variables and returns what it prints."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("connect_timeout", "command_timeout", "call_timeout", "pool_timeout"):
        monkeypatch.setenv(f"STILLROOM_{name.upper()}", str(PATIENT[name]))

    def run(*arguments: str, **environment: str) -> str:
        result = CliRunner().invoke(app, ["agree", *arguments], env=environment)
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


def test_it_shows_what_is_agreed_and_by_whom(run: Any, make_room: Any) -> None:
    """The command shows each agreed value and who set it, also where this process has another."""
    make_room(shards=4).cache.get("k")
    shown = run()
    assert re.search(r"shards +4 +1 .*\(process \d+\)", shown)
    assert "lease_limit" in shown


def test_a_person_changes_the_number_of_shards(run: Any, make_room: Any) -> None:
    """A person changes the number of shards: the cache begins empty and processes with the old number are told."""
    before = make_room(shards=1)
    before.cache.set("k", "old", ttl=600)
    run("shards", STILLROOM_SHARDS="4")
    after = make_room(shards=4)
    assert after.cache.get("k") is None
    assert after.cache.set("k", "new")
    with pytest.raises(SettingsDiffer):
        make_room(shards=1).cache.clear()
    run("shards", STILLROOM_SHARDS="1")
    assert make_room(shards=1).cache.get("k") is None


def test_a_limit_is_made_smaller(run: Any, make_room: Any) -> None:
    """A limit that only grows by itself is made smaller by a person."""
    make_room(lease_limit=900.0).cache.set("k", 1)
    assert re.search(r"lease_limit +900 +300", run())
    run("lease_limit")
    assert re.search(r"lease_limit +300 +300", run())


def test_more_replicas_are_agreed_on_by_a_person(run: Any, make_room: Any) -> None:
    """The smallest number of replicas that a process had stays agreed until a person raises it."""
    make_room(replicas=0).cache.set("k", 1)
    make_room(replicas=1).cache.set("k", 2)
    assert re.search(r"replicas +0 +1", run(STILLROOM_REPLICAS="1"))
    run("replicas", STILLROOM_REPLICAS="1")
    assert re.search(r"replicas +1 +1", run(STILLROOM_REPLICAS="1"))


def test_what_is_no_such_setting_is_told_so(run: Any) -> None:
    """An unknown setting is refused with the probable one."""
    with pytest.raises(SettingsError, match="shards"):
        run("shard")
