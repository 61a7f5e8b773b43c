"""The loads of one message are run by one thread, by several, or by another process."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

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

    Crew[int](3).each(work, deque(range(4)))
    assert len(met) == 3


def test_an_error_of_a_helper_is_told(at_once: None) -> None:
    """What is raised where a helper works is raised to whoever has the message, when the others have ended."""
    caller, raised = threading.get_ident(), threading.Event()

    def work(item: int) -> None:
        if threading.get_ident() != caller:
            raised.set()
            raise LookupError(f"item {item}")
        assert raised.wait(PATIENCE_S)

    with pytest.raises(LookupError):
        Crew[int](3).each(work, deque(range(4)))


def test_helpers_have_ended_when_an_error_is_told(at_once: None) -> None:
    """Where the message's own thread raises, the message is at an end only when no helper works on it."""
    caller, done = threading.get_ident(), list[int]()
    taken, go_on = threading.Event(), threading.Event()

    def work(item: int) -> None:
        if threading.get_ident() == caller:
            assert taken.wait(PATIENCE_S)
            threading.Timer(0.05, go_on.set).start()
            raise LookupError(f"item {item}")
        taken.set()
        assert go_on.wait(PATIENCE_S)
        done.append(item)

    with pytest.raises(LookupError):
        Crew[int](2).each(work, deque(range(2)))
    assert len(done) == 1


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
    Crew[int](5).each(work, deque(range(25)))
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
    Crew[int](8).each(lambda _: threads.add(threading.get_ident()), deque(range(50)))
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
        messages = [deque(f"{n}:{m}" for m in range(9)) for n in range(6)]
        done = [tasks.submit(many.each, work, message) for message in messages]
        done += [tasks.submit(many.one, partial(work, f"one:{n}")) for n in range(6)]
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

    Crew[int](4).each(work, deque(range(4)))
    assert sorted(done) == [0, 1, 2, 3]


class Leaving(deque[str]):
    """Items of which a helper sees none as soon as the thread of the message has seen that none are left."""

    def __init__(self, items: list[str]) -> None:
        super().__init__(items)
        self.owner, self.is_left = threading.get_ident(), threading.Event()

    def __len__(self) -> int:
        left = super().__len__()
        if threading.get_ident() != self.owner:
            return 0 if self.is_left.is_set() else left
        if not left:
            self.is_left.set()
        return left


def test_what_a_helper_leaves_is_done_by_the_thread_of_the_message(at_once: None) -> None:
    """What the work on an item adds is done, also where the helper who did it has no slot to go on with."""
    items, done, taken = Leaving(["one", "another"]), list[str](), threading.Event()

    def work(item: str) -> None:
        if threading.get_ident() == items.owner:
            assert taken.wait(PATIENCE_S)
        else:
            taken.set()
            assert items.is_left.wait(PATIENCE_S)
            items.append("added")
        done.append(item)

    Crew[str](2).each(work, items)
    assert sorted(done) == ["added", "another", "one"]


def test_an_error_of_a_single_item_is_its_callers() -> None:
    """An error of a single load reaches its caller, and its slot is free again."""
    one = Crew[int](1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            one.one(lambda: 1 // 0)


def test_a_process_alone_passes_on_what_takes_long(at_once: None) -> None:
    """A process with one thread passes slow loads on to other processes, if they can be passed on."""
    worked: list[int] = []
    passed: list[int] = []

    def pass_on(item: int) -> bool:
        passed.append(item)
        return item != 2

    Alone[int](pass_on).each(worked.append, deque(range(4)))
    assert (worked, passed) == ([2], [0, 1, 2, 3])


def test_a_process_alone_does_what_is_quick(never: None) -> None:
    """A process with one thread runs quick loads itself, because a task costs more."""
    worked: list[int] = []
    Alone[int](_refuse(AssertionError)).each(worked.append, deque(range(4)))
    assert worked == [0, 1, 2, 3]


def test_what_can_not_be_passed_on_is_done_here(at_once: None) -> None:
    """When the broker is away the loads that cannot be passed on are run here."""
    worked: list[int] = []
    Alone[int](_refuse(ConnectionError)).each(worked.append, deque(range(4)))
    assert worked == [0, 1, 2, 3]


def _refuse(error: type[BaseException]) -> Callable[[int], bool]:
    def refuse(_: int) -> bool:
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
        Crew[int](3).each(done.append, deque(range(5)))
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_nobody_helps_unawaited_after_a_thread_could_not_be_started(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread could be started to help with a message, no other message's helper works on it later, when
    nobody would wait for him.
    """
    together = Crew[str](2)
    first_is_helped, first_ends = threading.Event(), threading.Event()
    helper_went_on, second_ends = threading.Event(), threading.Event()
    caller, done = threading.current_thread(), list[str]()

    def work_on_first(item: str) -> None:
        if threading.current_thread().name.startswith("stillroom helper"):
            first_is_helped.set()
            assert first_ends.wait(PATIENCE_S)
        assert first_is_helped.wait(PATIENCE_S)

    def work_on_second(item: str) -> None:
        if item == "one":
            with suppress(RuntimeError):  # it stands behind the call for help with this message
                together._helpers.submit(helper_went_on.set)
            first_ends.set()
            assert helper_went_on.wait(PATIENCE_S)
        elif threading.current_thread() is not caller:
            helper_went_on.set()
            assert second_ends.wait(PATIENCE_S)
        done.append(item)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first = threading.Thread(target=together.each, args=(work_on_first, deque(["one", "two"])))
    first.start()
    try:
        assert first_is_helped.wait(PATIENCE_S)
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", refuse)
            together.each(work_on_second, deque(["one", "two"]))
        assert done == ["one", "two"]
    finally:
        second_ends.set()
        first.join()
