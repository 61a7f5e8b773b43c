"""Defines beat's schedule as data. Every task here may run twice, late, or in two beats at once."""

from __future__ import annotations

from typing import Any, NamedTuple

# A tick that nobody took is dropped in the end, so that a worker that was away for a day does not find a day of
# them. The clocks of beat and worker decide that, and either may be an hour off: so not sooner.
EXPIRES_AFTER_S = 7_200.0


class Tick(NamedTuple):
    """One line of the schedule."""

    name: str
    task: str
    every: float  # seconds
    why: str


SCHEDULE = [
    Tick(
        "reclaim",
        "stillroom.reclaim",
        15.0,
        "what invalidations left to do is done even if the task that was to begin it got lost",
    ),
    Tick(
        "trim-indexes",
        "stillroom.trim_indexes",
        60.0,
        "an index whose tag is never written again keeps the names of entries that ran out",
    ),
    Tick(
        "trim-marks",
        "stillroom.trim_marks",
        60.0,
        "marks of invalidations are kept only as long as an entry they could name can live",
    ),
    Tick(
        "warm",
        "stillroom.warm",
        10.0,
        "what loaders want loaded at set times is ordered, at most ten seconds after it is due",
    ),
    Tick(
        "sweep-sessions",
        "stillroom.sweep_sessions",
        60.0,
        "what expired or was revoked leaves Redis within a minute or two, and its user hears of it",
    ),
    Tick(
        "log-abuse",
        "stillroom.log_abuse",
        5.0,  # as long as a scan takes at most: in an attack, one follows another
        "an attack is seen, and stopped if its rule bans, within seconds",
    ),
    Tick(
        "snapshot-health",
        "stillroom.snapshot_health",
        60.0,
        "charts need yesterday, rates need the minute before, and a finding is told when it begins",
    ),
]


def beat_schedule(queue: str) -> dict[str, dict[str, Any]]:
    """Return the schedule as Celery takes it."""
    return {
        tick.name: {
            "task": tick.task,
            "schedule": tick.every,
            "options": {"queue": queue, "expires": EXPIRES_AFTER_S, "ignore_result": True},
        }
        for tick in SCHEDULE
    }
