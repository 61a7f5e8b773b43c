"""The settings in force are shown with their source and without any secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from stillroom import Settings
from stillroom.cli.version import versions
from stillroom.environment import SECRETS
from stillroom.in_force import HIDDEN, InForce, in_force
from stillroom.settings import URLS, environment_names
from tests.support.processes import STILLROOM, run_to_end

CANARY = "canary-7f3a-" + "x" * 32


def found(settings: Settings) -> dict[str, InForce]:
    return {one.name: one for one in in_force(settings)}


def test_each_setting_is_there_once_and_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each setting is shown once with its source: the default, environment, secret file or app code, which wins."""
    (tmp_path / "token").write_text(CANARY)
    monkeypatch.setenv("STILLROOM_HEALTH_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("STILLROOM_TTL", "60")
    monkeypatch.setenv("stillroom_swr", "30")
    monkeypatch.setenv("STILLROOM_WAIT", "5")
    told = found(Settings(wait=7, redis_url="redis://h"))
    assert len(told) == len(environment_names())
    assert told["STILLROOM_TTL"] == ("STILLROOM_TTL", "60", "environment")
    assert told["STILLROOM_SWR"].source == "environment"
    assert told["STILLROOM_WAIT"] == ("STILLROOM_WAIT", "7", "code")
    assert told["REDIS_URL"] == ("REDIS_URL", "redis://h", "code")
    assert told["STILLROOM_HEALTH_TOKEN"].source == "STILLROOM_HEALTH_TOKEN_FILE"
    assert told["STILLROOM_POOL_SIZE"] == ("STILLROOM_POOL_SIZE", "64", "default")
    by_alias = found(Settings(REDIS_URL="redis://a"))
    assert by_alias["REDIS_URL"].source == "code"


def test_a_secret_of_a_file_is_of_that_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A secret is read from its file, and told to be, where its own variable is set to nothing."""
    (tmp_path / "password").write_text(CANARY)
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("REDIS_PASSWORD", "")
    settings = Settings()
    assert settings.password == CANARY
    assert found(settings)["REDIS_PASSWORD"].source == "REDIS_PASSWORD_FILE"


def canaries() -> dict[str, Any]:
    """Return a value with a canary for every setting that may hold a secret."""
    given: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        if name == "webhook_url":
            given[name] = f"https://host/{CANARY}"
        elif name in SECRETS or SecretStr in getattr(field.annotation, "__args__", ()):
            given[name] = CANARY
        elif name == "cache_url":
            given[name] = f"redis+sentinel://user:{CANARY}@host:1,host:2/primary/0"
        elif name == "flower_url":
            given[name] = f"https://user:{CANARY}@host"
        elif name.endswith(URLS):
            given[name] = f"redis://user:{CANARY}@host:1"
    return given


def test_no_secret_is_told() -> None:
    """No secret is shown: a secret is ***, and a URL has no password."""
    given = canaries()
    assert set(SECRETS) <= set(given)
    given["sentinel_user"] = "app"
    told = found(Settings(**given))
    assert CANARY not in repr(Settings(**given))
    assert CANARY not in repr(told)
    names = environment_names()
    assert {told[names[field]].value for field in SECRETS} == {HIDDEN}


def run(*arguments: str) -> str:
    done = run_to_end([STILLROOM, *arguments], timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command shows all or only the changed settings, as a table or JSON, without a server."""
    monkeypatch.setenv("REDIS_URL", f"redis://:{CANARY}@127.0.0.1:1")
    monkeypatch.setenv("STILLROOM_HEALTH_TOKEN", CANARY)
    told = {one["name"]: one for one in json.loads(run("settings", "--json"))}
    assert told["REDIS_URL"]["value"] == "redis://:***@127.0.0.1:1"
    assert told["STILLROOM_POOL_SIZE"]["source"] == "default"
    table = run("settings", "--changed")
    assert "STILLROOM_HEALTH_TOKEN" in table
    assert "STILLROOM_POOL_SIZE" not in table
    assert CANARY not in table + json.dumps(told)


def test_the_version_is_told() -> None:
    """The version is shown in a line or as JSON, with the versions of the packages it uses."""
    assert run("--version").startswith(f"stillroom {versions()['stillroom']} (python 3.")
    assert json.loads(run("--version", "--json")) == versions()
    assert {"redis", "celery", "kombu"} <= set(versions())
