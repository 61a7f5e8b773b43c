"""Puts the plan (bench/plan.py) beside what was measured of the page: CPU of the app and Redis for one request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.page import shop
from bench.plan import CORE_US, Load, cache_cores, request_us, state_cores
from bench.report import Promise, Table

WITHIN = 1.6  # of the figure that was measured, either way


class Measured(NamedTuple):
    """Holds what a request of one variant cost, and what the framework alone takes of it, in µs of CPU."""

    name: str
    near: bool
    alone_us: float
    app_us: float
    redis_us: float


def table(measured: list[Measured]) -> Table:
    found = Table(["the plan", "app µs, planned", "measured", "Redis µs, planned", "measured"])
    for one in measured:
        app, server = planned_us(one)
        found.add(
            one.name, f"{app:,.0f}", f"{one.app_us:,.0f}", f"{server:,.0f}", f"{one.redis_us:,.0f}"
        )
    return found


def promises(measured: list[Measured]) -> Iterator[Promise]:
    for one in measured:
        app, server = planned_us(one)
        for what, plan, figure in (("app", app, one.app_us), ("Redis", server, one.redis_us)):
            off = max(plan / figure, figure / plan)
            claim = f"the plan and {one.name}, CPU of {what}: × apart"
            yield Promise(claim, off, WITHIN, by="CPU")


def planned_us(one: Measured) -> tuple[float, float]:
    """Return what the plan says of this page: CPU µs of the app, and of Redis, for one request."""
    load = Load(
        requests=1,
        reads=shop.ON_A_PAGE + 1,
        invalidations=1 / shop.ONE_IN,
        refreshes=0,
        app_us=one.alone_us,
        near=one.near,
    )
    return request_us(load), (state_cores(load) + cache_cores(load)) * CORE_US
