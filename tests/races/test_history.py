"""Four processes read, load, refresh and set while one of them writes and invalidates: no stale read."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

import redis
from stillroom.embedded import EmbeddedServer
from tests.support.crowd import Crowd
from tests.support.history import KINDS, Floor, Read, records_of, stale_reads
from tests.support.processes import Program

PROCESSES = 4
SECONDS = 4.0
LONG = {True: 30.0, False: 5.0}  # in full and in short
LONGER = 1, 2, 4  # times: a busy machine plays until it was no idle run
READS, VERSIONS_SEEN = 1_000, 100  # fewer would say little; a slow machine has ten times as many


def play(
    server: EmbeddedServer, seconds: float, mutant: str = "", processes: int = PROCESSES
) -> tuple[list[Read], list[Floor]]:
    """Play a history of that many seconds, in as many processes."""
    crowd = Crowd(server.url)
    sources = [
        "from tests.support.history import take_part\n"
        f"take_part({server.url!r}, {seconds}, {mutant!r}, writes={number == 0})"
        for number in range(processes)
    ]
    reads: list[Read] = []
    floors: list[Floor] = []
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(source, seconds + 30)) for source in sources]
        crowd.await_ready(processes)
        crowd.give("go", processes)
        for program in programs:
            more_reads, more_floors = records_of(program.read_word("records "))
            reads += more_reads
            floors += more_floors
    crowd.close()
    return reads, floors


@pytest.mark.timeout(300)
def test_no_read_sees_what_was_invalidated_before_it_began(server: EmbeddedServer) -> None:
    """By key, tag, tag found in the value, pattern, set, softly, all at once: 0 stale reads of thousands."""
    written: set[str] = set()
    seen: set[str] = set()
    count = versions = 0
    for times in LONGER:
        reads, floors = play(server, SECONDS * times)
        assert stale_reads(reads, floors) == []
        written |= {floor.key.partition(":")[0] for floor in floors}
        seen |= {read.key.partition(":")[0] for read in reads}
        count += len(reads)
        versions += len({(read.key, read.version) for read in reads})
        # Every kind was written and read, and readers met many versions.
        if written == seen == set(KINDS) and count > READS and versions > VERSIONS_SEEN:
            return
    pytest.fail(f"{count} reads of {versions} versions, {written} written, {seen} read")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_no_read_is_stale_in_half_a_minute_of_reclaims_and_dropped_patterns(is_full: bool) -> None:
    """Workers sweep all the while, and patterns are dropped as soon as they may be."""
    count = dropped = 0
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        for times in LONGER:
            reads, floors = play(server, LONG[is_full] * times, processes=8)
            assert stale_reads(reads, floors) == []
            count += len(reads)
            dropped = int(client.hget("dropped", "patterns") or 0)
            if count > READS and dropped > 1:
                return
    pytest.fail(f"{count} reads, {dropped} patterns dropped")


@pytest.mark.parametrize("mutant", ["stamped at commit", "lease left alone"])
def test_the_check_finds_a_cache_that_is_wrong(mutant: str) -> None:
    """The same history with a rule left out holds stale reads, and the check sees them."""
    with EmbeddedServer() as server:
        found = next(  # a busy machine plays it again until the moment is met
            (stale for _ in range(5) if (stale := stale_reads(*play(server, SECONDS, mutant)))), []
        )
    assert found
    if mutant == "lease left alone":
        assert {read.key.partition(":")[0] for read, _ in found} == {"key"}


def test_the_check_compares_times_and_versions() -> None:
    """Stale is: begun after the return, and older. Nothing else."""
    floors = [Floor("k", 20, 2), Floor("k", 10, 1), Floor("other", 5, 9)]
    fine = [Read("k", 9, 0), Read("k", 19, 1), Read("k", 20, 2), Read("k", 30, 3)]
    wrong = [Read("k", 10, 0), Read("k", 25, 1)]
    assert stale_reads([*fine, *wrong, Read("unwritten", 99, 0)], floors) == [
        (wrong[0], floors[1]),
        (wrong[1], floors[0]),
    ]
