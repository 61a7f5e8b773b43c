"""Races of copies that a process keeps, forced step by step; and that each rule left out loses one of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import Context
from typing import Any
from unittest.mock import patch

import pytest

from stillroom import Stillroom
from stillroom.cache.invalidation import Invalidator
from stillroom.cache.judge import Judge
from stillroom.cache.lookup import Wish
from stillroom.cache.marks import Marks, read_clock
from stillroom.cache.memo import Memo
from stillroom.cache.near import CHANGED_LIMIT, Copy, Near, Proof, Store
from stillroom.leash import until
from tests.explorer.mutants import replaced, with_lua
from tests.support.stepper import Stepper

OLD, NEW = [1], [2]


class Stage:
    """A process that keeps a copy of price:7, and another one that changes it."""

    def __init__(self, room: Stillroom, other: Stillroom, third: Stillroom, client: Any) -> None:
        self.room, self.other, self.third, self.client = room, other, third, client
        self.versions = iter([OLD, NEW])
        self.body = room.cache._body
        self.price = room.cache.cached("price:{id}", ttl=600, tags=["prices"], near=True)(self.load)
        for _ in range(3):
            assert self.read() == OLD

    def load(self, id: int) -> list[int]:
        return next(self.versions, NEW)

    def read(self) -> list[int]:
        """Read in a request that begins now."""
        with self.room.request():
            return self.price(7)

    def set(self) -> None:
        assert self.other.cache.set("price:7", NEW, tags=["prices"])

    def prove(self) -> Stepper:
        return Stepper(self.room, self.body.prove())

    def look(self) -> Stepper:
        """Begin a look that will keep what it finds."""
        return Stepper(
            self.room, self.body._look_to_keep(b"price:7", Wish(Any, 0.0, b"", b"price:"))
        )

    def begin_anew(self, look: Stepper | None = None) -> Stepper:
        """Run a look until all marks have been read, and are not yet here."""
        look = look or Stepper(self.room, self.body.get("price:7"))
        while look.at[0][0] != b"ZSCORE":
            look.step()
        for _ in look.at:
            look.step()
        return look


@pytest.fixture
def stage(make_room: Any, client: Any) -> Stage:
    return Stage(make_room(), make_room(), make_room(), client)


def elsewhere(look: Stepper) -> None:
    """Run a look to its end in another request than the one that is running."""
    Context().run(look.run)


def _put_beside(thread: threading.Thread) -> Any:
    """Return a Store.put that lets a thread begin between its look at what was learned and the copy's coming in."""
    right = Store.put

    def put(
        self: Store, copy: Copy, call: Any, asked: float, is_complete: Callable[[], bool]
    ) -> None:
        def is_still_complete() -> bool:
            answer = is_complete()
            thread.start()
            thread.join(0.2)  # with the lock held it can't end before this does
            return answer

        right(self, copy, call, asked, is_still_complete)

    return put


def _stands_in(thread: threading.Thread, function: str) -> bool:
    """Return whether a thread is in this function, and not in one that it has called."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == function


# What may happen, and has to end with the new value


def _it_is_set(stage: Stage) -> Any:
    stage.set()
    return stage.read()


def _it_is_invalidated_when_redis_has_evicted_it(stage: Stage) -> Any:
    stage.client.unlink(stage.room.keys.entry(b"price:7"))
    stage.other.cache.invalidate("price:7")
    return stage.read()


def _a_request_begins_while_a_proof_is_on_its_way(stage: Stage) -> Any:
    proof = stage.prove()
    proof.step()  # the clock is read, and not yet here
    stage.other.cache.invalidate_by_tag("prices")
    with stage.room.request():
        proof.run()
        return stage.price(7)


def _its_own_process_invalidates_it(stage: Stage) -> Any:
    with stage.room.request():
        assert stage.price(7) == OLD
        stage.room.cache.invalidate_by_tag("prices")
        return stage.price(7)


def _its_own_process_invalidates_its_key(stage: Stage) -> Any:
    with stage.room.request():
        assert stage.price(7) == OLD
        stage.room.cache.invalidate("price:7")
        return stage.price(7)


def _its_own_process_sets_it(stage: Stage) -> Any:
    with stage.room.request():
        assert stage.price(7) == OLD
        assert stage.room.cache.set("price:7", NEW)
        return stage.price(7)


def _its_own_process_invalidates_its_key_behind_a_look(stage: Stage) -> Any:
    with stage.room.request():
        assert stage.price(7) == OLD
        look = stage.look()
        look.step()  # the entry is read, and not yet here
        stage.other.cache.invalidate(
            "price:9"
        )  # so that what is known does not go on to its own change
        stage.room.cache.invalidate("price:7")
        elsewhere(look)
        return stage.price(7)


def _its_own_process_drops_it_while_a_copy_is_put(stage: Stage) -> Any:
    look = stage.look()
    look.step()
    dropping = threading.Thread(target=lambda: stage.room.cache.invalidate("price:7"))
    with stage.room.request():
        stage.prove().run()
        with replaced(Store, "put", _put_beside(dropping)):
            elsewhere(look)
        dropping.join()
        return stage.price(7)


def _a_reader_takes_it_while_its_own_process_drops_it(stage: Stage) -> Any:
    memo = stage.body._memo
    drop = memo.drop_copies

    def dropped_behind_a_reader(names: Any) -> None:
        assert stage.price(7) == OLD  # the invalidation has not returned
        drop(names)

    with stage.room.request():
        stage.prove().run()
        with patch.object(memo, "drop_copies", dropped_behind_a_reader):
            stage.room.cache.invalidate("price:7")
        return stage.price(7)


def _its_own_process_invalidates_it_twice_at_once(stage: Stage) -> Any:
    first = threading.Thread(target=lambda: stage.room.cache.invalidate("price:7"))
    with stage.room.request():
        stage.prove().run()
        with stage.body.copies._lock:
            first.start()
            assert until(lambda: _stands_in(first, "drop"), 5.0)  # and waits for the lock
            assert stage.other.cache.set("price:7", OLD)
            look = stage.look()
            look.step()
            stage.room.cache.invalidate("price:7")
        first.join()
        elsewhere(look)
        return stage.price(7)


def _its_own_process_invalidates_more_keys_than_are_told_apart(stage: Stage) -> Any:
    with stage.room.request():
        assert stage.price(7) == OLD
        look = stage.look()
        look.step()
        stage.room.cache.invalidate("price:7")
        stage.room.cache.invalidate_many([f"other:{n}" for n in range(CHANGED_LIMIT)])
        elsewhere(look)
        return stage.price(7)


def _its_own_process_tells_of_another_key_behind_that(stage: Stage) -> Any:
    stage.set()
    stage.room.cache.invalidate("price:8")
    return stage.read()


def _its_own_process_tells_of_another_tag_behind_its_own(stage: Stage) -> Any:
    stage.other.cache.invalidate_by_tag("prices")
    stage.room.cache.invalidate_by_tag("others")
    return stage.read()


def _its_tag_is_invalidated_elsewhere(stage: Stage) -> Any:
    stage.other.cache.invalidate_by_tag("prices")
    return stage.read()


def _another_thread_proves_behind_a_look_at_the_copy(stage: Stage) -> Any:
    copy = stage.body.copies.of_name(stage.body.near, b"price:7")
    assert copy is not None
    stage.set()
    with stage.room.request():
        stage.prove().run()
        entry = stage.body.near.usable(copy, 0.0, b"")
        return stage.price(7) if entry is None else stage.body.near.value(entry, Any)


def _a_name_is_learned_while_an_older_read_is_on_its_way(stage: Stage) -> Any:
    look = stage.look()
    look.step()  # the entry is read, and not yet here
    stage.set()
    with stage.room.request():
        stage.prove().run()
        elsewhere(look)
        return stage.price(7)


def _a_name_is_learned_while_a_copy_is_put(stage: Stage) -> Any:
    look = stage.look()
    look.step()
    stage.set()
    learning = threading.Thread(target=lambda: stage.prove().run())
    with stage.room.request():
        with replaced(Store, "put", _put_beside(learning)):
            elsewhere(look)
        learning.join()
        return stage.price(7)


def _the_registry_is_lost_and_made_again(stage: Stage) -> Any:
    stage.client.delete(stage.room.keys.near)
    stage.other.cache.invalidate("price:7")
    stage.third.cache.get("price:1", near=2)
    return stage.read()


def _an_older_look_at_the_registry_arrives_last(stage: Stage) -> Any:
    look = stage.look()
    look.step()
    stage.client.delete(stage.room.keys.near)
    stage.other.cache.invalidate("price:7")
    stage.third.cache.get("price:1", near=2)
    with stage.room.request():
        stage.prove().run()
        elsewhere(look)
        return stage.price(7)


def _an_invalidation_is_deferred_while_another_thread_proves(stage: Stage) -> Any:
    right = Invalidator._defer

    def defer(self: Invalidator, *args: Any) -> None:
        stage.prove().run()  # Redis answers again, and nothing waits yet
        right(self, *args)

    with stage.room.request():
        with (
            patch.object(Invalidator, "_commands", side_effect=_away),
            replaced(Invalidator, "_defer", defer),
        ):
            stage.room.cache.invalidate("price:7", defer=True)
        return stage.price(7)


def _the_marks_are_begun_anew_before_the_copy_was_judged(stage: Stage) -> Any:
    stage.look().run()
    return _begin_the_marks_anew(stage)


def _the_marks_are_begun_anew_once_the_copy_was_judged(stage: Stage) -> Any:
    return _begin_the_marks_anew(stage)


def _begin_the_marks_anew(stage: Stage) -> Any:
    stage.other.cache.invalidate_by_tag("prices")
    with stage.room.request():
        stage.prove().run()
        marks = stage.body._judges.marks
        stage.body._judges.marks = type(marks)()  # as one does that is too far behind
        return stage.price(7)


def _all_marks_arrive_behind_newer_ones(stage: Stage) -> Any:
    stage.body._judges.marks = Marks()  # both threads begin anew
    late = stage.begin_anew()
    stage.other.cache.invalidate_by_tag("prices")
    with stage.room.request():
        stage.prove().run()
        elsewhere(late)
        return stage.price(7)


def _a_look_from_before_a_new_epoch_arrives_last(stage: Stage) -> Any:
    stage.body._judges.marks = Marks()
    late = stage.begin_anew(stage.look())
    stage.other.cache.clear()
    with stage.room.request():
        stage.prove().run()
        elsewhere(late)
        return stage.price(7)


def _away(*_: Any) -> Any:
    from stillroom import RedisUnavailable

    raise RedisUnavailable("timeout", "it went away for a moment")


RACES: list[Callable[[Stage], Any]] = [
    _it_is_set,
    _it_is_invalidated_when_redis_has_evicted_it,
    _a_request_begins_while_a_proof_is_on_its_way,
    _its_own_process_invalidates_it,
    _its_own_process_invalidates_its_key,
    _its_own_process_sets_it,
    _its_own_process_invalidates_its_key_behind_a_look,
    _its_own_process_drops_it_while_a_copy_is_put,
    _a_reader_takes_it_while_its_own_process_drops_it,
    _its_own_process_invalidates_it_twice_at_once,
    _its_own_process_invalidates_more_keys_than_are_told_apart,
    _its_own_process_tells_of_another_key_behind_that,
    _its_own_process_tells_of_another_tag_behind_its_own,
    _its_tag_is_invalidated_elsewhere,
    _another_thread_proves_behind_a_look_at_the_copy,
    _a_name_is_learned_while_an_older_read_is_on_its_way,
    _a_name_is_learned_while_a_copy_is_put,
    _the_registry_is_lost_and_made_again,
    _an_older_look_at_the_registry_arrives_last,
    _an_invalidation_is_deferred_while_another_thread_proves,
    _the_marks_are_begun_anew_before_the_copy_was_judged,
    _the_marks_are_begun_anew_once_the_copy_was_judged,
    _all_marks_arrive_behind_newer_ones,
    _a_look_from_before_a_new_epoch_arrives_last,
]


def words(race: Callable[..., Any]) -> str:
    return race.__name__.strip("_").replace("_", " ")


@pytest.mark.parametrize("race", RACES, ids=words)
def test_no_copy_is_served_that_was_changed(stage: Stage, race: Callable[[Stage], Any]) -> None:
    """However the steps of two threads and two processes fall, the new value is read."""
    assert race(stage) == NEW


@pytest.mark.parametrize("kind", ["near", "memo"])
def test_tasks_of_one_request_are_shown_one_value(stage: Stage, kind: str) -> None:
    """Of two looks at once the later one may find a newer value: then both of them, and the request, show that."""
    stage.body.near.store.forget(stage.body.near)

    def look() -> Stepper:
        if kind == "near":
            return stage.look()
        return Stepper(stage.room, stage.body._look_once(b"price:7", b""))

    with stage.room.request():
        first = look()
        first.step()  # the entry is read, and not yet here
        stage.set()
        shown = [look().value(), first.value(), look().value()]
    assert [entry.payload for entry, _ in shown] == [b"[2]"] * 3


# Rules left out


@contextmanager
def _without_the_lock() -> Iterator[None]:
    def reset(self: Store) -> None:
        right(self)
        self._lock = nullcontext()  # type: ignore[assignment]

    right = Store.reset
    with replaced(Store, "reset", reset):
        yield


def _always_complete(self: Store, copy: Copy, call: Any, asked: float, _: Any) -> None:
    _real_put(self, copy, call, asked, lambda: True)


def _whenever_asked(self: Store, copy: Copy, call: Any, _: float, is_complete: Any) -> None:
    _real_put(self, copy, call, float("inf"), is_complete)


def _proved_now(self: Near, _: Proof, *rest: Any) -> Any:
    return _real_learn(self, self.asking(), *rest)


def _no_loss(self: Near, registry: bytes | None, asked: float) -> None:
    self._registry = registry
    self._prefixes = tuple(registry.split(b"\n")[1:]) if registry else ()


def _whichever_comes_last(self: Near, registry: bytes | None, asked: float) -> None:
    _real_registry(self, registry, float("inf"))


def _defer_silently(self: Invalidator, names: Any, error: Any) -> None:
    sweeps = self._memo.sweeps
    _real_defer(self, names, error)
    self._memo.sweeps = sweeps


def _sweeps_alone(self: Memo, names: Any = None) -> None:
    if names is None:
        _real_changed(self)


def _names_whatever_came_before(self: Near, _: bytes, after: bytes) -> None:
    self._synced = read_clock(after)[1]


def _marks_whatever_came_before(self: Judge, _: bytes, after: bytes, members: Any) -> None:
    _real_learn_own(self, self.marks.clock, after, members)


def _dropped_last(self: Memo, names: Any = None) -> None:
    self.changes = object()
    self.drop_copies(names)


_real_put, _real_learn, _real_registry = Store.put, Near.learn, Near._take_registry
_real_defer = Invalidator._defer
_real_changed, _real_learn_own = Memo.changed, Judge.learn_own
NEVER = property(lambda _: False, lambda _, __: None)
STANDS_STILL = property(lambda _: b"", lambda _, __: None)

# Which of the races each of them loses.
MUTANTS: dict[str, tuple[Callable[[], Any], Callable[[Stage], Any]]] = {
    "no name for a set": (
        lambda: with_lua("name_changed(KEYS[6]", "tostring(KEYS[6]", "put"),
        _it_is_set,
    ),
    "no name for what was evicted": (
        lambda: with_lua(
            "return {counts, name_changed(",
            "if counts[1] == 0 then return {counts, '', ''} end return {counts, name_changed(",
            "drop",
        ),
        _it_is_invalidated_when_redis_has_evicted_it,
    ),
    "the proof is as new as its reply": (
        lambda: replaced(Near, "learn", _proved_now),
        _a_request_begins_while_a_proof_is_on_its_way,
    ),
    "own changes are forgotten": (
        lambda: replaced(Memo, "changed", lambda *_: None),
        _its_own_process_invalidates_it,
    ),
    "own keys are forgotten": (
        lambda: replaced(Memo, "changed", _sweeps_alone),
        _its_own_process_invalidates_its_key,
    ),
    "a look keeps what its own process has changed": (
        lambda: replaced(Store, "put", _whenever_asked),
        _its_own_process_invalidates_its_key_behind_a_look,
    ),
    "own keys are dropped without the lock": (
        _without_the_lock,
        _its_own_process_drops_it_while_a_copy_is_put,
    ),
    "a reader remembers what its own process drops": (
        lambda: replaced(Memo, "changed", _dropped_last),
        _a_reader_takes_it_while_its_own_process_drops_it,
    ),
    "a copy that is gone is served": (
        lambda: replaced(Copy, "is_gone", NEVER),
        _another_thread_proves_behind_a_look_at_the_copy,
    ),
    "a copy is kept whatever was learned": (
        lambda: replaced(Store, "put", _always_complete),
        _a_name_is_learned_while_an_older_read_is_on_its_way,
    ),
    "names are learned without the lock": (
        _without_the_lock,
        _a_name_is_learned_while_a_copy_is_put,
    ),
    "the loss of the registry is not seen": (
        lambda: replaced(Near, "_take_registry", _no_loss),
        _the_registry_is_lost_and_made_again,
    ),
    "the last registry to arrive counts": (
        lambda: replaced(Near, "_take_registry", _whichever_comes_last),
        _an_older_look_at_the_registry_arrives_last,
    ),
    "what is deferred voids nothing": (
        lambda: replaced(Invalidator, "_defer", _defer_silently),
        _an_invalidation_is_deferred_while_another_thread_proves,
    ),
    "names are known up to an own change whatever came before it": (
        lambda: replaced(Near, "learn_own", _names_whatever_came_before),
        _its_own_process_tells_of_another_key_behind_that,
    ),
    "marks are known up to an own one whatever came before it": (
        lambda: replaced(Judge, "learn_own", _marks_whatever_came_before),
        _its_own_process_tells_of_another_tag_behind_its_own,
    ),
    "a copy that was alive is alive": (
        lambda: replaced(Marks, "turn", STANDS_STILL),
        _its_tag_is_invalidated_elsewhere,
    ),
    "also by marks that were begun anew": (
        lambda: replaced(Marks, "turn", STANDS_STILL),
        _the_marks_are_begun_anew_once_the_copy_was_judged,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_rule_left_out_is_found(make_room: Any, client: Any, mutant: str) -> None:
    """Without any of these rules one of the races above ends with the old value."""
    broken, race = MUTANTS[mutant]
    with broken():
        stage = Stage(make_room(), make_room(), make_room(), client)
        assert race(stage) == OLD


@pytest.mark.parametrize("options", [{"near": True}, {"memo": True}], ids=["near", "memo"])
def test_parts_of_a_request_that_wait_for_a_load_show_what_another_part_has_read(
    make_room: Any, options: dict[str, Any]
) -> None:
    """A task that waits for a load shows what another task of its request has read meanwhile, as later reads do."""
    room, other = make_room(), make_room()
    versions = iter([OLD, NEW])

    def load(id: int) -> list[int]:
        return next(versions)

    price, theirs = (
        one.cache.cached("price:{id}", ttl=600, **options)(load) for one in (room, other)
    )

    def call(one: Stillroom, price: Any) -> Stepper:
        return Stepper(one, one.cache._body.call(price.loader, (7,), {}))

    assert theirs(7) == OLD
    with room.request():
        reading = call(room, price)
        while not (isinstance(reading.at, list) and reading.at[0][0] == b"MGET"):
            reading.step()
        reading.step()  # it has read, and the reply is not yet here
        other.cache.invalidate("price:7")
        loading = call(other, theirs).run_to_the_load()
        waiting = call(room, price).run()
        assert waiting.is_waiting
        assert reading.value() == OLD
        assert loading.value() == NEW
        while waiting.is_waiting:
            waiting.step()
        assert waiting.value() == price(7)
    assert price(7) == NEW


def test_a_load_that_is_not_stored_hides_nothing_that_another_task_has_loaded(
    make_room: Any,
) -> None:
    """Of two loads in one request the one that was invalidated meanwhile does not bring its older value back."""
    room, other = make_room(), make_room()
    versions = iter([OLD, NEW])

    @room.cache.cached("price:{id}", ttl=600, near=True)
    def price(id: int) -> list[int]:
        return next(versions)

    with room.request():
        slow = Stepper(room, room.cache._body.call(price.loader, (7,), {})).run_to_the_load()
        slow.step()  # it has loaded, and not yet stored
        other.cache.invalidate("price:7")
        assert price(7) == slow.value() == price(7) == NEW
