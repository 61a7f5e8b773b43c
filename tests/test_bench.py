"""The bench measures what it says, and all of it runs."""

from __future__ import annotations

import asyncio
import doctest
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import chart, report
from bench.__main__ import PARTS, RESULTS, arguments
from bench.chart import Bar, Line
from bench.harness import (
    AsyncHit,
    Contestant,
    Hit,
    Results,
    Spread,
    compete,
    counting,
    ready,
)
from bench.page import traffic
from bench.processes import python
from bench.report import Promise, Section, Table
from tests.support import nursery

ROOT = Path(__file__).parent.parent


def work(times: int) -> int:
    total = 0
    for n in range(times):
        total += n
    return total


@pytest.fixture(scope="module")
def results() -> Results:
    """Run a contest of functions that do nothing, a little, and ten times as much."""

    @asynccontextmanager
    async def awaited() -> AsyncIterator[AsyncHit]:
        async def hit() -> int:
            await asyncio.sleep(0)
            return work(10)

        yield hit

    contestants = [
        Contestant("floor", "floor", ready(lambda: None)),
        Contestant("bare", "bare", ready(lambda: work(1_000))),
        Contestant("ours", "ours", ready(lambda: work(100)), expected=4_950),
        Contestant("awaited", "floor", awaited, "async", expected=45),
        Contestant("absent", "peer", _absent),
    ]
    return compete(contestants, rounds=5, hits=20)


def _absent() -> Any:
    raise ImportError("no module named absent")


def test_steps_are_the_same_each_time(results: Results) -> None:
    """Steps are counted and not timed: two counts of one call are equal on a busy machine too."""
    counts = []
    for _ in range(3):
        with counting() as counter:
            work(100)
        counts.append(counter.steps)
    assert len(set(counts)) == 1
    assert results.steps_ratio("ours", "bare") == pytest.approx(0.1, rel=0.1)
    assert results.steps["awaited"] > 10


def test_what_is_added_is_beyond_the_floor(results: Results) -> None:
    """A ratio compares what calls add beyond the floor, taken inside each round."""
    assert results.ratio("ours", "bare").p50 < 0.5
    assert results.ratio("bare", "bare") == Spread(1.0, 1.0, 1.0)
    assert max(map(abs, results.added("floor"))) == 0.0


def test_who_is_not_installed_is_named(results: Results) -> None:
    """A missing package skips its contestant and nobody else."""
    assert results.skipped == {"absent": "no module named absent"}
    assert "absent" not in results.by_name


def test_a_wrong_value_ends_the_contest() -> None:
    """A contestant that returns something else did not do the work."""
    wrong = Contestant("wrong", "floor", ready(lambda: 1), expected=2)
    with pytest.raises(AssertionError, match="wrong returned 1, not 2"):
        compete([wrong], rounds=1, hits=1)


@pytest.mark.parametrize(
    ("figure", "at_most", "kept", "close"),
    [
        (0.5, True, True, False),
        (0.51, True, False, False),
        (2.0, False, False, False),
        (0.4, False, False, False),
        (Spread(0.3, 0.4, 0.45), True, True, False),
        (Spread(0.3, 0.4, 0.6), True, True, True),
        (Spread(0.4, 0.6, 0.7), True, False, True),
    ],
)
def test_a_promise_says_how_it_came_out(
    figure: Any, at_most: bool, kept: bool, close: bool
) -> None:
    """A promise is judged by its median, and is close where its limit lies between the quartiles."""
    promise = Promise("a claim", figure, 0.5 if at_most else 2.5, at_most=at_most)
    assert (promise.kept, promise.close) == (kept, close)
    assert str(promise).startswith("kept" if kept else "BROKEN")


def test_sections_of_several_runs_are_kept_together(tmp_path: Path) -> None:
    """A part that is measured again replaces what it said before, and nothing else."""
    table = Table(["what", "µs"], [["a hit", "1.0"]])
    promise = Promise("quick", Spread(1, 2, 3), 4)
    for name, title in (("one", "Old"), ("two", "Two"), ("one", "New")):
        section = Section(name, title, [table], [promise], ["a note"], {f"{name}.svg": "<svg/>"})
        report.keep(section, tmp_path, "smoke")
    known = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert list(known) == ["one", "two"]
    assert known["one"]["promises"][0]["kept"] is True
    assert "## New" in page
    assert "Old" not in page
    assert "| a hit | 1.0 |" in page
    assert (tmp_path / "two.svg").exists()


def test_charts_are_well_formed() -> None:
    """Every bar has its figure, every line its points; a name cannot break out of its text."""
    drawn = chart.bars("Requests & more", [Bar("<ours>", 42.0, "ours", "Flask"), Bar("x", 0.0)])
    tree = ElementTree.fromstring(drawn)
    texts = [one.text for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Requests & more", "<ours>", "42", "0", "Flask"} <= set(texts)
    lines = [Line("hit", [(0, 1.0), (10, 2.0), (1_000, 0.5)])]
    tree = ElementTree.fromstring(chart.lines("Growth", "keys", lines))
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}circle"))) == 3


@pytest.mark.parametrize("module", [chart, report, traffic])
def test_its_examples_are_true(module: Any) -> None:
    """The examples in the bench's docstrings are true."""
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


def test_what_is_shown_was_measured() -> None:
    """The results in the repository have one format, and each chart of them exists."""
    known = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    assert set(known) <= set(PARTS)
    for section in known.values():
        assert section["machine"]["level"] in ("usual", "full")
        assert all((RESULTS / name).exists() for name in section["charts"])
    assert report.page(known) == (RESULTS / "results.md").read_text(encoding="utf-8")


def test_the_readme_says_what_the_bench_shows() -> None:
    """The figures of a hit and of the page in README are those of bench/results, Django's too."""
    known = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    shown = {
        promise["claim"]: promise["figure"]["p50"]
        for part in ("hits", "page")
        for promise in known[part]["promises"]
        if isinstance(promise["figure"], dict)
    }
    hit = "stillroom: a hit adds, × what redis-py's GET adds"
    page = "{} + Stillroom, {}: requests a second, × the usual parts"
    (flask, fastapi, django), near = (
        [f"{shown[page.format(name, how)]:.1f}" for name in ("Flask", "FastAPI", "Django")]
        for how in ("gather", "near")
    )
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"A hit costs {shown[hit]:.2f} of what `redis.Redis().get()` adds" in readme
    assert f"and {shown[f'async {hit}']:.2f} in asyncio" in readme
    (table, *_) = known["hits"]["tables"]
    times = {row[0]: row[table["columns"].index("× redis-py")].split()[0] for row in table["rows"]}
    unseen, awaited = (times[f"{kind}stillroom, unseen"] for kind in ("", "async "))
    assert f"{unseen} and {awaited} where the process has not read that entry" in readme
    assert (
        f"serves {flask} times the requests of the usual parts in Flask, {fastapi} in FastAPI and "
        f"{django} in Django; {near[0]}, {near[1]} and {near[2]} times where the process keeps"
        in readme
    )


CHARTED = ("hits", "limits", "sessions", "page")  # what README and docs show


def test_a_program_that_ends_too_early_says_why() -> None:
    """The log of a program that ended before it was ready is in the error."""
    source = "print('no database'); raise SystemExit(3)"
    with pytest.raises(RuntimeError, match="no database"), python(["-c", source], set(), {}) as one:
        one.wait_for(lambda: False)


def test_what_was_started_for_a_contest_is_ended_whatever_fails() -> None:
    """The end of an async contestant that fails keeps no sync one open."""
    ended = []

    @asynccontextmanager
    async def failing() -> AsyncIterator[AsyncHit]:
        async def hit() -> None: ...

        yield hit
        raise OSError("its end fails")

    @contextmanager
    def started() -> Iterator[Hit]:
        try:
            yield lambda: None
        finally:
            ended.append(True)

    sync, awaited = Contestant("a", "floor", started), Contestant("b", "floor", failing, "async")
    with pytest.raises(OSError, match="its end fails"):
        compete([sync, awaited], rounds=1, hits=1)
    assert ended == [True]


@pytest.mark.parametrize(
    ("words", "level", "out"),
    [
        ([], "usual", RESULTS),
        (["hits", "--full"], "full", RESULTS),
        (["--quick"], "quick", ROOT / "artefacts" / "bench"),
        (["--quick", "--out", "here"], "quick", Path("here")),
    ],
)
def test_only_a_thorough_run_is_kept_in_the_repository(
    words: list[str], level: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README and docs show what bench/results holds, so a quick run goes elsewhere."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    options = arguments()
    assert (options.level, options.out) == (level, out)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "part",
    [part if part in CHARTED else pytest.param(part, marks=pytest.mark.full) for part in PARTS],
)
def test_each_part_runs(part: str, tmp_path: Path) -> None:
    """Each part of the bench runs with few rounds; parts of missing packages are skipped."""
    words = ["-m", "bench", part, "--level", "smoke", "--out", str(tmp_path)]
    done = nursery.run_text(words, os.environ, ROOT, 300)
    assert done.returncode == 0, done.stdout + done.stderr
    known = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert known[part]["tables"]
