"""Which limits that one request carries are asked for in one check, and what each of them counts."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom import InvalidLimit, Limit
from stillroom.web.limited import ALL, Charge, declared, run
from stillroom.web.visit import merged

IP = "192.0.2.1"
ONE, TWO, THREE = (Limit(name, 9, 60) for name in ("one", "two", "three"))
ANN = {"user": "ann"}


class Here:
    """Stand for a request, as a framework shows it."""

    request = None

    def address(self) -> str:
        return IP

    def header(self, name: str) -> str | None:
        return None

    def user(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("charges", "checks"),
    [
        ([Charge((ONE,), IP)], [Charge((ONE,), IP)]),
        ([Charge((ONE,), IP), Charge((TWO,), IP)], [Charge((ONE, TWO), IP)]),
        (
            [Charge((ONE,), IP, 1, ("failures",)), Charge((TWO,), IP, 1, ALL)],
            [Charge((ONE, TWO), IP, 1, ("failures", "all"))],
        ),
        (
            [Charge((ONE,), IP, 1, ALL), Charge((TWO,), IP, 1, ("failures",))],
            [Charge((ONE, TWO), IP, 1, ("all", "failures"))],
        ),
        (
            [Charge((ONE,), IP), Charge((TWO,), {"ip": IP} | ANN), Charge((THREE,), ANN)],
            [Charge((ONE, TWO, THREE), {"ip": IP} | ANN)],
        ),
        ([Charge((ONE,), IP), Charge((TWO,), {"ip": IP})], [Charge((ONE, TWO), IP)]),
    ],
)
def test_charges_of_one_request_are_one_check(charges: list[Charge], checks: list[Charge]) -> None:
    """Limits that follow one another are asked for together. Each counts the answers that it was declared for."""
    assert merged(charges) == checks


@pytest.mark.parametrize(
    "other",
    [
        Charge((TWO,), IP, 2),
        Charge((TWO,), "192.0.2.2"),
        Charge((TWO, Limit("one", 5, 60)), IP),
    ],
    ids=["cost", "subject", "name"],
)
def test_charges_that_do_not_fit_are_checks_of_their_own(other: Charge) -> None:
    """One check has one cost and one subject of each kind, and no name twice."""
    charges = [Charge((ONE,), IP), other]
    assert merged(charges) == charges


@pytest.mark.parametrize("given", [None, "", 0])
def test_a_plan_without_limits_opens_no_door(given: Any) -> None:
    """A function of the request that returns no limits by mistake is an error; an empty list means no limits."""

    def plan_of(request: Any) -> Any:
        return given

    with pytest.raises(
        InvalidLimit, match=r"^'plan_of': it returned None; return|limits are a list"
    ):
        run(declared([plan_of], None, 1, "all", None).of(Here()))
    assert run(declared([lambda request: []], None, 1, "all", None).of(Here())) is None
