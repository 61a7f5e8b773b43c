"""`manage.py check`: what is misconfigured, and what to write instead. Nothing is asked of Redis."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error
from django.core.checks import Warning as Caution

from stillroom.errors import SettingsError
from stillroom.in_force import unread
from stillroom.room import Stillroom
from stillroom.sessions.token import TOKEN_LENGTH
from stillroom.web.carriers import django_limits
from stillroom.web.django import room
from stillroom.web.known_routes import django_routes
from stillroom.web.session_cookie import SessionCookie

BACKEND = "stillroom.web.django.cache.StillroomCache"
ENGINE = "stillroom.web.django.sessions"
MIDDLEWARE = "stillroom.web.django.middleware.SessionMiddleware"
LIMITS = "stillroom.web.django.limits.LimitsMiddleware"
DJANGOS_MIDDLEWARE = "django.contrib.sessions.middleware.SessionMiddleware"
# Middleware that reads the session, and so has to come after the one that provides it.
NEEDS_SESSION = (
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
)


def check_settings(**_: Any) -> list[CheckMessage]:
    """Return a message for each mistake on any machine."""
    try:
        found = room()
    except (SettingsError, ImportError) as error:
        hint = 'STILLROOM is the path of a room ("shop.cache:room"), a dict of its settings, or not set.'
        return [Error(f"There is no room: {error}", hint=hint, id="stillroom.E001")]
    lines = (
        _unread(found),
        _sessions(found),
        _columns(),
        _middleware(),
        _limits(),
        _refused_cookie(),
        _caches(found),
    )
    return [*chain.from_iterable(lines)]


def check_deployment(**_: Any) -> list[CheckMessage]:
    """Return a message for each mistake in production: `manage.py check --deploy`."""
    try:
        found = room()
    except (SettingsError, ImportError):
        return []  # check_settings says it
    return [*_redis(found), *_cookie(), *_peppers(found)]


def _unread(found: Stillroom) -> Iterator[CheckMessage]:
    for variable, field in unread(found.settings, dir(settings)).items():
        yield Caution(
            f"{variable} in Django's settings changes nothing: a room does not read them.",
            hint=f'Set it in the environment, or give it to the room: STILLROOM = {{"{field}": …}}',
            id="stillroom.W002",
        )


def _uses_sessions() -> bool:
    return bool(settings.SESSION_ENGINE == ENGINE)


def _sessions(found: Stillroom) -> Iterator[CheckMessage]:
    engine = settings.SESSION_ENGINE
    aliases = [name for name, one in settings.CACHES.items() if one.get("BACKEND") == BACKEND]
    if engine.endswith((".cache", ".cached_db")) and settings.SESSION_CACHE_ALIAS in aliases:
        yield Caution(
            f"Sessions are kept in the cache {settings.SESSION_CACHE_ALIAS!r}, which may evict them: "
            "users are logged out when memory is short.",
            hint=f'SESSION_ENGINE = "{ENGINE}"',
            id="stillroom.W010",
        )
    if _uses_sessions() and found.settings.session_absolute < settings.SESSION_COOKIE_AGE:
        yield Caution(
            f"SESSION_COOKIE_AGE is {settings.SESSION_COOKIE_AGE:,} s; a session ends after "
            f"{found.settings.session_absolute:,.15g} s in any case.",
            hint="Set STILLROOM_SESSION_ABSOLUTE to as much, or SESSION_COOKIE_AGE to less.",
            id="stillroom.W011",
        )


def _columns() -> Iterator[CheckMessage]:
    """Yield a message for each model that keeps keys of sessions in too short a column, such as django-allauth's.

    Django's own keys have 32 characters. The tables of Django's own sessions are not written here.
    """
    from django.contrib.sessions.base_session import AbstractBaseSession

    for model in apps.get_models() if _uses_sessions() else ():
        fields = {field.name: field for field in model._meta.fields}
        length = getattr(fields.get("session_key"), "max_length", None) or TOKEN_LENGTH
        if length < TOKEN_LENGTH and not issubclass(model, AbstractBaseSession):
            yield Caution(
                f"{model._meta.label}.session_key has room for {length} characters, and a session's key has "
                f"{TOKEN_LENGTH}: PostgreSQL and MySQL refuse it.",
                hint=f"Widen that column, by a migration of your own: max_length={TOKEN_LENGTH}.",
                id="stillroom.W012",
            )


def _middleware() -> Iterator[CheckMessage]:
    if not _uses_sessions():
        return
    used: Sequence[str] = list(settings.MIDDLEWARE)
    if MIDDLEWARE not in used:
        instead = f" in the place of {DJANGOS_MIDDLEWARE}" if DJANGOS_MIDDLEWARE in used else ""
        yield Caution(
            "While Redis is away each request with a session is answered with 500.",
            hint=f'Put "{MIDDLEWARE}" into MIDDLEWARE{instead}: it answers 503 and keeps the cookie.',
            id="stillroom.W020",
        )
    brings = [used.index(one) for one in (MIDDLEWARE, DJANGOS_MIDDLEWARE) if one in used]
    for needs in NEEDS_SESSION:
        if needs in used and brings and used.index(needs) < min(brings):
            yield Error(
                f"{needs} comes before the session's middleware in MIDDLEWARE.",
                hint="It looks at the session, so it belongs behind it.",
                id="stillroom.E021",
            )
    if len(brings) > 1:
        yield Error(
            "MIDDLEWARE has two middlewares for sessions.",
            hint=f"Take {DJANGOS_MIDDLEWARE} out.",
            id="stillroom.E022",
        )


def _limits() -> Iterator[CheckMessage]:
    if not getattr(settings, "ROOT_URLCONF", None):
        return
    limited = [known for known in django_routes() if known.carries]
    if limited and not django_limits():
        yield Error(
            f"{limited[0].text} carries limits, and no middleware charges them: it is answered with 500.",
            hint=f'Put "{LIMITS}" into MIDDLEWARE, behind the sessions.',
            id="stillroom.E023",
        )


def _caches(found: Stillroom) -> Iterator[CheckMessage]:
    longest = found.settings.life_limit
    for alias, options in settings.CACHES.items():
        timeout = options.get("TIMEOUT", 300)
        if options.get("BACKEND") != BACKEND:
            continue
        if isinstance(timeout, int | float) and timeout > longest:
            yield Caution(
                f"CACHES[{alias!r}]: its TIMEOUT of {timeout:,.15g} s is cut to {longest:,.15g} s.",
                hint="STILLROOM_LIFE_LIMIT says how long a value can live.",
                id="stillroom.W030",
            )


def _redis(found: Stillroom) -> Iterator[CheckMessage]:
    given = getattr(settings, "STILLROOM", None)
    if not os.environ.get("REDIS_URL") and given is None:
        yield Caution(
            f"REDIS_URL is not set, so Redis is looked for at {found.settings.redis_url}.",
            id="stillroom.W040",
        )
    if not found.settings.production:
        yield Caution(
            "STILLROOM_PRODUCTION is not set: what is only fit for a developer's machine is allowed.",
            id="stillroom.W041",
        )


def _cookie() -> Iterator[CheckMessage]:
    if not _uses_sessions():
        return
    name = settings.SESSION_COOKIE_NAME
    if not settings.SESSION_COOKIE_SECURE:
        yield Caution(
            "SESSION_COOKIE_SECURE is False: the session's token travels in plain text.",
            hint="SESSION_COOKIE_SECURE = True",
            id="stillroom.W050",
        )
    elif not name.startswith("__Host-") and settings.SESSION_COOKIE_DOMAIN is None:
        yield Caution(
            f"SESSION_COOKIE_NAME is {name!r}: a sibling domain, or plain http, can plant such a cookie.",
            hint='SESSION_COOKIE_NAME = "__Host-sessionid"',
            id="stillroom.W051",
        )


def _refused_cookie() -> Iterator[CheckMessage]:
    """Complain of a cookie that no browser keeps, on a developer's machine either."""
    if _uses_sessions() and (refusal := _refusal()):
        yield Error(
            f"Nobody stays logged in: {refusal}.",
            hint="The names are those of SESSION_COOKIE_NAME, _DOMAIN, _PATH, _SECURE and _HTTPONLY.",
            id="stillroom.E052",
        )


def _refusal() -> str:
    """Return why browsers refuse the session's cookie; empty if they do not."""
    try:
        SessionCookie(
            settings.SESSION_COOKIE_NAME,
            domain=settings.SESSION_COOKIE_DOMAIN or None,
            path=settings.SESSION_COOKIE_PATH,
            secure=bool(settings.SESSION_COOKIE_SECURE),
            http_only=bool(settings.SESSION_COOKIE_HTTPONLY),
        )
    except SettingsError as error:
        return str(error)
    return ""


def _peppers(found: Stillroom) -> Iterator[CheckMessage]:
    if _uses_sessions() and not found.settings.session_peppers:
        yield Error(
            "There is no pepper: each process makes its own, and does not know the others' sessions.",
            hint="Set STILLROOM_SESSION_PEPPERS to a secret of 32 characters or more.",
            id="stillroom.E060",
        )
