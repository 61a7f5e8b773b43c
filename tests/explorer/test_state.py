"""Sessions, limits, abuse and locks keep their promises in every accident the explorer knows, and broken ones
are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.explorer.abuse import AbuseModel
from tests.explorer.explorer import Broken, Model, explore, maker, search
from tests.explorer.flights import FlightsModel
from tests.explorer.limits import LimitsModel
from tests.explorer.locks import LocksModel
from tests.explorer.sessions import SessionsModel
from tests.explorer.state_mutants import ABUSE, FLIGHTS, LIMITS, LOCKS, SESSIONS
from tests.explorer.world import World

RUNS = {
    True: 875,
    False: 60,
}  # of each kind; in full they are 14,150 together with the cache's
FINDS_WITHIN = 2_500

# Events that happen more often than usual, by the subject of a part of the runs.
ABOUT: dict[str, tuple[type[Model], dict[str, float]]] = {
    "sessions": (SessionsModel, {}),
    "ends": (SessionsModel, {"destroy": 10.0, "rotate": 8.0}),
    "logins": (SessionsModel, {"create": 12.0, "destroy all": 4.0}),
    "limits": (LimitsModel, {}),
    "outages": (LimitsModel, {"away": 6.0, "check": 10.0}),
    "reservations": (LimitsModel, {"reserve": 10.0, "refund": 8.0, "commit": 3.0}),
    "abuse": (AbuseModel, {}),
    "workers": (AbuseModel, {"die": 3.0, "scan": 8.0, "lift": 2.0}),
    "locks": (LocksModel, {}),
    "mutations": (
        SessionsModel,
        {
            "mutate": 10.0,
            "confirm": 3.0,
            "end": 3.0,
            "destroy by tag": 1.0,
            "destroy everybody": 0.7,
        },
    ),
    "flights": (FlightsModel, {}),
}
MUTANTS: dict[str, tuple[type[Model], Callable[[], Any]]] = {
    name: (model, mutant)
    for model, mutants in (
        (SessionsModel, SESSIONS),
        (LimitsModel, LIMITS),
        (AbuseModel, ABUSE),
        (LocksModel, LOCKS),
        (FlightsModel, FLIGHTS),
    )
    for name, mutant in mutants.items()
}
# Each of these shows itself in one of a thousand stories.
SELDOM = ("an end has no age", "a doubt is not cleared", "a refund knows no reset")
# Events that make a mutant show itself soon.
SHOWN_BY: dict[str, dict[str, float]] = {
    "a revocation is sent twice": {"destroy all": 12.0, "create": 10.0},
    "a mutation overwrites another": {"mutate": 20.0},
    "a mutation whose result is not read is told as none": {"mutate": 20.0},
    "a name ends its session for ever": {"rotate": 12.0, "destroy": 8.0},
    "a check does not wait for what is owed": {"away": 6.0, "check": 10.0},
    "a refund takes from one entry only": {"reserve": 14.0, "refund": 10.0, "check": 3.0},
    "what is given back of hits that count here is taken off twice": {
        "reserve": 14.0,
        "refund": 10.0,
    },
}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("about", ABOUT)
def test_no_accident_breaks_a_promise(world: World, about: str, is_full: bool) -> None:
    """Ended sessions stay so, no quota is exceeded, no one is banned wrongly and no two hold a lock, whatever is
    lost, late or doubled.
    """
    first, runs = list(ABOUT).index(about) * 1_000_000, RUNS[is_full]
    model, weights = ABOUT[about]
    assert explore(world, range(first, first + runs), maker(model, **weights)) == runs


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "mutant",
    [pytest.param(one, marks=pytest.mark.full) if one in SELDOM else one for one in MUTANTS],
)
def test_what_is_broken_is_found(world: World, mutant: str) -> None:
    """Each broken variant of the services breaks a promise in one of the runs, whose story is printed."""
    model, broken = MUTANTS[mutant]
    with broken(), pytest.raises(Broken) as told:
        search(world, mutant, FINDS_WITHIN, maker(model, **SHOWN_BY.get(mutant, {})))
    assert "begins in process" in str(told.value)
