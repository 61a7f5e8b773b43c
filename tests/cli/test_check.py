"""`stillroom check`, and `stillroom doctor` on a system that has just started, say what is right and wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.health import WorkerStats
from tests.support.crowd import PATIENT

GOOD = """
from stillroom import AUTH, Route, Routes, Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", swr=600)
def product(number: int) -> int:
    return number
routes = Routes([Route("/login", [AUTH], methods=["POST"])])
"""
BAD = """
from flask import Flask
from stillroom import AUTH, Limit, Route, Routes, Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", swr=1)
def product(number: int) -> int:
    return number
app = Flask(__name__)
app.add_url_rule("/login", "login", lambda: "")
api = [Limit("api", 5, 60)], [Limit("api", 6, 60)]
routes = Routes([Route("/login", [AUTH]), Route("/lgoin", api[0]), Route("/x", api[1])])
"""
BROKEN = """
from stillroom import Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", tags=["shop:{nmber}"])
def product(number: int) -> int:
    return number
"""


@pytest.fixture
def check(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., dict[str, str]]]:
    """Return the findings of the command in a module: status and sentence."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "p" * 40)
    for name, value in PATIENT.items():
        monkeypatch.setenv(f"STILLROOM_{name.upper()}", str(value))
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"checked_{abs(hash(tmp_path)):x}"

    def check(source: str, *options: str, code: int = 0) -> list[str]:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("STILLROOM_LOADERS", name)
        result = CliRunner().invoke(app, ["check", "--json", *options])
        assert result.exit_code == code, (result.output, result.exception)
        return [" ".join(line.values()) for line in json.loads(result.output)]

    yield check
    made = sys.modules.pop(name, None)
    if hasattr(made, "room"):
        made.room.close()


def said(lines: list[str], *words: str) -> bool:
    return any(all(word in line for word in words) for line in lines)


def test_what_is_right_is_said(check: Callable[..., list[str]]) -> None:
    """The command confirms versions, settings, loaders, routes and rights, and warns when no worker refreshes."""
    lines = check(GOOD)
    for words in (
        ("pass versions", "stillroom"),
        ("pass loaders 1: product",),
        ("pass routes", "(1)"),
        ("pass rights to cache",),
        ("warn workers", "no worker was seen"),
    ):
        assert said(lines, *words), lines
    assert not said(lines, "fail")
    check(GOOD, "--strict", code=1)
    offline = check(GOOD, "--offline")
    assert not said(offline, "rights")


def test_what_breaks_a_promise_is_named(check: Callable[..., list[str]]) -> None:
    """A broken promise is named with its loader, route or limit and what to write."""
    lines = check(BAD, "--offline")
    for words in (
        ("warn loader product", "swr (1 s) is shorter than its lease"),
        ("warn routes", "/login has auth on GET", "methods=['POST']"),
        ("warn routes", "/lgoin fits no endpoint", "did you mean /login?"),
        ("warn routes", "api is 5/60 s here and 6/60 s there"),
    ):
        assert said(lines, *words), lines


def test_what_cannot_be_imported_fails(check: Callable[..., list[str]]) -> None:
    """A module that cannot be imported fails the check, as with a tag's template without its argument."""
    lines = check(BROKEN, "--offline", code=1)
    assert said(lines, "fail", "{nmber}", "did you mean {number}?"), lines


def test_settings_that_cannot_be_fail(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad settings fail the check, and a missing one is named."""
    monkeypatch.delenv("STILLROOM_SESSION_PEPPERS")
    monkeypatch.delenv("REDIS_URL")
    lines = check(GOOD, "--offline")
    assert said(lines, "warn settings", "REDIS_URL is not set")
    assert said(lines, "warn settings", "STILLROOM_SESSION_PEPPERS is not set")
    monkeypatch.setenv("STILLROOM_PRODUCTION", "1")
    check(GOOD, "--offline", code=1)
    monkeypatch.setenv("STILLROOM_TTLL", "5")
    assert said(check(GOOD, "--offline", code=1), "fail settings", "did you mean STILLROOM_TTL")


def test_away_is_a_failure(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis is away the check fails, unless it was told not to ask."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    assert said(check(GOOD, code=1), "fail redis", "refused")
    check(GOOD, "--offline")


def test_the_doctor_knows_a_system_that_has_just_started(
    server: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a system's first minute the doctor misses no tick, and later it does."""
    monkeypatch.setenv("REDIS_URL", server.url)
    for name, value in PATIENT.items():
        monkeypatch.setenv(f"STILLROOM_{name.upper()}", str(value))
    monkeypatch.setattr(sys.modules["stillroom.cli.doctor"], "JUST_STARTED_S", 0.0)
    assert "no tick was seen" in CliRunner().invoke(app, ["doctor"]).output
    monkeypatch.setattr(sys.modules["stillroom.cli.doctor"], "JUST_STARTED_S", 90.0)
    make_room().upkeep.record_heartbeat("one", WorkerStats(up_s=20.0))
    assert "beat: just started" in CliRunner().invoke(app, ["doctor"]).output
