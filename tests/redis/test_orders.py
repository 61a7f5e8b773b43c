"""Every order of an app is carried out or becomes a dead letter, and other work never pushes it out."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import redis
from stillroom import InlineDispatch, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache import ordering
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom_workers.app import make_app
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.trips import Trips

ORDERS: dict[str, Callable[[Any], object]] = {
    "keys": lambda app: app.tasks.invalidate_keys("k"),
    "tags": lambda app: app.tasks.invalidate_tags("ordered"),
    "pattern": lambda app: app.tasks.invalidate_pattern("k*"),
}
FLOODS: dict[str, Callable[[Any], object]] = {
    "tags": lambda app: [
        app.cache.invalidate_by_tag(*(f"flood:{start + n}" for n in range(500)))
        for start in range(0, 10_500, 500)
    ],
    "soft tags": lambda app: [
        app.cache.invalidate_by_tag(*(f"flood:{start + n}" for n in range(500)), soft=True)
        for start in range(0, 10_500, 500)
    ],
    "patterns": lambda app: [app.cache.invalidate_by_pattern(f"flood:{n}") for n in range(1_005)],
    "clears": lambda app: [app.cache.clear() for _ in range(3)],
}


@pytest.mark.any_server
@pytest.mark.parametrize(
    ("order", "flood"),
    [
        pytest.param(order, flood, marks=[] if (i + j) % len(ORDERS) == 0 else pytest.mark.full)
        for i, order in enumerate(ORDERS)
        for j, flood in enumerate(FLOODS)
    ],
)
def test_no_flood_of_work_drops_an_order(room: Any, make_room: Any, order: str, flood: str) -> None:
    """Ten thousand tasks, or a thousand patterns, become one sweep, and the order is still carried out."""
    ORDERS[order](room)
    FLOODS[flood](room)
    room.cache.set("k", "old", tags=["ordered"], ttl=3_600)
    make_room().cache.reclaim()
    assert room.cache.get("k") is None


@pytest.mark.any_server
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shards", [1, 3])
def test_an_order_that_0_1_left_is_carried_out(
    make_room: Any, state_client: Any, order: str, shards: int
) -> None:
    """An order that waits in the cache's list of work, where 0.1 wrote it, is carried out by today's workers."""
    app, worker = make_room(shards=shards), make_room(shards=shards)
    app.cache.set("k", "old", tags=["ordered"], ttl=3_600)
    ORDERS[order](app)
    (written,) = state_client.zrange(app.keys.orders, 0, -1)
    state_client.delete(app.keys.orders)
    work = b"o:" + written
    leave(app, work)
    worker.upkeep.reclaim(loads=False)  # a process that leaves orders to workers
    assert left_in(app) == [work]
    leave(app, work)
    worker.upkeep.reclaim()
    assert state_client.zrange(app.keys.orders, 0, -1) == [written]
    assert worker.upkeep.reclaim()["done"] >= 1
    assert app.cache.get("k") is None
    assert work not in left_in(app)


def test_equal_calls_are_one_order(room: Any, state_client: Any) -> None:
    """Equal sets and dicts make one order, whatever order their members have: in another process it is another."""
    inner = getattr(room, "inner", room)

    @inner.cache.cached("by:{sizes}:{names}")
    def by(sizes: set[int], names: dict[str, int]) -> int:
        return len(sizes)

    assert [*{0, 8}] != [*{8, 0}]  # as CPython keeps them
    room.tasks.load(by, {0, 8}, {"a": 1, "b": 2})
    room.tasks.load(by, names={"b": 2, "a": 1}, sizes={8, 0})
    assert state_client.zcard(room.keys.orders) == 1
    assert room.upkeep.reclaim()["done"] == 1


def test_orders_of_megabytes_have_a_deadline_each(
    make_room: Any, state_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would take longer than one call may is written down in several; many small orders are one round trip."""
    room: Stillroom = make_room()
    room.tasks.invalidate_keys("first")
    trips = Trips(room, monkeypatch)
    room.tasks.invalidate_keys(*(f"{n:04}{'x' * 900}" for n in range(2_500)))
    assert trips.taken() == 3
    room.tasks.invalidate_tags(*(f"tag:{n}" for n in range(4_000)))
    assert trips.taken() == 1
    assert state_client.zcard(room.keys.orders) == 1 + 3 + 40


@pytest.mark.any_server
def test_a_tool_without_workers_takes_over_what_0_1_left(places: dict[str, Any]) -> None:
    """A room that does its own maintenance carries such an order out in its next reclaim."""
    with Stillroom(Settings(**PATIENT | places), dispatch=InlineDispatch()) as room:
        room.cache.set("k", 1, tags=["ordered"])
        leave(room, b'o:invalidate_tags {"tags":["ordered"]}')
        room.upkeep.reclaim()
        assert left_in(room) == []
        assert room.upkeep.reclaim()["done"] >= 1
        assert room.cache.get("k") is None


@pytest.mark.any_server
def test_orders_that_0_1_left_wait_for_room(
    make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where as many orders wait as may, one that 0.1 left stays in the cache's list, and becomes no less."""
    room = make_room()
    monkeypatch.setattr(ordering, "ORDERS_LIMIT", 0)
    work = b'o:invalidate_tags {"tags":["ordered"]}'
    leave(room, work)
    room.upkeep.reclaim()
    assert left_in(room) == [work]


def leave(room: Stillroom, work: bytes) -> None:
    """Write work down in the cache's list, due now."""
    room.wire.execute([(b"ZADD", room.keys.todo, b"1", work)], 5)


def left_in(room: Stillroom) -> list[bytes]:
    """Return the cache's list of work."""
    (works,) = room.wire.execute([(b"ZRANGE", room.keys.todo, b"0", b"-1")], 5)
    return list(works)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shards", [1, 3])
def test_orders_lie_where_nothing_is_evicted(
    server: EmbeddedServer, face: str, order: str, shards: int
) -> None:
    """Orders are kept on the state's server.

    The cache's server may lose all its data and the order is carried out.
    """
    with EmbeddedServer() as cache:
        places = {"redis_url": server.url, "cache_url": cache.url, "shards": shards}
        with open_room(face, Settings(**PATIENT | places), NoDispatch()) as app:
            ORDERS[order](app)
            with redis.Redis.from_url(cache.url) as client:
                assert not client.keys("*orders*")
                client.flushall()
            app.cache.set("k", "old", tags=["ordered"], ttl=3_600)
            assert app.cache.reclaim()["done"] >= 1
            assert app.cache.get("k") is None


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("order", ORDERS)
def test_an_outage_of_the_cache_makes_no_dead_letter(
    server: EmbeddedServer, own_server: EmbeddedServer, face: str, order: str
) -> None:
    """An order outlives any number of tries while the cache's Redis is away, and is carried out afterwards."""
    places = {"redis_url": server.url, "cache_url": own_server.url, "call_timeout": 0.2}
    with open_room(face, Settings(**PATIENT | places), NoDispatch()) as app:
        app.cache.set("k", "old", tags=["ordered"], ttl=3_600)
        ORDERS[order](app)
        own_server.freeze()
        for _ in range(ordering.TRIES_LIMIT + 2):
            with pytest.raises(RedisUnavailable):
                app.cache.reclaim()
        own_server.thaw()
        assert until(lambda: not app.wire.breaker.is_open, 10)
        report = app.cache.reclaim()
        assert report["done"] >= 1
        assert report["dead"] == report["due"] == 0
        assert app.cache.get("k") is None


TASKS: dict[str, dict[str, Any]] = {
    "keys": {"keys": ["k"]},
    "tags": {"tags": ["ordered"]},
    "pattern": {"pattern": "k*"},
}


@pytest.mark.parametrize("order", TASKS)
def test_a_task_that_finds_the_cache_away_writes_its_order_down(
    server: EmbeddedServer, own_server: EmbeddedServer, order: str
) -> None:
    """A task sent by name, whose message is gone once it has run, is carried out when the cache is back."""
    places = {"redis_url": server.url, "cache_url": own_server.url, "call_timeout": 1.0}
    app = make_app(Settings(**PATIENT | places))
    room: Stillroom = app.room
    room.cache.set("k", "old", tags=["ordered"], ttl=3_600)
    own_server.freeze()
    report = app.tasks[f"stillroom.invalidate_{order}"](**TASKS[order])
    assert report == {"deleted": 0, "left": 1}
    own_server.thaw()
    assert until(lambda: not room.wire.breaker.is_open, 10)
    assert room.upkeep.reclaim()["done"] >= 1
    assert room.cache.get("k") is None
    room.close()


class TestLoads:
    """An order to load is done when its value is there."""

    @pytest.fixture
    def database(self) -> dict[str, Any]:
        return {"v": "old", "fails": 0}

    @pytest.fixture
    def load(self, database: dict[str, Any]) -> Callable[[int], str]:
        def product(id: int) -> str:
            if database["fails"]:
                database["fails"] -= 1
                raise OSError("the database has restarted")
            return str(database["v"])

        return product

    @pytest.fixture
    def app(self, make_room: Any, load: Any) -> Any:
        app = make_room()
        app.product = app.cache.cached("product:{id}", ttl=600)(load)
        return app

    @pytest.fixture
    def worker(self, make_room: Any, load: Any) -> Stillroom:
        worker: Stillroom = make_room()
        worker.cache.cached("product:{id}", ttl=600)(load)
        return worker

    def test_a_worker_that_does_not_know_the_loader_leaves_it_to_one_that_does(
        self, app: Any, worker: Stillroom, make_room: Any, database: dict[str, Any]
    ) -> None:
        """During a deploy a worker without the loader leaves the order to a worker that has it."""
        app.product(7)
        database["v"] = "new"
        app.tasks.load(app.product, 7)
        assert make_room().cache.reclaim()["done"] == 0
        assert worker.cache.reclaim()["done"] == 1
        assert app.product(7) == "new"

    def test_an_older_load_that_is_under_way_loses_to_it(
        self, app: Any, worker: Stillroom, make_room: Any, database: dict[str, Any]
    ) -> None:
        """A load that began before the order loses to it, because its value is older."""
        started, go = threading.Event(), threading.Event()

        def slow() -> str:
            value = str(database["v"])
            started.set()
            assert go.wait(10)
            return value

        older = make_room()
        loading = threading.Thread(
            target=lambda: older.cache.get_or_set("product:7", slow, ttl=600)
        )
        loading.start()
        assert started.wait(10)
        database["v"] = "new"
        app.tasks.load(app.product, 7)
        assert worker.cache.reclaim()["done"] == 1
        go.set()
        loading.join()
        assert app.product(7) == "new"

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_loader_that_fails_is_called_again(
        self,
        app: Any,
        worker: Stillroom,
        database: dict[str, Any],
        times: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """When the loader fails, the order is tried again, later each time."""
        monkeypatch.setattr(ordering, "FIRST_DELAY_MS", 0)
        app.product(7)
        database.update(v="new", fails=times)
        app.tasks.load(app.product, 7)
        for _ in range(times):
            assert worker.cache.reclaim()["done"] == 0
            assert app.product(7) == "old"
        assert worker.cache.reclaim()["done"] == 1
        assert app.product(7) == "new"

    def test_a_worker_that_dies_with_it_leaves_it_to_the_next(
        self, app: Any, worker: Stillroom, state_client: Any, database: dict[str, Any]
    ) -> None:
        """The order of a worker that died is due again after a minute."""
        database["v"] = "new"
        app.tasks.load(app.product, 7)
        orders: Any = worker.tasks._body._orders
        worker.state.run(orders._take(0))  # and then it is killed
        assert worker.cache.reclaim()["done"] == 0
        self._pass(app, state_client, 61)
        assert worker.cache.reclaim()["done"] == 1
        assert app.product(7) == "new"

    def test_an_order_that_kills_its_workers_becomes_a_dead_letter(
        self, app: Any, make_room: Any, state_client: Any
    ) -> None:
        """An order with which eight workers have ended is tried by no ninth one."""

        class Killed(BaseException):
            """Ends a worker, as a signal does."""

        deaths: list[int] = []

        def product(id: int) -> str:
            deaths.append(id)
            raise Killed

        app.tasks.load(app.product, 7)
        for _ in range(ordering.TRIES_LIMIT):
            worker = make_room()
            worker.cache.cached("product:{id}", ttl=600)(product)
            with pytest.raises(Killed):
                worker.cache.reclaim()
            self._pass(app, state_client, 61)
        assert worker.cache.reclaim()["dead"] == 1
        assert len(deaths) == ordering.TRIES_LIMIT
        (letter,) = app.state.run(app.dead_letters.list())
        assert "8 workers have ended" in letter.reason

    def test_a_loader_whose_own_redis_is_away_keeps_no_other_order_back(
        self, app: Any, make_room: Any
    ) -> None:
        """A loader that raises RedisUnavailable fails like any other: the orders behind it are carried out."""
        worker = make_room()

        def broken(id: int) -> str:
            raise RedisUnavailable("refused", "another server of the app")

        broken_here = app.cache.cached("broken:{id}", ttl=600)(broken)
        worker.cache.cached("broken:{id}", ttl=600)(broken)
        app.cache.set("k", "old")
        app.tasks.load(broken_here, 7)
        app.tasks.invalidate_keys("k")
        assert worker.cache.reclaim()["done"] >= 1
        assert app.cache.get("k") is None

    def test_an_order_that_redis_refuses_keeps_no_other_back_and_becomes_a_dead_letter(
        self, app: Any, worker: Stillroom, state_client: Any
    ) -> None:
        """A foreign key in the way of one order is that order's failure: Redis is not away."""
        app.wire.execute([(b"LPUSH", app.keys.lease(b"product:7"), b"foreign")], 1.0)
        app.cache.set("k", "old")
        app.tasks.load(app.product, 7)
        app.tasks.invalidate_keys("k")
        report = worker.cache.reclaim()
        assert report["done"] >= 1
        assert app.cache.get("k") is None
        tries = 1
        while not report["dead"] and tries < 2 * ordering.TRIES_LIMIT:
            self._pass(app, state_client, 301)
            report, tries = worker.cache.reclaim(), tries + 1
        assert tries == ordering.TRIES_LIMIT
        (letter,) = app.state.run(app.dead_letters.list())
        assert "wrongtype" in letter.reason

    @staticmethod
    def _pass(app: Any, state_client: Any, seconds: float) -> None:
        for member, due in state_client.zrange(app.keys.orders, 0, -1, withscores=True):
            state_client.zadd(app.keys.orders, {member: due - seconds * 1e6})


def test_whatever_is_ordered_is_done_once_or_buried(
    make_room: Any, state_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred orders with two workers and failing loaders are each carried out once or become dead letters."""
    monkeypatch.setattr(ordering, "FIRST_DELAY_MS", 0)
    dice = random.Random(13)
    app, *workers = (make_room() for _ in range(3))
    loaded: list[int] = []

    def item(n: int) -> int:
        if n % 10 == 9 or dice.random() < 0.3:
            raise OSError
        loaded.append(n)
        return n

    for room in (app, *workers):
        room.item = room.cache.cached("item:{n}")(item)
    for n in range(50):
        app.tasks.load(app.item, n)
        app.cache.set(f"k:{n}", 1, tags=[f"t:{n}"])
        app.tasks.invalidate_keys(f"k:{n}") if n % 2 else app.tasks.invalidate_tags(f"t:{n}")
    dead = 0
    for _ in range(20):
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(lambda worker: worker.cache.reclaim(budget=10), workers))
        dead += sum(report["dead"] for report in reports)
        if not state_client.zcard(app.keys.orders):
            break
    assert state_client.zcard(app.keys.orders) == 0
    assert app.cache.get_many([f"k:{n}" for n in range(50)]) == {}
    letters = app.state.run(app.dead_letters.list())
    assert dead == len(letters)
    assert {n for n in range(50) if n % 10 != 9} - set(loaded) <= {
        int(letter.body.rpartition('"n":')[2].split("}")[0]) for letter in letters
    }
    assert len(loaded) == len(set(loaded))


def test_a_load_that_is_shed_is_no_try(make_room: Any, client: Any) -> None:
    """Orders wait for a place of their loader's (`at_once`), however often they find none."""
    app, worker = make_room(), make_room()
    for room in (app, worker):
        busy = room.cache.cached("busy", name="busy", at_once=1)(lambda: 1)
    place, queue = worker.keys.places("busy")
    app.tasks.load(busy)
    for _ in range(ordering.TRIES_LIMIT + 1):
        seconds, _ = client.time()
        client.zadd(place, {"another": (seconds + 20) * 1_000})
        client.zadd(queue, {"one more": (seconds + 1.9) * 1_000})
        report = worker.upkeep.reclaim()
        assert (report["done"], report["dead"], report["left"]) == (0, 0, 1)
        (waiting,) = client.zrange(app.keys.orders, 0, -1)
        client.zadd(app.keys.orders, {waiting: 1})
    client.delete(place, queue)
    assert worker.upkeep.reclaim()["done"] == 1


@pytest.mark.parametrize(
    ("lease", "of_room", "of_loader"),
    [
        (200, {"lease": 200}, {}),
        (200, {}, {"lease": 200}),
        (400, {"lease_limit": 500}, {"lease": 400}),
    ],
    ids=["setting", "loader", "longer than others may"],
)
def test_an_order_is_held_for_as_long_as_its_load_may_take(
    make_room: Any, client: Any, lease: int, of_room: dict[str, Any], of_loader: dict[str, Any]
) -> None:
    """While a worker may still be loading for an order, no other worker takes the order, and its lease, over."""
    app, worker, other = make_room(**of_room), make_room(**of_room), make_room()
    for room in (worker, other):
        room.cache.set("k", 1)  # it knows now what others may
    due_in: list[float] = []

    def slow() -> str:
        (order,) = client.zrange(app.keys.orders, 0, -1, withscores=True)
        seconds, micros = client.time()
        due_in.append(order[1] / 1e6 - seconds - micros / 1e6)
        assert other.upkeep.reclaim()["done"] == 0
        assert client.zrange(app.keys.orders, 0, -1, withscores=True) == [order], "nobody took it"
        return "new"

    worker.cache.cached("slow", ttl=600, **of_loader)(slow)
    app.tasks.load(app.cache.cached("slow", ttl=600, **of_loader)(slow))
    assert worker.upkeep.reclaim()["done"] == 1
    assert lease - 5 < due_in[0] <= lease
