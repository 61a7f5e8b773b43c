"""`stillroom check`: what can be seen to be wrong before anything is started; for images and CI."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from stillroom.abuse.rules import read_rules
from stillroom.cli.application import App, apps_of, elsewhere, rooms_of
from stillroom.cli.check_limits import InApp, examined, in_app, unknown_names
from stillroom.cli.doctor import Line, print_lines, rights, unusable
from stillroom.cli.health import Strict
from stillroom.cli.tables import AsJson, print_json
from stillroom.cli.version import versions
from stillroom.dispatch import NoDispatch
from stillroom.errors import RedisUnavailable, SettingsError, StillroomError
from stillroom.health.findings import why
from stillroom.health.report import ORDER, Status, worst
from stillroom.room import Stillroom
from stillroom.settings import Settings

Offline = Annotated[bool, typer.Option("--offline", help="Do not ask Redis.")]


def check(
    app: App = None, offline: Offline = False, strict: Strict = False, as_json: AsJson = False
) -> None:
    """Check settings, loaders, routes, rights and versions before the start: which combination breaks a promise.

    The app's modules are imported. Exit code: 1 if something fails (with --strict: or warns).
    """
    lines = list(_checked(app or [], offline=offline))
    print_json([line._asdict() for line in lines]) if as_json else print_lines(lines)
    if ORDER[worst([line.status for line in lines])] >= (1 if strict else 2):
        raise typer.Exit(1)


def _checked(specs: Sequence[str], *, offline: bool) -> Iterator[Line]:
    yield from _versions()
    try:
        settings = Settings()
    except SettingsError as error:
        yield Line("fail", "settings", str(error))
        return
    yield from _settings(settings)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield from _loaders(room)
        app, lines = _limits([*settings.loaders, *specs])
        yield from lines
        if not offline:
            yield from _online(room, app)


def _versions() -> Iterator[Line]:
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    yield Line("pass", "versions", f"{found}, {platform.system()}")


def _settings(settings: Settings) -> Iterator[Line]:
    if "REDIS_URL" not in os.environ:
        yield Line("warn", "settings", f"REDIS_URL is not set: it is {settings.redis_url} then.")
    if not settings.session_peppers:
        severity: Status = "fail" if settings.production else "warn"
        why = "sessions, and limits by user, end with the process that made them"
        yield Line(severity, "settings", f"STILLROOM_SESSION_PEPPERS is not set: {why}.")
    yield from unusable(settings)
    if settings.webhook_secret is not None and settings.webhook_url is None:
        said = "STILLROOM_WEBHOOK_SECRET is set and STILLROOM_WEBHOOK_URL is not: nobody is told."
        yield Line("warn", "settings", said)
    if settings.production and settings.health_token is None and not settings.health_networks:
        todo = "set STILLROOM_HEALTH_TOKEN, or nobody behind a proxy sees /status and /metrics"
        yield Line("warn", "settings", f"no health token: {todo}.")
    if settings.explain_header and settings.production and settings.health_token is None:
        said = "STILLROOM_EXPLAIN_HEADER is set and STILLROOM_HEALTH_TOKEN is not: nobody is told."
        yield Line("warn", "settings", said)
    if settings.refresh_lease > settings.swr > 0:
        said = (
            f"refresh_lease ({settings.refresh_lease:,.15g} s) is longer than swr ({settings.swr:,.15g} s): "
            "where a worker dies, a value is gone before another one is asked."
        )
        yield Line("warn", "settings", said)
    yield Line("pass", "settings", f"namespace {settings.namespace}")


# Loaders


def _loaders(room: Stillroom) -> Iterator[Line]:
    if not room.settings.loaders:
        said = "STILLROOM_LOADERS is not set: a worker of this environment refreshes nothing."
        yield Line("warn", "loaders", said)
        return
    try:
        for found in rooms_of(room.settings):
            room.cache.loaders.adopt(found.cache.loaders)
            if sentence := elsewhere(found, room.settings):
                yield Line("warn", "loaders", sentence)
    except StillroomError as error:
        yield Line("fail", "loaders", str(error))
        return
    loaders = [room.cache.loaders[name] for name in room.cache.loaders.names()]
    for loader in loaders:
        life = loader.keeping.life
        if 0 < life.swr < loader.lease:
            said = (
                f"its swr ({life.swr / 1000:,.15g} s) is shorter than its lease ({loader.lease / 1000:,.15g} s): "
                "a slow refresh comes after the value is gone."
            )
            yield Line("warn", f"loader {loader.name}", said)
    for name in room.cache.loaders.uninstalled_pages():
        yield Line(
            "warn", f"page {name}", "it is cached nowhere: Pages.install(app) was not called."
        )
    names = ", ".join(loader.name for loader in loaders) or "none"
    yield Line("pass" if loaders else "warn", "loaders", f"{len(loaders)}: {names}")


# Limits


def _limits(specs: Sequence[str]) -> tuple[InApp, list[Line]]:
    try:
        found = in_app(apps_of(specs))
    except StillroomError as error:
        return InApp({}, []), [Line("fail", "routes", str(error))]
    return found, list(examined(found))


# Redis


def _online(room: Stillroom, app: InApp) -> Iterator[Line]:
    report = room.health.check()
    for server in report.servers:
        if not server.connection.is_up:
            reason = server.connection.error or "unknown"
            said = f"it does not serve this process: {reason}. {why(reason, server)}"
            yield Line("fail", server.name, said)
    if not all(server.connection.is_up for server in report.servers):
        return
    yield from rights(room)
    for found in report.advice:
        if found.code in ("policy", "server_old", "read-only", "replica"):
            yield Line(found.severity, found.component, f"{found.what} {found.todo}")
    rules = read_rules(room.settings.abuse_rules)
    try:
        changes, names = room.limits.changes(), room.limits.names()
    except RedisUnavailable as error:
        yield Line(
            "fail", "limits", f"what processes and operators say of limits can't be read: {error}"
        )
    else:
        yield from unknown_names(app, rules, changes, names)
    loaders = [room.cache.loaders[name] for name in room.cache.loaders.names()]
    has_swr = any(loader.keeping.life.swr for loader in loaders)
    if has_swr and report.tasks is not None and report.tasks.workers == 0:
        said = (
            "values have an swr and no worker was seen: stale ones are served to its end, then readers wait. "
            "Start celery -A stillroom_workers worker, or set swr=0."
        )
        yield Line("warn", "workers", said)
