"""Record the commands that reach a server during an act."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

ABOUT_CONNECTIONS = {"HELLO", "CLIENT", "MONITOR"}
# A first connection, a first script, counts that were due.
ON_ITS_WAY = {"TIME", "INFO", "SCRIPT", "HINCRBY", "EXPIRE"}

READS_SESSION = ["EXISTS", "HGETALL"]  # and the server's TIME, in one exchange


def heard(client: Any, act: Callable[[], object]) -> list[dict[str, Any]]:
    """Return what the server did while `act` ran: clients' commands, and those of scripts behind each of theirs."""
    with client.monitor() as monitor:
        act()
        client.echo("done")
        return list(takewhile(lambda c: c["command"] != "ECHO done", monitor.listen()))


def sent(client: Any, act: Callable[[], object], but: Iterable[str] = ()) -> list[str]:
    """Return the names of the commands that clients sent while `act` ran."""
    own = [c["command"] for c in heard(client, act) if c["client_type"] != "lua"]
    # Now and then a check also reads which limits operators have changed.
    names = [said.split()[0] for said in own if not said.endswith(":limits:changes")]
    return [name for name in names if name not in {*ABOUT_CONNECTIONS, *but}]


def scripts_run(client: Any) -> int:
    """Return how many scripts the server has run."""
    run: int = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
    return run
