"""Failovers again and again, under load: nothing that was acknowledged is taken back, and nobody is restarted.

In full, on a machine with nothing else to do: `make test ARGS="tests/failover/test_proofs.py --full"`.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import pytest

from stillroom import NoDispatch, SessionStoreUnavailable, Settings, Stillroom
from tests.failover.conftest import UNHURRIED
from tests.support.celery_process import until
from tests.support.failing_over import History, behind_by
from tests.support.history import stale_reads
from tests.support.lag import least
from tests.support.sentinels import Sentinels

FAILOVERS = {True: 20, False: 3}  # in full; in short, each kind of accident once
RECOVERS_S = 1.5  # from the promotion to the first write that is done
SESSIONS = {True: 1_000, False: 200}
AWAY_TTL = 1.0
LOAD_S = 0.5  # what a load takes on a busy machine


def fail_over(sentinels: Sentinels, history: History, times: int) -> list[float]:
    """Cause that many accidents of all kinds. Return how long the first write took after each promotion."""
    took = []
    for kind in islice(cycle(["killed", "frozen", "cut"]), times):
        history.await_writes(20, 30)
        with sentinels.accident(kind):
            sentinels.promote_another()
            took.append(history.await_writes(1, 15))
            history.await_writes(20, 30)
    return took


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "promise",
    [{"away_ttl": 0}, {"replicas": 1, "away_ttl": 0}],
    ids=["a new epoch", "replicas=1"],
)
def test_twenty_failovers_and_no_stale_read(
    sentinels: Sentinels,
    promise: dict[str, Any],
    is_full: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By key, tag, pattern, set and clear, with loads and refreshes all the while."""
    took: list[float] = []

    def recovery() -> float:
        """Return what the first write after a promotion took: the longest, or the median of a few."""
        found = fail_over(sentinels, history, FAILOVERS[is_full])
        took.extend(found)
        return max(found) if is_full else sorted(found)[len(found) // 2]

    with History(sentinels.url, **UNHURRIED, **promise) as history:
        recovered = least(recovery, RECOVERS_S)
    with capsys.disabled():
        print(
            f"\n{promise}: {len(took)} failovers, {len(history.reads):,} reads, {len(history.floors):,} writes,"
            f" {history.unconfirmed} unconfirmed, {history.refused} refused; recovered in {max(took):.2f} s at most"
        )
    assert stale_reads(history.reads, history.floors) == []
    assert len(history.reads) > 1_000
    assert recovered < RECOVERS_S


@pytest.mark.long
@pytest.mark.timeout(600)
def test_by_default_a_load_during_the_outage_is_shared_for_a_second(
    sentinels: Sentinels, is_full: bool
) -> None:
    """What another process invalidates meanwhile is missed by that second and the load, and by no more."""
    with History(sentinels.url, **UNHURRIED) as history:
        fail_over(sentinels, history, 6 if is_full else 2)
    late = [seconds for seconds, *_ in behind_by(history.reads, history.floors)]
    assert max(late, default=0.0) < AWAY_TTL + LOAD_S


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["killed", "frozen", "cut"])
def test_sessions_that_were_ended_stay_ended(
    sentinels: Sentinels, kind: str, is_full: bool
) -> None:
    """With replicas=1, whatever happens to the primary as soon as the last logout has returned: 0 of 1,000."""
    settings = Settings(redis_url=sentinels.url, replicas=1, **UNHURRIED)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        ended = [room.sessions.create(f"u{n}") for n in range(SESSIONS[is_full])]
        stays = room.sessions.create("stays")
        confirmed = []
        for session in ended:
            with room.request() as request:
                assert room.sessions.destroy(session)
                if not request.unconfirmed:
                    confirmed.append(session)
        with sentinels.accident(kind):
            sentinels.promote_another()
            found = [one for one in confirmed if _seen(room, one) is not None]
            assert found == []
            assert _seen(room, stays) is not None
    assert len(confirmed) > len(ended) * 0.9


def _seen(room: Stillroom, session: Any) -> Any:
    def look() -> tuple[Any] | None:
        try:
            return (room.sessions.get(session),)
        except SessionStoreUnavailable:
            return None

    return until(look, "an answer")[0]
