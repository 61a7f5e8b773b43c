"""The checks in flight are counted by log, at a cost that does not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.limits import flying
from stillroom.limits.flying import Flying
from stillroom.wire import reset_after_fork
from tests.support.threads import at_once

ONE, OTHER = b"one", b"other"
LOGS = [b"a", b"b", b"c"]


class Check:
    """What Redis is asked for. It counts how often somebody looks at it."""

    looks = 0

    def __init__(self, logs: Sequence[bytes], cost: int = 1) -> None:
        self._logs = logs
        self.cost = cost

    @property
    def logs(self) -> Sequence[bytes]:
        Check.looks += 1
        return self._logs


STEPS = st.one_of(
    st.tuples(st.just("begin"), st.lists(st.sampled_from(LOGS), unique=True), st.integers(0, 3)),
    st.tuples(st.just("end"), st.integers(0, 20)),
    st.tuples(st.just("ask")),
)


@given(st.lists(STEPS, max_size=60), st.integers(0, 5))
def test_the_sums_are_those_of_the_checks_in_flight(steps: list[tuple], noted: int) -> None:  # type: ignore[type-arg]
    """Whatever begins, ends and asks in between, the hits are those of the checks that have begun and not ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flying, "NOTED", noted)
        checks, marks = Flying(), []
        running: dict[object, Check] = {}
        for what, *about in steps:
            if what == "begin":
                check = Check(*about)
                marks.append(checks.begin(check))
                running[marks[-1]] = check
            elif what == "end" and marks:
                mark = marks[about[0] % len(marks)]  # of some for the second time
                checks.end(mark)
                running.pop(mark, None)
            else:
                found = checks.hits(LOGS)
                for log in LOGS:
                    expected = sum(one.cost for one in running.values() if log in one.logs)
                    assert found.get(log, 0) == expected


@pytest.mark.parametrize("logs", [[ONE], [ONE, OTHER], None])
def test_a_decision_does_not_look_at_all_checks(logs: list[bytes] | None) -> None:
    """Checks that fail together look at each check a few times, and not each of them at all the others."""
    checks, count = Flying(), 3_000
    begun = [checks.begin(Check(logs or [b"%d" % n])) for n in range(count)]
    Check.looks = 0
    for n, mark in enumerate(begun):
        checks.end(mark)
        asked = logs or [b"%d" % (n + 1)]
        found = checks.hits(asked)
        left = count - n - 1
        assert found.get(asked[0], 0) == (left if logs else min(left, 1))
    assert Check.looks <= 2 * count


def test_a_check_does_not_count_against_itself() -> None:
    """The hits of the check that is decided about are left out while it is in flight, and nobody else's are."""
    checks = Flying()
    assert checks.begin(Check([ONE, OTHER], 3), "own") == "own"
    checks.begin(Check([ONE], 2))
    assert checks.hits([ONE], but="own") == {ONE: 2}
    assert checks.hits([ONE, OTHER]) == {ONE: 5, OTHER: 3}
    checks.end("own")
    assert checks.hits([ONE], but="own") == {ONE: 2}


def test_checks_that_redis_decides_are_not_kept() -> None:
    """What begins and ends while no decision asks is forgotten, also where one has asked before."""
    checks = Flying()
    checks.begin(Check([ONE], 2))
    assert checks.hits([ONE]) == {ONE: 2}
    for _ in range(flying.NOTED):
        checks.end(checks.begin(Check([OTHER])))
    assert checks._sums is None
    assert checks.hits([ONE, OTHER]) == {ONE: 2}


def test_threads_lose_no_hit() -> None:
    """Threads that begin, ask and end at the same time each see their own hits, and leave none."""
    checks = Flying()

    def work(number: int) -> None:
        own = b"own %d" % number
        for _ in range(300):
            mark = checks.begin(Check([own, ONE]))
            found = checks.hits([own, ONE])
            assert found[own] == 1
            assert 1 <= found[ONE] <= 8
            checks.end(mark)

    at_once(8, work)
    assert not any(checks.hits([ONE, *[b"own %d" % n for n in range(8)]]).values())


def test_a_decision_within_a_decision_counts_the_same() -> None:
    """A signal handler that asks while this thread adds up is answered, and spoils no sum."""
    checks, within = Flying(), []

    class Interrupting(Check):
        @property
        def logs(self) -> Sequence[bytes]:
            if not within:
                within.append(None)
                within[0] = checks.hits([ONE])
            return [ONE]

    checks.begin(Interrupting([ONE]))
    checks.begin(Check([ONE], 4))
    assert checks.hits([ONE]) == {ONE: 5}
    assert within == [{ONE: 5}]


def test_an_interrupted_sum_is_made_anew() -> None:
    """A KeyboardInterrupt while a thread adds up leaves no half of a sum."""
    checks, hurts = Flying(), [True]

    class Interrupted(Check):
        @property
        def logs(self) -> Sequence[bytes]:
            if hurts:
                hurts.clear()
                raise KeyboardInterrupt
            return [ONE]

    checks.begin(Check([ONE], 4))
    checks.begin(Interrupted([ONE]))
    with pytest.raises(KeyboardInterrupt):
        checks.hits([ONE])
    assert checks.hits([ONE]) == {ONE: 5}


def test_a_child_has_no_checks_of_its_parent() -> None:
    """A forked child counts none of its parent's checks, because they never end in it."""
    checks = Flying()
    reset_after_fork(checks)
    mark = checks.begin(Check([ONE], 4))
    assert checks.hits([ONE]) == {ONE: 4}
    child = os.fork()
    if not child:
        checks.end(mark)
        os._exit(0 if not checks.hits([ONE]) and not checks._asked else 1)
    assert os.waitpid(child, 0)[1] == 0
