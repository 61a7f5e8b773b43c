"""A curve: a table, a chart, and how its points are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench.chart import Line, lines, number
from bench.report import Section, Table

Act = Callable[[], object]


class Curve:
    """Points of several figures over one axis. Each figure has a name and a format."""

    def __init__(self, name: str, title: str, axis: str, figures: dict[str, str]) -> None:
        self.name = name
        self.title = title
        self.axis = axis
        self._figures = figures
        self._points: list[tuple[float, dict[str, float]]] = []

    def add(self, x: float, **values: float) -> None:
        self._points.append((x, values))

    def give(self, section: Section, drawn: Sequence[str]) -> None:
        """Add its table to the section, and a chart of these figures."""
        table = Table([self.axis, *self._figures])
        for x, values in self._points:
            forms = zip(self._figures.values(), values.values(), strict=True)
            table.add(number(x), *(form.format(value) for form, value in forms))
        section.tables.append(table)
        keys = list(self._points[0][1])
        names = dict(zip(self._figures, keys, strict=True))
        series = [Line(one, [(x, v[names[one]]) for x, v in self._points]) for one in drawn]
        section.charts[f"growth-{self.name}.svg"] = lines(self.title, self.axis, series)
        section.figures[self.name] = [{"x": x, **values} for x, values in self._points]


def ratio(act: Act, plain: Act, rounds: int, hits: int) -> float:
    """Return the act's CPU as a multiple of the plain one's: the median of rounds that take turns."""
    act(), plain()
    ratios = []
    for turn in range(rounds):
        ways = (act, plain) if turn % 2 else (plain, act)
        taken = {way: cpu_us(way, hits) for way in ways}
        ratios.append(taken[act] / taken[plain])
    return median(ratios)


def cpu_us(act: Act, hits: int) -> float:
    """Return the CPU µs of this thread for one call."""
    began = time.thread_time_ns()
    for _ in range(hits):
        act()
    return (time.thread_time_ns() - began) / 1_000 / hits


def server_us(client: Any, act: Act, commands: Sequence[str], calls: int) -> float:
    """Return the µs of the server in these commands for one call."""
    client.config_resetstat()
    for _ in range(calls):
        act()
    stats = client.info("commandstats")
    names = [name for name in map("cmdstat_{}".format, commands) if name in stats]
    return float(sum(stats[name]["usec"] for name in names)) / calls


def used_memory(client: Any) -> int:
    return int(client.info("memory")["used_memory"])
