"""`stillroom move-state` takes sessions and bans along to another server, or to a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, print_json
from stillroom.moving import Moving, Side, move_bans
from stillroom.room import Stillroom
from stillroom.settings import Settings

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


def move_state(before: From, from_cluster: FromCluster = False, as_json: AsJson = False) -> None:
    """Take all sessions, and the bans in force, along to the server or cluster of REDIS_URL, while the app goes on.

    One shard after the other is shut there, copied, and opened here. Its sessions are unavailable meanwhile, and
    from then on to processes with the old settings. No session comes back after its end. Repeat the command if it
    broke off; the other way round it moves everything back. Limits begin anew.
    """
    with Stillroom(Settings(**PATIENT)) as there, Stillroom(_old(before, from_cluster)) as here:
        for room in (there, here):
            room.state_wire.ping()
        with there.lock("stillroom:move-state", wait=0):
            found = _moved(here, there)
    if as_json:
        print_json(found)
        return
    sentence = "{shards} shards of sessions moved, with {keys:,} keys; {bans:,} bans taken along"
    typer.echo(sentence.format(**found))


def _old(before: str, from_cluster: bool) -> Settings:
    return Settings(**PATIENT, redis_url=before, state_cluster=from_cluster)


def _moved(here: Stillroom, there: Stillroom) -> dict[str, int]:
    moving = Moving(Side(here.keys, here.state.run), Side(there.keys, there.state.run))
    shards = moving.begin()
    keys = sum(moving.shards())
    bans = move_bans(here.abuse, there.abuse, there.state.run, there.keys)
    return {"shards": shards, "keys": keys, "bans": bans}
