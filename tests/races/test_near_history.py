"""Processes keep copies and read them, in requests and outside, while all of them change what they own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from stillroom.embedded import EmbeddedServer
from tests.support.crowd import Crowd
from tests.support.near_history import FACES, KINDS, Floor, History, Read, broken, history_of
from tests.support.processes import Program

SECONDS = 3.0
LONG = {True: 30.0, False: 4.0}  # in full and in short
READS, HITS = 1_000, 50  # fewer would say little
LONGER = 1, 2, 4  # times: a busy machine plays until that many were made
PATCH = "from gevent import monkey; monkey.patch_all()\n"


def play(server: EmbeddedServer, seconds: float, faces: list[str], mutant: str = "") -> History:
    """Play a history of that many seconds, with a process for each of these faces."""
    crowd = Crowd(server.url)
    sources = [
        (PATCH if face == "gevent" else "")
        + "from tests.support.near_history import take_part\n"
        + f"take_part({server.url!r}, {seconds}, {n}, {len(faces)}, {face!r}, {mutant!r})"
        for n, face in enumerate(faces)
    ]
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(source, seconds + 60)) for source in sources]
        crowd.await_ready(len(faces))
        crowd.give("go", len(faces))
        history = history_of(program.read_word("records ") for program in programs)
    crowd.close()
    return history


@pytest.mark.timeout(300)
def test_no_read_near_is_older_than_it_may_be(server: EmbeddedServer) -> None:
    """All kinds of changes, by threads, tasks and greenlets, also of a process that keeps nothing: 0 broken."""
    pytest.importorskip("gevent")
    written: set[str] = set()
    reads, near_hits = 0, dict.fromkeys(set(FACES) - {"plain"}, 0)
    for times in LONGER:
        history = play(server, SECONDS * times, [*FACES])
        assert history.broken() == []
        written |= {floor.key.partition(":")[0] for floor in history.floors}
        reads += len(history.reads)
        hits_of = dict(zip(FACES, history.hits, strict=True))
        near_hits = {face: hits + hits_of[face] for face, hits in near_hits.items()}
        if written == {*KINDS} and reads > READS and min(near_hits.values()) > HITS:
            return
    pytest.fail(f"{reads} reads, {near_hits} hits, {written} written")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_no_read_near_is_older_in_half_a_minute_of_eight_processes(is_full: bool) -> None:
    """No read near is older than it may be in half a minute of eight processes."""
    pytest.importorskip("gevent")
    reads, enough = 0, (10 if is_full else 2) * READS
    with EmbeddedServer() as server:
        for times in LONGER:
            history = play(server, LONG[is_full] * times, [*FACES] * 2)
            assert history.broken() == []
            reads += len(history.reads)
            if reads > enough:
                return
    pytest.fail(f"{reads} reads")


@pytest.mark.long
@pytest.mark.parametrize(
    "mutant", ["own change forgotten", "own key forgotten", "proved after the read"]
)
def test_the_check_finds_copies_that_are_wrong(mutant: str) -> None:
    """The same history with a rule left out holds reads that are too old, and the check sees them."""
    with EmbeddedServer() as server:
        assert any(play(server, 2.0, ["threads", "plain"], mutant).broken() for _ in range(5))


def test_the_check_knows_who_must_see_what() -> None:
    """A process sees its own changes at once; those of others from the beginning of its request on."""
    floors = [Floor("k:1", 1, 20, 2)]
    by_another = [Read("k:1", 2, 30, 19, 1), Read("k:1", 2, 30, 25, 1)]
    by_itself = [Read("k:1", 1, 19, 10, 1), Read("k:1", 1, 30, 10, 1)]
    assert broken(by_another, floors) == [(by_another[1], floors[0])]
    assert broken(by_itself, floors) == [(by_itself[1], floors[0])]
