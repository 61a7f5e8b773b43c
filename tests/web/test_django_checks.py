"""`manage.py check` says what is misconfigured, and the commands do what they say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from django.apps import apps
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.db import models
from django.test import override_settings
from django.test.utils import isolate_apps

from stillroom import Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.sessions.token import SECRET_BYTES, make_token
from stillroom.web.django import room as room_of_django
from stillroom.web.django.checks import (
    DJANGOS_MIDDLEWARE,
    ENGINE,
    LIMITS,
    MIDDLEWARE,
    NEEDS_SESSION,
)
from tests.support.crowd import PATIENT
from tests.support.django_project import configure

configure()

urlpatterns: list[Any] = []
GOOD: dict[str, Any] = {
    "ROOT_URLCONF": __name__,
    "STILLROOM": {
        "redis_url": "redis://127.0.0.1:1",
        "session_peppers": "p" * 40,
        "production": True,
    },
    "SESSION_ENGINE": ENGINE,
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_NAME": "__Host-sessionid",
    "SESSION_COOKIE_AGE": 86_400,
    "MIDDLEWARE": [MIDDLEWARE, *NEEDS_SESSION],
}
LOCAL = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
OURS = {"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache", "TIMEOUT": 86_400 * 30}}

WRONG: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "a misspelled setting": ({"STILLROOM": {"redis_ur": "x"}}, {"E001"}),
    "a setting that nobody reads there": ({"STILLROOM_TTL": 60}, {"W002"}),
    "a setting that the room is given, too": (
        {"STILLROOM_SESSION_PEPPERS": "p" * 40, "STILLROOM_OF_MY_OWN": 1, "REDIS_URL": "redis://x"},
        set(),
    ),
    "a path that leads nowhere": ({"STILLROOM": "nowhere.room"}, {"E001"}),
    "sessions in a cache": (
        {"SESSION_ENGINE": "django.contrib.sessions.backends.cached_db"},
        {"W010"},
    ),
    "sessions that are to outlive the room's": ({"SESSION_COOKIE_AGE": 86_400 * 30}, {"W011"}),
    "Django's own middleware": ({"MIDDLEWARE": [DJANGOS_MIDDLEWARE]}, {"W020"}),
    "no middleware for sessions": ({"MIDDLEWARE": []}, {"W020"}),
    "the wrong order": ({"MIDDLEWARE": [*NEEDS_SESSION, MIDDLEWARE]}, {"E021"}),
    "two middlewares": ({"MIDDLEWARE": [MIDDLEWARE, DJANGOS_MIDDLEWARE]}, {"E022"}),
    "limits that nothing charges": ({"ROOT_URLCONF": "tests.web.limited_django"}, {"E023"}),
    "limits that are charged": (
        {
            "ROOT_URLCONF": "tests.web.limited_django",
            "MIDDLEWARE": [MIDDLEWARE, *NEEDS_SESSION, LIMITS],
        },
        set(),
    ),
    "a timeout that is cut": ({"CACHES": OURS}, {"W030"}),
    "no Redis": ({"STILLROOM": None}, {"W040", "W041", "E060"}),
    "no production": (
        {"STILLROOM": {"redis_url": "redis://x", "session_peppers": "p" * 40}},
        {"W041"},
    ),
    "a cookie in plain text": (
        {"SESSION_COOKIE_SECURE": False, "SESSION_COOKIE_NAME": "sessionid"},
        {"W050"},
    ),
    "a cookie that browsers refuse in plain text": (
        {"SESSION_COOKIE_SECURE": False},
        {"W050", "E052"},
    ),
    "a cookie that browsers refuse for its domain": (
        {"SESSION_COOKIE_DOMAIN": ".shop.example"},
        {"E052"},
    ),
    "a cookie that browsers refuse for its path": ({"SESSION_COOKIE_PATH": "/shop"}, {"E052"}),
    "a cookie that others can plant": ({"SESSION_COOKIE_NAME": "sessionid"}, {"W051"}),
    "no pepper": ({"STILLROOM": {"redis_url": "redis://x", "production": True}}, {"E060"}),
    "somebody else's sessions": (
        {
            "SESSION_ENGINE": "django.contrib.sessions.backends.db",
            "MIDDLEWARE": [],
            "CACHES": LOCAL,
        },
        set(),
    ),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_a_check_says_what_is_misconfigured(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: set[str]
) -> None:
    """Each mistake has one message with the correct form, and a good configuration has none."""
    monkeypatch.setattr(
        "stillroom.web.django._rooms", {}
    )  # another test's may have no settings too
    with override_settings(**GOOD | changes):
        found = run_checks(tags=["stillroom"], include_deployment_checks=True)
    assert {message.id.removeprefix("stillroom.") for message in found if message.id} == expected
    assert all(
        message.hint or message.id in ("stillroom.W040", "stillroom.W041") for message in found
    )


@isolate_apps("tests.support.djangoshop")
def test_a_column_that_is_too_short_for_a_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that keeps 40 characters of a session's key, as django-allauth's does, has a message."""

    class Device(models.Model):
        session_key = models.CharField(max_length=40)

        class Meta:
            app_label = "djangoshop"

    monkeypatch.setattr(apps, "get_models", lambda: [Device])
    with override_settings(**GOOD):
        (found,) = run_checks(tags=["stillroom"])
    assert found.id == "stillroom.W012"
    assert f"a session's key has {len(make_token(0, bytes(SECRET_BYTES)))}" in found.msg


def test_production_s_checks_are_for_deployment_only() -> None:
    """A developer's machine may have no pepper and a plain cookie; only the deployment checks refuse them."""
    plain = {"STILLROOM": None, "SESSION_COOKIE_SECURE": False, "SESSION_COOKIE_NAME": "sessionid"}
    with override_settings(**GOOD | plain):
        assert run_checks(tags=["stillroom"]) == []
    with override_settings(**GOOD | plain | {"SESSION_COOKIE_NAME": "__Host-sessionid"}):
        (found,) = run_checks(tags=["stillroom"])
        assert found.id == "stillroom.E052", "nobody stays logged in there either"


# Commands


@pytest.fixture
def room(server: EmbeddedServer) -> Iterator[Stillroom]:
    given = PATIENT | {"redis_url": server.url, "namespace": "manage"}
    with override_settings(STILLROOM=given):
        room = room_of_django()
        yield room
        room.close()


def manage(*words: str) -> str:
    out = io.StringIO()
    call_command(*words, stdout=out)
    return out.getvalue()


def test_values_are_forgotten(room: Stillroom) -> None:
    """The command invalidates by key, tag, pattern, or everything."""
    for words in (
        ["k"],
        ["--tag", "t"],
        ["--pattern", "k*"],
        ["--all"],
        ["--tag", "t", "--tag", "u"],
    ):
        room.cache.set("k", 1, tags=["t"])
        said = manage("stillroom_invalidate", *words)
        assert "no reader sees the old values" in said
        assert room.cache.get("k") is None
    room.cache.set("k", 1, ttl=60, swr=60, tags=["t"])
    manage("stillroom_invalidate", "--tag", "t", "--soft")
    assert room.cache.get("k") == 1


@pytest.mark.parametrize(
    ("words", "said"), [([], "give a key"), (["k", "--soft"], "goes with --tag")]
)
def test_a_mistake_is_a_sentence(room: Stillroom, words: list[str], said: str) -> None:
    """A mistake on the command line is answered with a sentence and not with a traceback."""
    with pytest.raises(CommandError, match=said):
        manage("stillroom_invalidate", *words)


def test_redis_away_is_a_sentence() -> None:
    """When Redis is away the command says in a sentence what it could not do."""
    with override_settings(
        STILLROOM={"redis_url": "redis://127.0.0.1:1", "session_peppers": "p" * 40}
    ):
        for words in (["stillroom_invalidate", "k"], ["stillroom_logout", "7"]):
            with pytest.raises(CommandError, match="unavailable"):
                manage(*words)
        with pytest.raises(SystemExit):
            manage("stillroom_doctor")
        room_of_django().close()


def test_a_user_is_logged_out_everywhere(room: Stillroom) -> None:
    """The command logs a user out on all devices."""
    room.sessions.create("7")
    room.sessions.create("7")
    assert "user 7: 2 sessions ended" in manage("stillroom_logout", "7")
    assert room.sessions.count("7") == 0


def test_the_doctor_looks_at_django_s_room(room: Stillroom, calm_machine: None) -> None:
    """The doctor checks Django's room: each line says what is right, or what to do."""
    said = manage("stillroom_doctor")
    assert "namespace manage" in said
    assert "rights to cache: this user may do what the app does" in said
