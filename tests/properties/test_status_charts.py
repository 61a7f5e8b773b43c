"""Any day can be drawn inside its plot and with its extremes, whatever was measured and whenever."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.health.report import Measures
from stillroom.web.status import charts
from stillroom.web.status.choices import DAY_S
from stillroom.web.status.figures import COUNT
from stillroom.web.status.series import Period, Row, Span, low_and_high, thinned, with_gaps

NOW = 1_800_001_500.0
WINDOW = Span(NOW - DAY_S, NOW)
ANY = st.none() | st.floats() | st.integers(-5, 10_000)
SERIES = st.integers(1, 3)


@st.composite
def days(draw: st.DrawFn) -> list[Row]:
    """Draw rows of one to three series, some of them known, at any seconds of the day."""
    series = draw(SERIES)
    seconds = draw(st.lists(st.integers(0, int(DAY_S)), unique=True, max_size=400).map(sorted))
    values = [draw(st.tuples(*[ANY] * series)) for _ in seconds]
    measures = [Measures(time=WINDOW.start + second, servers=()) for second in seconds]
    given_at = {one.time: value for one, value in zip(measures, values, strict=True)}
    day = Period(WINDOW, measures, (), ())
    return day.rows([lambda m, n=n: given_at[m.time][n] for n in range(series)])


@settings(max_examples=150, deadline=None)
@given(days())
def test_what_is_drawn_is_inside_the_plot_and_holds_the_extremes(rows: list[Row]) -> None:
    """No drawn point is outside the plot or not a number, and each series keeps its lowest and highest."""
    few = thinned(with_gaps(rows), WINDOW)
    series = len(rows[0].values) if rows else 1
    for n in range(series):
        assert low_and_high(few, n) == low_and_high(rows, n)
    highest = max((sum(value or 0.0 for value in row.values) for row in rows), default=0.0)
    for is_stacked in (False, True):
        day = Period(WINDOW, (), (), ())
        plot = charts.Plot(day, few, series, COUNT.top(highest), COUNT, is_stacked=is_stacked)
        svg = charts.chart(plot, "says")
        assert not re.search(r"\b(nan|inf)\b", svg)
        for path in re.findall(r' d="([^"]*)"', svg):
            for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path):
                assert 0 <= float(x) <= charts.WIDE
                assert -0.01 <= float(y) <= charts.HIGH
