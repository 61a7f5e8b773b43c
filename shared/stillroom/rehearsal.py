"""Try before an app starts whether a server can do what Stillroom asks of it.

What a server says of itself on a new connection (see wire/server.py) is not always to be had: a proxy may be in
between, or the user may not ask for INFO. So one script is run that does nothing, with keys that other scripts name
together. A cluster refuses them, a proxy refuses the script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stillroom.errors import RedisRefused, RedisUnavailable, is_misconfigured
from stillroom.keys import Keys
from stillroom.operation import Operation
from stillroom.scripts import rehearse


class Explaining(Protocol):
    """A server that knows which setting leads to it."""

    def explain(self, failure: RedisUnavailable) -> RedisUnavailable: ...


def of_state(keys: Keys) -> Sequence[bytes]:
    """Return keys that one batch for sessions, limits or abuse may touch together."""
    return [keys.abuse, keys.ban_widths, keys.bans, keys.counts]


def of_cache(keys: Keys) -> Sequence[bytes]:
    """Return keys that one batch for a shard of the cache may touch together."""
    return [keys.clock, keys.marks, keys.counts, keys.errors]


def rehearsal(keys: Sequence[bytes], server: Explaining) -> Operation[None]:
    """Load and run a script that does nothing.

    Raises RedisUnavailable where the server can't do what it is there for.
    Redis away: nothing is known, and this returns.
    """
    try:
        yield [(b"SCRIPT", b"LOAD", rehearse.text.source), rehearse(keys)]
    except RedisRefused as refused:
        # A script that has just been loaded can't be missing: several servers answer.
        if is_misconfigured(refused) or refused.reason == "noscript":
            raise server.explain(RedisUnavailable(refused.reason, refused.detail)) from None
    except RedisUnavailable as away:
        if is_misconfigured(away):
            raise
