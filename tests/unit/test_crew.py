"""The loads of one message are run by one thread, by several, or by another process."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from stillroom_workers import crew
from stillroom_workers.crew import Alone, Crew

PATIENCE_S = 10


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every load as slow."""
    monkeypatch.setattr(crew, "ALONE_S", 0.0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat no load as slow."""
    monkeypatch.setattr(crew, "ALONE_S", 3_600.0)


def test_slow_items_are_worked_on_beside_one_another(at_once: None) -> None:
    """Slow items run side by side: three meet at a barrier that opens only for three."""
    barrier, met = threading.Barrier(3), []

    def work(item: int) -> None:
        if item:
            met.append(barrier.wait(PATIENCE_S))

    Crew[int](3).each(work, range(4))
    assert len(met) == 3


@pytest.mark.parametrize("slow", [{0}, {0, 1, 2}], ids=["one", "several"])
def test_items_behind_slow_ones_do_not_wait(slow: set[int]) -> None:
    """Where the first items of a message take long, the others are worked on by free threads meanwhile."""
    others = threading.Semaphore(0)

    def work(item: int) -> None:
        if item not in slow:
            others.release()
            return
        for _ in range(25 - len(slow)):
            assert others.acquire(timeout=PATIENCE_S)
        others.release(25)

    began = time.monotonic()
    Crew[int](5).each(work, range(25))
    assert time.monotonic() - began < PATIENCE_S


class Looks(threading.Event):
    """Says that the message is finished after so many looks."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        return self._left < 0


def test_no_thread_is_called_to_help_while_all_slots_are_taken() -> None:
    """A message that waits for busy slots calls no helpers, which would pile up with each look."""
    busy, called = Crew[int](3), list[Future[None]]()
    with busy._slots, busy._slots, busy._slots:
        busy._look_out(int, deque(range(9)), Looks(50), called)
    assert called == []


def test_quick_items_stay_in_one_thread(never: None) -> None:
    """Quick items stay in one thread, because help costs more than a quick load."""
    threads: set[int] = set()
    Crew[int](8).each(lambda _: threads.add(threading.get_ident()), range(50))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_item_is_worked_on_once_and_never_more_than_size_at_a_time(
    at_once: None, size: int
) -> None:
    """Several messages and single loads share the slots; each item is run once and no more at a time than slots."""
    many, lock = Crew[str](size), threading.Lock()
    seen, inside, most = Counter[str](), 0, 0

    def work(item: str) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.001)
        with lock:
            inside -= 1
            seen[item] += 1

    with ThreadPoolExecutor(12) as tasks:
        done = [tasks.submit(many.each, work, [f"{n}:{m}" for m in range(9)]) for n in range(6)]
        done += [tasks.submit(many.one, work, f"one:{n}") for n in range(6)]
        for task in done:
            task.result(PATIENCE_S)
    assert set(seen.values()) == {1}
    assert len(seen) == 60
    assert most == size


def test_a_message_is_done_when_all_of_it_is(at_once: None) -> None:
    """A message is done only when all its loads are, also one that a helper thread took."""
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01 * item)
        done.append(item)

    Crew[int](4).each(work, range(4))
    assert sorted(done) == [0, 1, 2, 3]


def test_an_error_of_a_single_item_is_its_callers() -> None:
    """An error of a single load reaches its caller, and its slot is free again."""
    one = Crew[int](1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            one.one(lambda item: 1 // item, 0)


def test_a_process_alone_passes_on_what_takes_long(at_once: None) -> None:
    """A process with one thread passes slow loads on to other processes."""
    worked: list[int] = []
    passed: list[int] = []
    Alone[int](passed.append).each(worked.append, range(4))
    assert (worked, passed) == ([], [0, 1, 2, 3])


def test_a_process_alone_does_what_is_quick(never: None) -> None:
    """A process with one thread runs quick loads itself, because a task costs more."""
    worked: list[int] = []
    Alone[int](_refuse(AssertionError)).each(worked.append, range(4))
    assert worked == [0, 1, 2, 3]


def test_what_can_not_be_passed_on_is_done_here(at_once: None) -> None:
    """When the broker is away the loads that cannot be passed on are run here."""
    worked: list[int] = []
    Alone[int](_refuse(ConnectionError)).each(worked.append, range(4))
    assert worked == [0, 1, 2, 3]


def _refuse(error: type[BaseException]) -> Callable[[int], object]:
    def refuse(_: int) -> object:
        raise error

    return refuse


def test_without_a_free_thread_the_items_are_worked_on_all_the_same(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no helper's thread can be started, the thread of the message works on all of its items."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        Crew[int](3).each(done.append, range(5))
    assert sorted(done) == [0, 1, 2, 3, 4]
