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

LEASE_S = 30  # of the lock: so long it is held where a command was killed
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
        help="So many replicas of that server have to know what has left it; 0 if it has none.",
    ),
]

Replace = Annotated[
    bool,
    typer.Option("--replace", help="Sessions that are in use at REDIS_URL already end; see above."),
]


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
    with Stillroom(Settings(**PATIENT)) as there, Stillroom(_old(before, from_cluster)) as here:
        there.state_wire.ping()
        _reach(here)
        with _alone(there):
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
def _alone(there: Stillroom) -> Iterator[None]:
    """Hold the lock of moves to this server. Raises StillroomError where another move holds it."""
    with ExitStack() as held:
        try:
            held.enter_context(there.lock("stillroom:move-state", wait=0, lease=LEASE_S))
        except LockTaken as taken:
            raise StillroomError(
                f"another move to REDIS_URL is under way, or one was killed in the last {LEASE_S} s: see whether "
                "it runs, and move again when it has ended"
            ) from taken
        yield


def _old(before: str, from_cluster: bool) -> Settings:
    """Return the settings of a process on the old server. Its cache and its broker are not used, and may be any."""
    own = Settings()
    if before == own.redis_url:
        raise SettingsError("--from and REDIS_URL are the same server: there is nothing to move")
    unused = {
        "cache_url": own.cache_url or own.redis_url,
        "broker_url": own.broker_url or own.redis_url,
    }
    try:
        return Settings(
            **PATIENT | (unused if from_cluster else {}),
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
    shards = moving.begin(replace=replace)
    return {"shards": shards, "keys": sum(moving.shards())}


def _side(room: Stillroom, name: str, replicas: int | None = None) -> Side:
    known = room.settings.replicas if replicas is None else replicas
    return Side(room.keys, room.state.run, known, f"the server in {name}")
