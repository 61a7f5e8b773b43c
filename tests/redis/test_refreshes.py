"""The refreshes of one message share round trips, and nothing else: each ends as if it were alone."""

from __future__ import annotations

import random
import string
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom import RedisUnavailable
from stillroom.cache import refreshes as module
from stillroom.cache.bites import BYTES_AT_ONCE
from stillroom.cache.refreshes import Refreshes
from stillroom.cache.sharded import shard_of
from stillroom.dispatch import RefreshOrder
from stillroom.operation import Failed
from tests.support.entries import Recording, age
from tests.support.trips import Trips

PATIENCE_S = 10


class Ordered:
    """A loader's values in two generations, whose stale reads have ordered so many refreshes."""

    def __init__(self, make_room: Callable[..., Any], client: Any, dispatch: Recording) -> None:
        self.room, self.client, self.dispatch = make_room(), client, dispatch
        self.fails: dict[int, BaseException] = {}
        self.waits: dict[int, threading.Event] = {}
        self.generation, self.loads = "old", list[int]()

        @self.room.cache.cached("value:{id}", ttl=60, swr=600, lease=20, tags=["values"])
        def value(id: int) -> str:
            self.loads.append(id)
            if id in self.waits:
                assert self.waits[id].wait(PATIENCE_S)
            if id in self.fails:
                raise self.fails[id]
            return self.generation

        self.value = value

    def orders(self, count: int) -> list[RefreshOrder]:
        for n in range(count):
            self.value(n)
            age(self.client, self.room.keys.entry(b"value:%d" % n), 61)
            self.value(n)
        self.generation, self.loads[:] = "new", []
        orders, self.dispatch.orders = self.dispatch.orders, []
        assert len(orders) == count
        return orders

    def load_scripts(self) -> None:
        """Have the server know the scripts, so that they take no round trip."""
        (order,) = self.orders(1)
        self.room.upkeep.refresh(order)
        self.room.cache.clear()
        self.generation = "old"

    def work_off(self, refreshes: Refreshes) -> None:
        while refreshes:
            self.room.upkeep.refresh_piece(refreshes.popleft())

    def kept(self, count: int) -> list[Any]:
        return [self.room.cache.get(f"value:{n}") for n in range(count)]

    def leases(self) -> list[bytes]:
        return self.client.keys("*:l:*")


@contextmanager
def refusing(room: Any) -> Iterator[None]:
    """Have the room believe that Redis is away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.wire, "execute", _refuse)
        yield


def _refuse(*_: Any, **__: Any) -> Any:
    raise RedisUnavailable("refused")


@pytest.fixture
def ordered(make_room: Any, client: Any, dispatch: Recording) -> Ordered:
    return Ordered(make_room, client, dispatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every load as quick."""
    monkeypatch.setattr(module, "QUICK_S", 3_600.0)
    monkeypatch.setattr(module, "PIECE_S", 3_600.0)


@pytest.fixture
def stepwise(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each load be a piece for itself."""
    monkeypatch.setattr(module, "PIECE_S", 0.0)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every load as slow."""
    monkeypatch.setattr(module, "QUICK_S", 0.0)
    monkeypatch.setattr(module, "PIECE_S", 0.0)


def outcomes(refreshes: Refreshes) -> dict[str, Any]:
    return {
        order.key: repr(ended.error) if isinstance(ended, Failed) else ended["outcome"]
        for order, ended in refreshes.ended()
    }


def test_quick_refreshes_share_their_round_trips(
    ordered: Ordered, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty-five quick refreshes take eight round trips, and each value is loaded once."""
    ordered.load_scripts()
    refreshes = Refreshes(ordered.orders(25))
    trips = Trips(ordered.room, monkeypatch)
    ordered.work_off(refreshes)
    assert trips.taken() == 2 * len([1, 4, 16, 4])
    assert set(outcomes(refreshes).values()) == {"refreshed"}
    assert sorted(ordered.loads) == list(range(25))
    assert ordered.kept(25) == ["new"] * 25
    assert ordered.leases() == []


def test_the_first_refresh_is_alone_on_a_machine_that_has_just_started(
    ordered: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first refresh of a message is claimed alone also where the steady clock has just begun."""
    refreshes = Refreshes(ordered.orders(5))
    monkeypatch.setattr(module.time, "monotonic", lambda: module.QUICK_S / 2)
    assert len(refreshes.popleft().waiting) == 1


def test_what_was_passed_on_is_not_done_here(ordered: Ordered, quick: None) -> None:
    """Where the broker goes away in the midst of a piece, only the rest of it is done here."""
    refreshes = Refreshes(ordered.orders(5))
    ordered.room.upkeep.refresh_piece(refreshes.popleft())
    sent: list[RefreshOrder] = []

    def send(order: RefreshOrder) -> None:
        if len(sent) == 2:
            raise ConnectionError
        sent.append(order)

    piece = refreshes.popleft()
    with pytest.raises(ConnectionError):
        piece.pass_on(send)
    ordered.room.upkeep.refresh_piece(piece)
    ordered.work_off(refreshes)
    passed_on, done = {order.key for order in sent}, outcomes(refreshes).keys()
    assert len(passed_on) == 2
    assert sorted([*passed_on, *done]) == [f"value:{n}" for n in range(5)]
    assert len(ordered.loads) == 3


@pytest.mark.parametrize(("piece_s", "pieces"), [(3_600.0, [1] * 4), (0.0, [1, 6, 18, 6])])
def test_a_piece_goes_on_with_what_is_claimed(
    ordered: Ordered,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    piece_s: float,
    pieces: list[int],
) -> None:
    """A piece ends with its time. Within that it loads and stores what was claimed, and claims nothing more."""
    monkeypatch.setattr(module, "PIECE_S", piece_s)
    refreshes = Refreshes(ordered.orders(25))
    taken: list[int] = []
    while refreshes:
        piece = refreshes.popleft()
        if piece.waiting:
            taken.append(0)
        taken[-1] += 1
        ordered.room.upkeep.refresh_piece(piece)
    assert taken == pieces
    assert set(outcomes(refreshes).values()) == {"refreshed"}


def test_slow_refreshes_are_claimed_when_they_are_loaded(
    ordered: Ordered, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh that has to wait for slow loads is not claimed before: its lease would run meanwhile."""
    ordered.load_scripts()
    refreshes = Refreshes(ordered.orders(5))
    trips = Trips(ordered.room, monkeypatch)
    for left in range(4, -1, -1):
        ordered.room.upkeep.refresh_piece(refreshes.popleft())
        assert (trips.taken(), len(refreshes)) == (2, left)


def test_no_order_waits_for_the_load_of_another_one(ordered: Ordered, quick: None) -> None:
    """While one load takes long another thread loads and stores all the others, also those claimed with it."""
    refreshes = Refreshes(ordered.orders(6))
    ordered.waits[2] = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stuck = threads.submit(ordered.work_off, refreshes)
        while 2 not in ordered.loads:
            assert not stuck.done()
        ordered.work_off(refreshes)
        assert ordered.kept(6) == ["new", "new", "old", "new", "new", "new"]
        ordered.waits[2].set()
        stuck.result(PATIENCE_S)
    assert set(outcomes(refreshes).values()) == {"refreshed"}
    assert ordered.kept(6) == ["new"] * 6


def test_what_is_loaded_is_stored_before_the_next_slow_load(
    ordered: Ordered, stepwise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that was loaded a while ago is stored first, though others are claimed."""
    refreshes = Refreshes(ordered.orders(6))
    for _ in range(3):  # the first one, the claim of the next four, and a load
        ordered.room.upkeep.refresh_piece(refreshes.popleft())
    assert ordered.kept(2) == ["new", "old"]
    monkeypatch.setattr(module, "QUICK_S", 0.0)
    ordered.room.upkeep.refresh_piece(refreshes.popleft())
    assert ordered.kept(3) == ["new", "new", "old"]


@pytest.mark.parametrize("error", [ValueError("no"), RedisUnavailable("refused")])
def test_a_load_that_fails_is_one_orders_failure(
    ordered: Ordered, quick: None, error: Exception
) -> None:
    """Where a loader raises, the other orders of the message are carried out."""
    refreshes = Refreshes(ordered.orders(6))
    ordered.fails[3] = error
    ordered.work_off(refreshes)
    ended = outcomes(refreshes)
    assert type(error).__name__ in ended.pop("value:3")
    assert set(ended.values()) == {"refreshed"}
    assert ordered.kept(6) == ["new"] * 3 + ["old"] + ["new"] * 2


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_interruption_reaches_its_thread_and_leaves_no_lease(
    ordered: Ordered, quick: None, error: BaseException
) -> None:
    """What is raised in a load and is no Exception is raised, its lease is given back, and others go on."""
    refreshes = Refreshes(ordered.orders(6))
    ordered.fails[3] = error
    with pytest.raises(type(error)):
        ordered.work_off(refreshes)
    ordered.work_off(refreshes)
    assert outcomes(refreshes)["value:3"] == repr(error)
    assert ordered.kept(6) == ["new"] * 3 + ["old"] + ["new"] * 2
    assert ordered.leases() == [ordered.room.keys.lease(b"value:3")], "which backs off"


@pytest.mark.parametrize("piece", ["alone", "claim", "store"])
def test_an_interrupted_batch_gives_back_what_it_claimed(
    ordered: Ordered, stepwise: None, monkeypatch: pytest.MonkeyPatch, piece: str
) -> None:
    """A signal while a batch is on its way ends no other work, and no lease is left for others to wait for."""
    refreshes = Refreshes(ordered.orders(5))
    before = {"alone": 0, "claim": 1, "store": 6}[piece]
    for _ in range(before):
        ordered.room.upkeep.refresh_piece(refreshes.popleft())
    execute, is_told = ordered.room.wire.execute, False

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_told
        answer = execute(*args, **kwargs)
        if not is_told:
            is_told = True
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(ordered.room.wire, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ordered.room.upkeep.refresh_piece(refreshes.popleft())
    ordered.work_off(refreshes)
    assert len(outcomes(refreshes)) == 5
    ordered.room.cache.invalidate("other")  # delivers what could not be given back at once
    assert ordered.leases() == []


def test_large_values_are_stored_in_batches_that_are_not_larger(
    ordered: Ordered, stepwise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values share a round trip up to half a megabyte: one batch of sixteen large ones might be given up."""
    refreshes = Refreshes(ordered.orders(5))
    ordered.generation = "".join(random.Random(0).choices(string.printable, k=BYTES_AT_ONCE))
    for _ in range(6):  # the first one, the claim of the next four, and their loads
        ordered.room.upkeep.refresh_piece(refreshes.popleft())
    trips = Trips(ordered.room, monkeypatch)
    ordered.work_off(refreshes)
    assert trips.taken() == 4
    assert set(outcomes(refreshes).values()) == {"refreshed"}


def test_what_can_not_be_claimed_is_not_loaded(ordered: Ordered, quick: None) -> None:
    """While Redis is away a claim of several fails for each of them, and no loader is called."""
    refreshes = Refreshes(ordered.orders(5))
    ordered.room.upkeep.refresh_piece(refreshes.popleft())
    with refusing(ordered.room):
        ordered.work_off(refreshes)
    ended = outcomes(refreshes)
    assert ended.pop("value:0") == "refreshed"
    assert len(ended) == 4
    assert all("RedisUnavailable" in how for how in ended.values())
    assert ordered.loads == [0]


def test_orders_of_a_loader_that_is_not_known_ask_redis_nothing(
    ordered: Ordered, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several orders that no worker could carry out are refused without a round trip, not even an empty one."""
    unknown = [order.model_copy(update={"loader": "nope"}) for order in ordered.orders(6)]
    refreshes = Refreshes(unknown)
    trips = Trips(ordered.room, monkeypatch)
    ordered.work_off(refreshes)
    assert trips.taken() == 0
    ended = outcomes(refreshes)
    assert len(ended) == 6
    assert all("UnknownLoader" in how for how in ended.values())


ENDS = ["refreshed", "fails", "twice", "invalidated", "fresh", "gone", "unknown"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ends=st.lists(st.sampled_from(ENDS), min_size=1, max_size=12),
    is_quick=st.booleans(),
    is_one_piece=st.booleans(),
)
def test_each_order_ends_as_if_it_were_alone(
    ordered: Ordered, ends: list[str], is_quick: bool, is_one_piece: bool
) -> None:
    """Whatever has happened to the other orders of its message, an order has the outcome that is its own."""
    ordered.client.flushall()
    ordered.room.cache.clear()
    ordered.fails, ordered.generation = {}, "old"
    message: list[RefreshOrder] = []
    for n, (order, end) in enumerate(zip(ordered.orders(len(ends)), ends, strict=True)):
        unknown = order.model_copy(update={"loader": "nope"})
        message += {"twice": [order, order], "unknown": [unknown]}.get(end, [order])
        if end == "fails":
            ordered.fails[n] = ValueError(n)
        elif end == "invalidated":
            ordered.room.cache.invalidate(order.key)
        elif end == "fresh":
            age(ordered.client, ordered.room.keys.entry(order.key.encode()), -61)
        elif end == "gone":
            ordered.client.delete(ordered.room.keys.entry(order.key.encode()))
    told: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK_S", 3_600.0 if is_quick else 0.0)
        patch.setattr(module, "PIECE_S", 3_600.0 if is_one_piece else 0.0)
        refreshes = Refreshes(message)
        ordered.work_off(refreshes)
    for order, ended in refreshes.ended():
        how = "failed" if isinstance(ended, Failed) else ended["outcome"]
        told.setdefault(order.key, []).append(how)
    alone = {
        "refreshed": ["refreshed"],
        "fails": ["failed"],
        "twice": ["refreshed", "superseded"],
        "invalidated": ["superseded"],
        "fresh": ["not needed"],
        "gone": ["not needed"],
        "unknown": ["failed"],
    }
    assert {key: sorted(hows) for key, hows in told.items()} == {
        f"value:{n}": alone[end] for n, end in enumerate(ends)
    }


def test_the_orders_of_several_shards_are_done_on_theirs(
    make_room: Any, client: Any, dispatch: Recording, quick: None
) -> None:
    """A piece of work is about one shard, and all orders of the message are carried out."""
    shards = Ordered(partial(make_room, shards=3), client, dispatch)
    orders = orders_in_shards(shards, 12)
    refreshes = Refreshes(orders, lambda order: shard_of(order.key.encode(), 3))
    seen = set[int]()
    while refreshes:
        piece = refreshes.popleft()
        seen.add(piece.shard)
        assert {shard_of(one.order.key.encode(), 3) for one in piece.waiting} <= {piece.shard}
        shards.room.upkeep.refresh_piece(piece)
    assert seen == {0, 1, 2}
    assert set(outcomes(refreshes).values()) == {"refreshed"}
    assert shards.kept(12) == ["new"] * 12


def orders_in_shards(shards: Ordered, count: int) -> list[RefreshOrder]:
    for n in range(count):
        shards.value(n)
        name = b"value:%d" % n
        age(shards.client, shards.room.cache._body.shards[shard_of(name, 3)].keys.entry(name), 61)
        shards.value(n)
    shards.generation = "new"
    return shards.dispatch.orders
