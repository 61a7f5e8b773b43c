"""The plan adds up what acts cost, and says what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.plan import (
    BUSY,
    CORE_US,
    UNITS,
    Load,
    cache_cores,
    lines,
    main,
    planned,
    request_us,
    state_cores,
    units_table,
)

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explanation" / "scaling.md"
DEPLOYMENTS = {
    "10": "--requests 50000 --invalidations 100 --refreshes 1000 --entries 1e7 --users 1e6 --clients 1e6",
    "100": "--requests 500000 --invalidations 1000 --refreshes 10000 --entries 1e8 --users 1e7 --clients 1e7",
    "1,000": "--requests 5000000 --invalidations 1000 --refreshes 100000 --entries 1e9 --users 1e8 --clients 1e8",
}


def test_cores_are_acts_times_what_each_costs() -> None:
    """A second of a server is a million µs; an act that is not done costs nothing."""
    load = Load(requests=1_000, reads=2, checks=1, sessions=1, invalidations=0, refreshes=0)
    check, session = UNITS["limit check"].server_us, UNITS["session read"].server_us
    assert state_cores(load) == pytest.approx(1_000 * (check + session) / CORE_US)
    assert cache_cores(load) == pytest.approx(2_000 * UNITS["cached read"].server_us / CORE_US)
    assert state_cores(load._replace(checks=0, sessions=0)) == 0
    assert request_us(load._replace(checks=0, sessions=0, reads=0)) == load.app_us


def test_a_server_is_full_before_its_core_is() -> None:
    """One server is enough until BUSY of its core is taken; then the plan names a cluster and its setting."""
    each = UNITS["limit check"].server_us + UNITS["session read"].server_us
    most = BUSY * CORE_US / each
    fits, over = planned(Load(requests=most * 0.999)), planned(Load(requests=most * 1.001))
    assert (fits.state_servers, over.state_servers) == (1, 3)
    assert not any("STILLROOM_STATE_CLUSTER" in one for one in fits.bends)
    assert any("STILLROOM_STATE_CLUSTER" in one for one in over.bends)


def test_twice_the_load_takes_twice_the_cores() -> None:
    """Nothing in it is a step but the number of whole servers and processes; marks grow by both their factors."""
    one = Load(requests=10_000, invalidations=100, refreshes=500)
    two = one._replace(requests=20_000, invalidations=200, refreshes=1_000)
    assert state_cores(two) == pytest.approx(2 * state_cores(one))
    assert cache_cores(two) == pytest.approx(2 * cache_cores(one))
    before, after = planned(one), planned(two)
    assert after.app_processes == pytest.approx(2 * before.app_processes, abs=1)
    assert after.marks_bytes_s == pytest.approx(4 * before.marks_bytes_s, rel=0.05)


def test_near_saves_the_reads_of_one_server_and_not_those_of_shards() -> None:
    """On one server a request looks at one clock; on a cluster each shard has its own."""
    small, large = Load(requests=2_000, reads=5), Load(requests=200_000, reads=5)
    assert cache_cores(small._replace(near=True)) < cache_cores(small) / 2
    assert cache_cores(large._replace(near=True)) == cache_cores(large)
    assert request_us(large._replace(near=True)) < request_us(large)


def test_a_number_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Below nothing, infinite or no number at all: the message names what was given."""
    for given in ("-1", "inf", "nan", "many"):
        with pytest.raises(SystemExit):
            main([f"--requests={given}"])
        assert given in capsys.readouterr().err


def test_the_page_shows_what_the_program_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Units and the three deployments on the page are the code's: no number is written twice."""
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(units_table()) in page
    for words in DEPLOYMENTS.values():
        main(words.split())
        assert f"python -m bench.plan {words}\n{capsys.readouterr().out}" in page


def test_the_page_tells_how_far_the_plan_was_from_a_run() -> None:
    """How many times the planned CPU was measured, on the page, is what bench/results shows for each page."""
    known = json.loads((ROOT / "bench/results/results.json").read_text(encoding="utf-8"))
    (plan,) = [one["rows"] for one in known["page"]["tables"] if one["columns"][0] == "the plan"]
    rows = [[int(cell.replace(",", "")) for cell in row[1:]] for row in plan]
    app = sorted(row[1] / row[0] for row in rows)
    redis = sorted(row[3] / row[2] for row in rows)
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"the CPU of the app was {app[0]:.2f} to {app[-1]:.2f} times what it says" in page
    assert f"that of Redis {redis[0]:.2f} to {redis[-1]:.2f} times" in page


def test_each_line_is_whole() -> None:
    """The plan of nothing is one of each."""
    nothing: Any = dict.fromkeys(Load._fields, 0.0) | {"near": False}
    told = "\n".join(lines(planned(Load(**nothing))))
    assert "1 server(s)" in told
    assert "bends" not in told
