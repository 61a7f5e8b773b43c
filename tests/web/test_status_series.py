"""A day of snapshots is drawn without losing what matters, in pure functions."""

from __future__ import annotations

import re

import pytest

from stillroom.health.report import Clients, Connection, Measures, RedisInfo, Report, Server
from stillroom.web.status import charts
from stillroom.web.status.choices import DAY_S, MINUTE_S
from stillroom.web.status.numbers import Unit, ago, amount, number, said, share, size, span
from stillroom.web.status.series import (
    Period,
    Row,
    Span,
    by_step,
    period_of,
    thinned,
    with_gaps,
)
from tests.support.status import CACHE_AWAY, MINUTES, OUTAGE, a_day, a_report

NOW = 1_800_001_500.0
WINDOW = Span(NOW - DAY_S, NOW)
THIN = "\u202f"


def rows(*values: float | None, step: float = MINUTE_S) -> list[Row]:
    """Make a row a minute, up to now."""
    first = NOW - (len(values) - 1) * step
    return [Row(first + n * step, (value,)) for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0), "0"),
        (number(0.4), "0.4"),
        (number(94.21), "94.2"),
        (number(99.96), "100"),
        (number(1_204.4), "1,204"),
        (number(0.000_01), "0"),
        (amount(9_999), "9,999"),
        (amount(12_431), "12.4k"),
        (amount(999_950), "1M"),
        (amount(3.25e14), "325T"),
        (size(0), f"0{THIN}B"),
        (size(327_155_712), f"312{THIN}MB"),
        (size(1_023 * 1024**2), f"0.999{THIN}GB"),
        (size(2.0**60), f"1.05e+06{THIN}TB"),
        (share(0.9421), f"94.2{THIN}%"),
        (span(0), f"0{THIN}s"),
        (span(0.00044), f"0.44{THIN}ms"),
        (span(59.7), f"1{THIN}min"),
        (span(75), f"1{THIN}min 15{THIN}s"),
        (span(3_900), f"1{THIN}h 5{THIN}min"),
        (span(200_000), f"2{THIN}d 8{THIN}h"),
        (ago(0.2), "just now"),
        (ago(59), f"59{THIN}s ago"),
        (ago(7_300), f"2{THIN}h ago"),
        (said(None, number), "–"),
    ],
)
def test_numbers_are_short_and_have_units(text: str, expected: str) -> None:
    """A number has three digits and a unit, or is exact while short; an unknown one is a dash."""
    assert text == expected


@pytest.mark.parametrize(
    ("highest", "top"), [(0, 2), (3, 4), (11, 12), (23_000, 30_000), (1_001, 1_200), (801, 1_000)]
)
def test_an_axis_ends_at_a_round_number(highest: float, top: float) -> None:
    """An axis ends at a round number whose half is round too; three tasks get no half."""
    assert Unit(amount, least=2, is_whole=True).top(highest) == pytest.approx(top)


def test_an_axis_of_bytes_is_round_in_bytes() -> None:
    """An axis of bytes is round in bytes: 1,024 MB is labelled 1 GB."""
    unit = Unit(size, base=1024)
    assert unit.text(unit.top(1024.0**3)) == f"1{THIN}GB"
    assert unit.text(unit.top(812 * 1024.0**2)) == f"1{THIN}GB"
    assert unit.text(unit.top(312 * 1024.0**2)) == f"400{THIN}MB"


def test_a_spike_of_one_minute_is_not_lost() -> None:
    """Thinning 1,440 points to some 200 keeps the highest and the lowest."""
    values: list[float | None] = [100.0 + n % 7 for n in range(MINUTES)]
    values[700], values[900] = 9_000.0, 1.0
    few = thinned(rows(*values), WINDOW)
    assert 100 <= len(few) <= 202
    assert {9_000.0, 1.0} <= {row.values[0] for row in few}
    assert few == sorted(few, key=lambda row: row.time)


def test_each_series_of_a_row_keeps_its_own_spike() -> None:
    """Thinning one of two lines in a chart keeps the other's spike."""
    many = [Row(WINDOW.start + n * 60, (5.0, 1.0)) for n in range(MINUTES)]
    many[300] = many[300]._replace(values=(5.0, 80.0))
    many[301] = many[301]._replace(values=(70.0, 1.0))
    few = thinned(many, WINDOW)
    assert {value for row in few for value in row.values} == {5.0, 1.0, 80.0, 70.0}


def test_what_is_not_known_is_a_hole_in_the_line() -> None:
    """Unknown or missing minutes break the line, and a lone point between two holes is a dot."""
    known = [*rows(1, 2, None, 3, None, 4, 5)]
    path = charts.line([(row.time, row.values[0]) for row in known], WINDOW, 10)
    assert [part.count("L") for part in re.split("M", path)[1:]] == [1, 0, 1]
    assert re.search(r"M[\d. ]+h0M", path)
    with_hole = list(with_gaps([*rows(1, 2), Row(NOW + 600, (3.0,))]))
    assert [row.values[0] for row in with_hole] == [1, 2, None, 3]


def test_one_late_snapshot_is_no_gap() -> None:
    """One missing minute, as after a restart of beat, does not break the line."""
    late = [Row(NOW - 120, (1.0,)), Row(NOW, (2.0,))]
    assert list(with_gaps(late)) == late


def test_a_day_knows_where_nothing_was_written() -> None:
    """Twelve minutes without a snapshot are one gap; the day before the first snapshot is another."""
    whole = a_day(NOW)
    (gap,) = period_of(a_report(whole[-1]), whole, NOW).gaps
    assert gap.length == pytest.approx((len(OUTAGE) + 1) * 60)
    late = [one for one in whole if one.time > NOW - 3_600]
    (gap,) = period_of(a_report(late[-1]), late, NOW).gaps
    assert gap == Span(WINDOW.start, late[0].time)


def test_a_day_knows_when_a_server_was_away() -> None:
    """A server was away from the first snapshot with an error to the minute after the last."""
    day = a_day(NOW, two_servers=True)
    (failure,) = period_of(a_report(day[-1]), day, NOW).failures
    assert failure.length == pytest.approx(len(CACHE_AWAY) * 60)
    assert failure.end <= NOW


def test_what_is_not_of_this_day_is_left_out() -> None:
    """Snapshots of yesterday or the future are left out, and their order does not matter."""
    whole = a_day(NOW, minutes=30)
    strange = [
        one.model_copy(update={"time": NOW + add})
        for one, add in zip(whole, (600, -90_000), strict=False)
    ]
    found = period_of(a_report(whole[-1]), [*reversed(whole), *strange], NOW)
    times = [one.time for one in found.measures]
    assert times == sorted(times)
    assert len(times) == len(whole) + 1


@pytest.mark.parametrize("wild", [float("inf"), float("nan"), -5.0, 1e16])
def test_wild_values_are_unknown(wild: float) -> None:
    """An absurd value is unknown and does not press the line of the day flat."""
    measures = [Measures(time=NOW, servers=())]
    day = Period(WINDOW, measures, (), ())
    assert day.rows([lambda _: wild, lambda _: 7]) == [Row(NOW, (None, 7))]


def test_the_table_has_the_newest_hour_first() -> None:
    """The table begins with the newest hour, and each hour of UTC has its own rows."""
    hours = by_step(rows(*range(120)), 3_600)
    assert [len(run) for _, run in hours] == [26, 60, 34]
    assert hours[0][0] > hours[1][0]


def test_stacked_areas_stand_on_each_other() -> None:
    """Stacked areas stand on each other with the last series at the bottom."""
    stack = [Row(WINDOW.start, (6.0, 3.0, 1.0)), Row(NOW, (2.0, 1.0, 1.0))]
    day = Period(WINDOW, (), (), ())
    svg = charts.chart(charts.Plot(day, stack, 3, 10.0, Unit(amount), is_stacked=True), "says")
    areas = re.findall(r'<path d="M([^"]+)Z" class="area', svg)
    corners = [[float(place.split()[1]) for place in area.split("L")] for area in areas]
    assert corners == [[0, 60, 80, 60], [60, 80, 90, 90], [90, 90, 100, 100]]


def test_a_point_stands_where_its_number_is() -> None:
    """A point's coordinates are its minutes from the left and its percent from the top."""
    path = charts.line([(NOW - DAY_S / 2, 25.0), (NOW, 100.0)], WINDOW, 100)
    assert path == "M720.0 75.00L1440.0 0.00"


def test_a_single_moment_is_enough() -> None:
    """A report without any snapshot is enough for a table and charts."""
    server = Server(
        name="redis",
        roles=("cache", "state"),
        connection=Connection(is_up=True, breaker="closed"),
        redis=RedisInfo(clients=Clients(connected=3)),
    )
    day = period_of(Report(time=NOW, servers=(server,), status="pass"), [], NOW)
    assert day.rows([lambda m: m.servers[0].redis and m.servers[0].redis.clients.connected]) == [
        Row(NOW, (3,))
    ]
    assert day.gaps == [WINDOW]
