"""`stillroom move-state` takes sessions and bans along to another server, or to a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import LockTaken, RedisUnavailable, SettingsError, StillroomError
from stillroom.moving import Moving, Side, move_bans
from stillroom.room import Stillroom
from stillroom.settings import Settings
from stillroom.shown import plural
from stillroom.wire.explain import CLUSTERED

LOCK = "stillroom:move-state"
LEASE_S = 30  # of the lock: so long it is held where a command was killed
SAME = "--from and REDIS_URL are the same server: there is nothing to move"
# Nobody waits for this as a visitor does for a page.
PATIENT = {"connect_timeout": 5.0, "command_timeout": 10.0, "call_timeout": 30.0}

From = Annotated[
    str,
    typer.Option(
        "--from",
        envvar="REDIS_URL_BEFORE",
        show_default=False,
        help="The server that they are on now; this command's REDIS_URL is where they go.",
    ),
]
FromCluster = Annotated[
    bool, typer.Option("--from-cluster", help="That server is a node of a Redis Cluster.")
]
FromReplicas = Annotated[
    int | None,
    typer.Option(
        "--from-replicas",
        min=0,
        show_default="STILLROOM_REPLICAS",
        help="How many replicas of that server must confirm what has left it; 0 if it has none.",
    ),
]

Replace = Annotated[
    bool,
    typer.Option("--replace", help="Sessions that are in use at REDIS_URL already end; see above."),
]


class MoveUnderWay(StillroomError):
    """Another move has one of the two servers."""


def move_state(
    before: From,
    from_cluster: FromCluster = False,
    from_replicas: FromReplicas = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Take all sessions, and the bans in force, along to the server or cluster of REDIS_URL, while the app goes on.

    One shard after the other is shut there, copied, and opened here. Its sessions are unavailable meanwhile, and
    from then on to processes with the old settings. No session comes back after its end. Repeat the command if it
    broke off; the other way round it moves everything back. Limits begin anew.

    Where REDIS_URL has sessions of its own the command does nothing, since the two servers may be confused.
    --replace ends those: processes with the new settings began them too early.
    """
    with (
        Stillroom(Settings(**PATIENT)) as there,
        Stillroom(_old(before, from_cluster, from_replicas)) as here,
    ):
        there.state_wire.ping()
        _reach(here)
        with _alone(here, there):
            found = _moved(_side(here, "--from", from_replicas), _side(there, "REDIS_URL"), replace)
            runs = here.state.run, there.state.run
            found["bans"] = move_bans(here.abuse, there.abuse, *runs, there.keys)
    if as_json:
        print_json(found)
        return
    moved = (
        f"{plural(found['shards'], 'shard')} of sessions moved, with {plural(found['keys'], 'key')}"
    )
    typer.echo(f"{moved}; {plural(found['bans'], 'ban')} taken along")


@contextmanager
def _alone(here: Stillroom, there: Stillroom) -> Iterator[None]:
    """Hold the lock of moves on both servers. Raises MoveUnderWay where another move holds one of them.

    A move the other way, or on from there, has one of these servers, too: beside it a shard would be open on both.
    """
    with ExitStack() as held:
        _hold(held, there, "REDIS_URL")
        try:
            _hold(held, here, "--from")
        except MoveUnderWay:
            first, second = (
                room.state.run(room._locks_body.holders(LOCK)) for room in (here, there)
            )
            if first != second:
                raise
            raise SettingsError(SAME) from None
        except RedisUnavailable as error:
            # A server that is full is left because of that, and takes no lock: neither for a move to it.
            if error.reason != "oom":
                raise
        yield


def _hold(held: ExitStack, room: Stillroom, name: str) -> None:
    try:
        held.enter_context(room.lock(LOCK, wait=0, lease=LEASE_S))
    except LockTaken as taken:
        raise MoveUnderWay(
            f"another move to or from {name} is under way, or one was killed in the last {LEASE_S} s: see whether "
            "it runs, and move again when it has ended"
        ) from taken


def _old(before: str, from_cluster: bool, replicas: int | None) -> Settings:
    """Return the settings of a process on the old server. Its cache and its broker are not used, and may be any."""
    own = Settings()
    if before == own.redis_url:
        raise SettingsError(SAME)
    unused = {
        "cache_url": own.cache_url or own.redis_url,
        "broker_url": own.broker_url or own.redis_url,
    }
    try:
        return Settings(
            **PATIENT
            | (unused if from_cluster else {})
            | ({} if replicas is None else {"replicas": replicas}),
            redis_url=before,
            state_cluster=from_cluster,
        )
    except SettingsError as error:
        raise SettingsError(_by_option(str(error))) from None


def _reach(here: Stillroom) -> None:
    """Raise RedisUnavailable with the option's name where no sessions can be read from the old server."""
    try:
        here.state_wire.ping()
        here.sessions.count()
    except RedisUnavailable as error:
        detail = _by_option(error.detail)
        if error.reason in CLUSTERED:
            detail = "the server in --from is a node of a Redis Cluster: add --from-cluster"
        elif error.reason == "nocluster":
            detail = "the server in --from is in no Redis Cluster: leave --from-cluster out"
        raise RedisUnavailable(error.reason, detail) from error


def _by_option(sentence: str) -> str:
    return sentence.replace("REDIS_URL", "--from")


def _moved(here: Side, there: Side, replace: bool) -> dict[str, int]:
    moving = Moving(here, there)
    with _told_if_it_breaks_off(moving):
        shards = moving.begin(replace=replace)
        return {"shards": shards, "keys": sum(moving.shards())}


@contextmanager
def _told_if_it_breaks_off(moving: Moving) -> Iterator[None]:
    """Say what is unavailable, and until when, where a Ctrl-C or an error ends the move before its end."""
    try:
        yield
    except BaseException:
        if moving.left:
            typer.echo(
                f"the move broke off: {plural(moving.left, 'shard')} of sessions did not arrive, and may be "
                "unavailable on both sides. Run the command again to go on, or move the other way to turn back",
                err=True,
            )
        raise


def _side(room: Stillroom, name: str, replicas: int | None = None) -> Side:
    known = room.settings.replicas if replicas is None else replicas
    return Side(room.keys, room.state.run, known, f"the server in {name}")
