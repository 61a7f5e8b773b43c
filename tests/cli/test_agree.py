"""`stillroom agree`, as a person types it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.errors import SettingsDiffer, SettingsError


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """→ what a command prints, with these variables set."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, **environment: str) -> str:
        result = CliRunner().invoke(app, ["agree", *arguments], env=environment)
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


def test_it_shows_what_is_agreed_and_by_whom(run: Any, make_room: Any) -> None:
    """Also where this process has another value."""
    make_room(shards=4).cache.get("k")
    shown = run()
    assert re.search(r"shards +4 +1 .*\(process \d+\)", shown)
    assert "lease_limit" in shown


def test_a_person_changes_the_number_of_shards(run: Any, make_room: Any) -> None:
    """The cache begins empty, and who has the number of before is told so."""
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
    """What only grows by itself shrinks when a person says so."""
    make_room(lease_limit=900.0).cache.set("k", 1)
    assert re.search(r"lease_limit +900 +300", run())
    run("lease_limit")
    assert re.search(r"lease_limit +300 +300", run())


def test_what_is_no_such_setting_is_told_so(run: Any) -> None:
    """With what was probably meant."""
    with pytest.raises(SettingsError, match="shards"):
        run("shard")
