"""A lock has one holder in all processes, a semaphore n: leased, renewed, fenced, in the order of asking."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from stillroom import (
    AsyncStillroom,
    InvalidArgument,
    InvalidKey,
    LockLost,
    LockTaken,
    Misplaced,
    NoDispatch,
    RedisUnavailable,
    Settings,
    Stillroom,
)
from stillroom.embedded import EmbeddedServer
from stillroom.locks.body import LocksBody
from stillroom.locks.held import Held
from tests.support.crowd import PATIENT
from tests.support.faces import BlockingRoom, locked
from tests.support.interruption import Interruption, interrupted_at, lines_of
from tests.support.lag import least, seconds_of
from tests.support.stepper import Stepper

WITHIN = 10.0


def pass_time(room: Any, seconds: float) -> None:
    """Let tasks and threads run for that many seconds."""
    if isinstance(room, BlockingRoom):
        room._loop.run_until_complete(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def until(condition: Callable[[], object], room: Any = None) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        pass_time(room, 0.005)


def test_one_holds_it_and_others_do_not(room: Any, make_room: Any) -> None:
    """While one process holds the lock, another is refused; afterwards it gets the lock with a larger fence."""
    other: Stillroom = make_room()
    with locked(room, "import") as first:
        assert first.is_held
        with pytest.raises(LockTaken, match="'import' is held by others: waited 0 s in vain"):
            other.lock("import", wait=0).acquire()
        with other.lock("another", wait=0) as unrelated:
            assert unrelated.is_held
    assert not first.is_held
    with other.lock("import", wait=0) as second:
        assert second.fence > first.fence


def test_who_waits_gets_it_when_it_is_free(room: Any, make_room: Any) -> None:
    """A waiter gets the lock soon after the holder's block ends."""
    other: Stillroom = make_room()
    held = other.lock("import").acquire()
    timer = threading.Timer(0.05, held.release)
    timer.start()
    with locked(room, "import", wait=WITHIN) as mine:
        assert mine.fence > held.fence
    timer.join()


def test_what_acquire_returns_may_be_a_block(settings: Settings) -> None:
    """A lock that was taken by `acquire` in the place of a block's head is given back at the end of the block."""

    async def act() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            async with await room.lock("k", wait=0).acquire() as held:
                assert held.is_held
            assert not held.is_held

    with Stillroom(settings, dispatch=NoDispatch()) as room:
        for _ in range(2):
            with room.lock("k", wait=0).acquire() as held:
                assert held.is_held
            assert not held.is_held
            asyncio.run(act())
        with pytest.raises(ZeroDivisionError), room.lock("k", wait=0).acquire():
            raise ZeroDivisionError
        room.lock("k", wait=0).acquire().release()


def test_waiting_has_a_deadline(room: Any, make_room: Any) -> None:
    """A wait ends at its deadline, which may be a timedelta."""
    other: Stillroom = make_room()

    def wait() -> None:
        with pytest.raises(LockTaken) as caught:
            with locked(room, "import", wait=timedelta(milliseconds=50)):
                raise AssertionError("not reached")
        assert caught.value.waited == 0.05
        assert caught.value.name == "import"

    with other.lock("import"):
        assert least(lambda: seconds_of(wait), 1) < 1


def test_a_living_holder_renews_its_lease(room: Any, make_room: Any) -> None:
    """A living holder renews its lease and is still the only one long after the first lease."""
    other: Stillroom = make_room()
    with locked(room, "import", lease=0.3) as held:
        pass_time(room, 1.0)
        assert held.is_held
        held.check()
        with pytest.raises(LockTaken):
            other.lock("import", wait=0).acquire()


def test_a_forked_child_gives_none_of_its_parents_locks_back(make_room: Any) -> None:
    """A child that leaves the block in which it was forked gives nothing back: its parent still holds the lock."""
    room, other = make_room(), make_room()
    with room.lock("import") as held:
        pid = os.fork()
        if not pid:
            is_right = not held.is_held
            held.release()
            os._exit(0 if is_right else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert held.is_held
        with pytest.raises(LockTaken):
            other.lock("import", wait=0).acquire()


def test_a_lock_is_renewed_when_the_time_of_its_request_is_up(room: Any) -> None:
    """A request that holds a lock keeps it, also once its calls have no time left for Redis."""
    with room.request() as budget, locked(room, "import", lease=0.5) as held:
        budget.left = 0.0
        lease = held._until
        until(lambda: held._until > lease or not held.is_held, room)
        assert held.is_held


def test_a_renewal_that_fails_ends_no_other(
    room: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal that fails by an error of its own is tried again, and the other locks are renewed all the same."""
    body = getattr(room, "inner", room)._locks_body
    renew, failed = body.renew, [0]

    def failing(name: str, *args: Any) -> Any:
        if name == "unlucky" and not failed[0]:
            failed[0] += 1
            raise ValueError("a bug")
        return renew(name, *args)

    monkeypatch.setattr(body, "renew", failing)
    with locked(room, "unlucky", lease=3) as unlucky, locked(room, "other", lease=1.5) as other:
        ends = unlucky._until, other._until
        until(lambda: failed == [1], room)
        until(lambda: other._until > ends[1], room)
        until(lambda: unlucky._until > ends[0], room)
    assert "could not be renewed; it is tried again" in caplog.text


def test_a_lock_that_is_given_back_is_not_called_lost(
    make_room: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal that finds the lock given back meanwhile is no loss, and nothing is logged."""
    room: Stillroom = make_room()
    body, held = room._locks_body, room.lock("import").acquire()
    renew = body.renew

    def renew_behind_the_end(*args: Any) -> Any:
        held.release()
        return renew(*args)

    monkeypatch.setattr(body, "renew", renew_behind_the_end)
    assert held._renew() is False
    assert "is lost" not in caplog.text


def test_a_lock_whose_taking_is_interrupted_is_not_taken(
    make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes while the thread that is to renew a lock is started leaves nobody's lock behind."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    room, other = make_room(), make_room()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), room.lock("k"):
        pass
    monkeypatch.undo()
    with other.lock("k", wait=0):
        pass


def test_a_holder_that_hangs_is_not_renewed_for_ever(room: Any, make_room: Any) -> None:
    """A holder that hangs is renewed until `longest`; then the lease runs out and the end of the block raises."""
    other: Stillroom = make_room()
    hanging = locked(room, "import", lease=0.2, longest=0.1)
    held = hanging.__enter__()
    with other.lock("import", wait=WITHIN) as next_one:
        assert next_one.fence > held.fence
        assert not held.is_held
        with pytest.raises(LockLost, match="'import' was lost"):
            held.check()
    with pytest.raises(LockLost):
        hanging.__exit__(None, None, None)


def test_a_check_after_the_block_says_that_the_lock_was_given_back(room: Any) -> None:
    """Whoever checks a lock after its block is told that it was given back, not that its lease ran out."""
    with locked(room, "import") as held:
        held.check()
    with pytest.raises(LockLost, match="'import' is not held any more: it was given back"):
        held.check()


def test_a_dead_holder_s_lease_runs_out(
    stillroom: Stillroom, stillroom_settings: Settings, stillroom_clock: Any
) -> None:
    """When a holder died, the next one gets the lock once the lease is over and not before."""
    grant = stillroom.state.run(stillroom._locks_body.take("import", 1, 30.0, 0.0))
    stillroom_clock.advance(29)
    with pytest.raises(LockTaken):
        stillroom.lock("import", wait=0).acquire()
    stillroom_clock.advance(2)
    with stillroom.lock("import", wait=0) as held:
        assert held.fence > grant.fence


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="time.monotonic() counts sleep")
def test_a_holder_whose_machine_slept_does_not_hold_it(
    room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine sleeps for longer than a lease, and time.monotonic() with it: the holder knows that it is lost."""
    read = time.clock_gettime

    def read_after_sleep(clock: int) -> float:
        return read(clock) + (60.0 if clock == time.CLOCK_BOOTTIME else 0.0)

    with locked(room, "import", lease=30.0) as held:
        assert held.is_held
        monkeypatch.setattr(time, "clock_gettime", read_after_sleep)
        assert not held.is_held
        with pytest.raises(LockLost):
            held.check()


@pytest.mark.parametrize("fence", ["9" * 400, "x", "nan", "-5"])
def test_a_fence_that_is_no_number_keeps_nobody_from_the_lock(
    room: Any, client: Any, fence: str
) -> None:
    """Where another program wrote in the place of the last fence, the server's time replaces it."""
    client.set(room.keys.slots(b"stock")[3], fence)
    with locked(room, "stock", lease=5) as first:
        assert first.fence > 10**15
    with locked(room, "stock", lease=5) as second:
        assert second.fence > first.fence


def test_a_lost_lock_is_told_at_the_end_unless_the_block_failed(room: Any, client: Any) -> None:
    """A lost lock raises at the end of the block, unless the block raised an error of its own."""
    lock = (room.inner if isinstance(room, BlockingRoom) else room).lock
    assert lock("import")
    with pytest.raises(LockLost), locked(room, "import"):
        client.flushall()

    def fail() -> None:
        with room.lock("import"):
            client.flushall()
            raise ZeroDivisionError

    if isinstance(room, Stillroom):
        with pytest.raises(ZeroDivisionError):
            fail()


def test_a_semaphore_has_n_slots(room: Any, make_room: Any) -> None:
    """A semaphore of n never has more than n holders, however many ask."""
    other: Stillroom = make_room()
    with locked(room, "reports", 2, method="semaphore"):
        with other.semaphore("reports", 2, wait=0), pytest.raises(LockTaken):
            other.semaphore("reports", 2, wait=0).acquire()
        with other.semaphore("reports", 2, wait=0):
            pass


@pytest.mark.parametrize("slots", [1, 3])
def test_never_more_than_its_slots_in_a_crowd(make_room: Any, slots: int) -> None:
    """In a crowd of threads and processes a semaphore never has more holders than slots, and the fences grow."""
    rooms = [make_room() for _ in range(3)]
    inside, most, fences, guard = 0, 0, [], threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, most
        with rooms[number % 3].semaphore("crowd", slots, wait=WITHIN) as held:
            with guard:
                inside += 1
                most = max(most, inside)
                fences.append(held.fence)
            time.sleep(0.001)
            with guard:
                inside -= 1

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, range(48)))
    assert most <= slots
    assert len(set(fences)) == 48
    if slots == 1:
        assert fences == sorted(fences)


def test_a_crowd_of_tasks(settings: Settings) -> None:
    """In a crowd of tasks of one event loop no task is left waiting."""
    inside: list[int] = []

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            async def work(number: int) -> None:
                async with room.lock("crowd", wait=WITHIN):
                    inside.append(number)
                    assert len(inside) == 1
                    await asyncio.sleep(0)
                    inside.remove(number)

            await asyncio.gather(*map(work, range(20)))

    asyncio.run(main())


# Step by step


def taking(room: Stillroom, wait: float = 60.0, slots: int = 1) -> Stepper:
    return Stepper(room, room._locks_body.take("k", slots, 30.0, wait))


def give_back(room: Stillroom, taken: Stepper) -> bool:
    return room.state.run(room._locks_body.free("k", taken.value().token))


def test_waiters_are_served_in_the_order_of_asking(make_room: Any) -> None:
    """Waiters are served in the order of asking, and a caller that does not wait overtakes none of them."""
    room: Stillroom = make_room()
    holder = taking(room).run()
    waiters = [taking(room).run() for _ in range(3)]
    assert all(waiter.is_waiting for waiter in waiters)
    assert give_back(room, holder)
    for waiter in reversed(waiters[1:]):  # they ask first, and have to wait all the same
        waiter.step()
        assert waiter.run().is_waiting
    with pytest.raises(LockTaken):
        taking(room, wait=0).value()
    for waiter in waiters:
        waiter.step()
        waiter.run()
        assert waiter.done
        assert give_back(room, waiter)


def test_a_waiter_that_died_holds_nobody_up(make_room: Any, client: Any) -> None:
    """A dead waiter's place in the queue is kept for two seconds."""
    room: Stillroom = make_room()
    holder, dead, waiter = (taking(room).run() for _ in range(3))
    assert dead.is_waiting
    assert waiter.is_waiting
    give_back(room, holder)
    waiters = room._locks_body._keys.slots(b"k")[2]
    first = client.zrange(room._locks_body._keys.slots(b"k")[1], 0, 0)[0]
    client.zadd(waiters, {first: 1})
    waiter.step()
    waiter.run()
    assert waiter.done


def test_a_command_that_arrives_twice_takes_one_slot(make_room: Any, client: Any) -> None:
    """A command that the wire sends twice takes one slot."""
    room: Stillroom = make_room()
    stepper = taking(room, slots=2)
    stepper.twice = True
    stepper.run()
    assert client.zcard(room._locks_body._keys.slots(b"k")[0]) == 1
    assert give_back(room, stepper)
    assert not give_back(room, stepper)


def test_a_command_that_arrives_late_takes_nothing(make_room: Any, client: Any) -> None:
    """A command that arrives after its caller gave up takes no slot."""
    room: Stillroom = make_room()
    assert room.cache.get("x") is None  # the server's clock is known
    server = room._state_server
    server._reading = server._reading._replace(offset=server._reading.offset - 3_600_000_000_000)
    with room.lock("k", wait=0) as held:  # asked again, with the clock as it is
        assert held.is_held
    keys = room._locks_body._keys.slots(b"k")
    assert client.exists(*keys[:3]) == 0


def test_nothing_is_kept_for_ever(room: Any, make_room: Any, client: Any) -> None:
    """Every key of a lock has a TTL, also while others wait; a fence is kept for a day."""
    other: Stillroom = make_room()
    with locked(room, "k"):
        waiter = taking(other).run()
        assert waiter.is_waiting
        keys = other._locks_body._keys.slots(b"k")
        assert client.exists(*keys) == 4
        assert all(client.pttl(key) > 0 for key in keys)
    waiter.step()
    waiter.run()
    give_back(other, waiter)
    assert client.exists(*keys[:3]) == 0


def test_the_queue_is_bounded(make_room: Any, client: Any) -> None:
    """The thousand and first waiter is refused at once."""
    room: Stillroom = make_room()
    slots, queue, waiters, _ = room._locks_body._keys.slots(b"k")
    with room.lock("k"):
        later = (time.time() + 60) * 1_000_000
        client.zadd(queue, {f"w{n}": n for n in range(1_000)})
        client.zadd(waiters, {f"w{n}": later for n in range(1_000)})
        with pytest.raises(LockTaken, match="too many wait"):
            room.lock("k").acquire()
    assert slots


def test_a_cancelled_waiter_leaves_the_queue(settings: Settings, client: Any) -> None:
    """A cancelled waiter leaves the queue, so that the next one does not wait for two seconds."""

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            held = await room.lock("k").acquire()
            waiting = asyncio.create_task(room.lock("k").acquire())
            queue = room._locks_body._keys.slots(b"k")[1]
            while not client.zcard(queue):
                await asyncio.sleep(0.005)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert client.zcard(queue) == 0
            await held.release()

    asyncio.run(main())


# Redis away


def test_while_redis_is_away_nobody_takes_it_and_the_holder_knows_when_it_is_lost(
    own_server: EmbeddedServer,
) -> None:
    """When Redis is away taking raises, and a held lock counts as held until its lease may be over by
    this clock.
    """
    patience = {"command_timeout": 0.2, "call_timeout": 0.2}
    settings = Settings(**PATIENT | patience, redis_url=own_server.url)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        held = room.lock("k", lease=0.6).acquire()
        own_server.freeze()
        with pytest.raises(RedisUnavailable):
            room.lock("another").acquire()
        assert held.is_held
        until(lambda: not held.is_held)
        own_server.thaw()
        until(lambda: not room.wire.breaker.is_open)
        with room.lock("k", wait=WITHIN) as other:
            assert other.fence > held.fence
        with pytest.raises(LockLost):
            held.release()
        held.release()  # once is enough


def test_a_task_that_is_cancelled_as_it_gives_a_lock_back_ends_cancelled(
    own_server: EmbeddedServer,
) -> None:
    """A cancellation, or an interruption, is told to the caller also where Redis does not answer the release."""
    patience = {"command_timeout": 0.5, "call_timeout": 0.5}
    settings = Settings(**PATIENT | patience, redis_url=own_server.url)

    async def act() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            held = await room.lock("k").acquire()
            own_server.freeze()
            releasing = asyncio.create_task(held.release())
            await asyncio.sleep(0)
            releasing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await releasing
            own_server.thaw()

    asyncio.run(act())


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lease": 0}, r"lease=0: a number of seconds from 0.1 to 3,600, or a timedelta"),
        ({"lease": "5m"}, "lease='5m'"),
        ({"wait": -1}, r"wait=-1: a number of seconds from 0, or a timedelta"),
        ({"longest": timedelta(days=9_999)}, "longest="),
    ],
)
def test_a_mistake_is_told_where_the_lock_is_made(
    make_room: Any, options: dict[str, Any], said: str
) -> None:
    """A bad option raises where the lock is made, before anything is sent."""
    with pytest.raises(ValueError, match=said):
        make_room().lock("k", **options)


def test_other_mistakes(make_room: Any) -> None:
    """An empty name, a semaphore without slots and a lock object used twice at a time raise."""
    room: Stillroom = make_room()
    with pytest.raises(InvalidKey):
        room.lock("")
    for slots in (0, 10_001, 1.5, True):
        with pytest.raises(InvalidArgument, match=r"slots=.*from 1 to 10,000"):
            room.semaphore("k", slots)  # type: ignore[arg-type]
    lock = room.lock("k")
    with lock, pytest.raises(Misplaced, match="in use by this object"), lock:
        pass


def test_a_lock_object_that_two_threads_use_at_once_is_refused_to_the_second(
    make_room: Any, client: Any
) -> None:
    """Of two threads that enter the same object at once, one is refused, and no slot is left behind."""
    room, other = make_room(), make_room()
    outcomes: list[str] = []
    first_refused = threading.Event()
    shared = room.semaphore("reports", 2, wait=WITHIN)

    def use(_: int) -> None:
        try:
            with shared:
                first_refused.wait(WITHIN)
            outcomes.append("held")
        except Misplaced:
            outcomes.append("refused")
            first_refused.set()

    with other.semaphore("reports", 2), other.semaphore("reports", 2) as last:
        with ThreadPoolExecutor(2) as threads:
            uses = [threads.submit(use, number) for number in range(2)]
            until(lambda: outcomes or client.zcard(room.keys.slots(b"reports")[1]) == 2)
            last.release()
            for done in uses:
                done.result(WITHIN)
    assert sorted(outcomes) == ["held", "refused"]
    with other.semaphore("reports", 2, wait=0), other.semaphore("reports", 2, wait=0):
        pass


def test_a_lock_object_that_two_tasks_use_at_once_is_refused_to_the_second(
    settings: Settings,
) -> None:
    """Of two tasks that enter the same object at once, one is refused, and no slot is left behind."""

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            shared = room.semaphore("reports", 2)
            is_over = asyncio.Event()

            async def use() -> None:
                try:
                    async with shared:
                        await is_over.wait()
                finally:
                    is_over.set()  # the one that is refused lets the other one go on

            outcomes = await asyncio.gather(use(), use(), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [type(None), Misplaced]
            async with shared, room.semaphore("reports", 2, wait=0):
                pass

    asyncio.run(main())


def test_a_release_that_a_signal_interrupts_gives_the_lock_back(make_room: Any) -> None:
    """A lock is free, and renewed no longer, wherever in its release a signal's handler raises."""
    room: Stillroom = make_room()
    properties = Held.is_held.fget, Held._is_over.fget  # type: ignore[attr-defined]
    codes = [one.__code__ for one in (Held.release, LocksBody.give_back, *properties)]
    lines = {code: lines_of(code) for code in codes}
    for step in itertools.count(3):  # at the first two nothing was begun
        held, interrupted = room.lock("k").acquire(), True
        with suppress(Interruption), interrupted_at(step, lines) as reached:
            held.release()
            interrupted = False
        assert not held.is_held
        assert held._renewal.renew is None
        with room.lock("k", wait=0):
            pass
        if not interrupted:
            assert len(reached) == step - 1 > 3
            return
