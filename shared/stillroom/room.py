"""The room: settings → wire → services. `Stillroom` for threads, `AsyncStillroom` for asyncio."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from weakref import WeakSet

from stillroom.abuse import Abuse, AbuseBody, AsyncAbuse
from stillroom.agreed import Agreed
from stillroom.at_exit import AtExit
from stillroom.background import aside, tell_of_threads
from stillroom.cache import (
    AsyncCache,
    AsyncTasks,
    Cache,
    CacheBody,
    CacheParts,
    ShardedBody,
    Tasks,
    TasksBody,
    cache_on,
    shard_keys,
)
from stillroom.cache.around import checked
from stillroom.dead_letters import DeadLetters
from stillroom.dispatch import CeleryDispatch, Dispatch
from stillroom.durations import Duration
from stillroom.environment import meant_setting
from stillroom.errors import FINAL, InvalidArgument, RedisUnavailable, UnknownSetting, in_code
from stillroom.events import Event, Observer, Watch, hook_to, watch_drivers
from stillroom.face import Service
from stillroom.health import AsyncHealth, Health, HealthBody
from stillroom.keys import HOUSE
from stillroom.known_bans import KnownBans, ban_file
from stillroom.limits import AsyncLimits, Limits, LimitsBody
from stillroom.locks import AsyncLock, Lock, LocksBody, Terms
from stillroom.misuse import explained
from stillroom.operation import (
    STATE,
    AsyncDriver,
    Call,
    Driver,
    Operation,
    Pause,
    async_drivers_of,
    drivers_of,
)
from stillroom.pauses import Pauses
from stillroom.probes import health_on, state_keys, wires_of_cache
from stillroom.rehearsal import of_cache, of_state, rehearsal
from stillroom.sessions import AsyncSessions, SessionEvent, Sessions, SessionsBody
from stillroom.setting_types import text_of_url
from stillroom.settings import Settings, shown_url
from stillroom.stats import Stats
from stillroom.upkeep import MOVED, AsyncUpkeep, Upkeep
from stillroom.urls import redact
from stillroom.wire import (
    AsyncClusterWire,
    AsyncShardWire,
    AsyncSpreadWire,
    AsyncWire,
    Breaker,
    Breakers,
    Budget,
    ClusterWire,
    Server,
    ShardWire,
    SpreadThreadsWire,
    SpreadWire,
    StateServer,
    Wire,
    reset_after_fork,
    running_loop,
    slot_of,
)

log = logging.getLogger("stillroom")

living_rooms: WeakSet[_Room] = WeakSet()  # of this process: stillroom.testing moves the time of all


D = TypeVar("D", Driver, AsyncDriver)
Make = TypeVar("Make", bound=Callable[..., Any])


@dataclass
class Operations(Generic[D]):
    """The operations behind the services, for what is made of several of them: web/, tests, parts of an app's own.

    Each is a generator (see operation.py), which `state` runs, and `together` runs side by side in one round trip.
    """

    cache: CacheBody | ShardedBody
    sessions: SessionsBody
    limits: LimitsBody
    abuse: AbuseBody
    health: HealthBody
    cache_in_threads: Cache  # the cache, for a thread that has no event loop
    state: D  # runs operations on sessions, limits and abuse
    # The operations that prove this process's copies of the cache, each with its place in a step On of `state`.
    # They ride in a batch of `state` itself where the cache `is_near_here`.
    proofs: Callable[[], list[tuple[int, Operation[None]]]]
    is_near_here: bool


_WITH_THE_OTHER = {
    "init_app": ": it is for asyncio; Flask takes a Stillroom()",
    "lifespan": ": it blocks the event loop; FastAPI and Starlette take an AsyncStillroom()",
}


class _Room:
    """The part that both rooms share. Nothing connects before the first call."""

    wire: Any
    settings: Settings
    cache: Any
    upkeep: Any
    operations: Any
    _wire_in_threads: Wire | SpreadWire | SpreadThreadsWire  # of the state
    _cache_body: CacheBody | ShardedBody
    _limits_body: LimitsBody

    if not TYPE_CHECKING:  # a type checker is to know the others only

        def __getattr__(self, name: str) -> Any:
            """Say which room has what this one lacks: the two are easily taken for one another."""
            kind, hint = type(self).__name__, _WITH_THE_OTHER.get(name, "")
            said = f"{kind!r} object has no attribute {name!r}{hint}"
            raise AttributeError(said, name=name, obj=self)

    def __init__(
        self, settings: Settings | str | None, dispatch: Dispatch | None, values: Mapping[str, Any]
    ) -> None:
        living_rooms.add(self)
        self.settings = _settings_of(settings, values)
        _check_dispatch(dispatch)
        tell_of_threads()
        self.keys = shard_keys(self.settings)[0]
        self.dispatch = dispatch or CeleryDispatch(self.settings, self.keys)
        # Two roles: what may be evicted, and what may not. One server plays both unless settings say otherwise.
        own = "redis_url" if self.settings.cache_url is None else "cache_url"
        self._server = Server(self.settings, self.settings.cache_server, "the cache's Redis", own)
        self.stats = Stats(self.keys)
        self._state_keys = state_keys(self.settings)
        self._state_server = self._server_of_state()
        self._is_one_server = self._state_server is self._server
        self.state_stats = self.stats if self._is_one_server else Stats(self._state_keys)
        # Operations for `state`: what must be alike in all processes, and what could not be done.
        self.agreed = Agreed(self._state_keys, self._state_server)
        self.dead_letters = DeadLetters(self._state_keys)
        self._pauses = Pauses(self._state_keys)
        self.watch = Watch()  # the listeners to each operation: see on_event
        self._sessions_body = SessionsBody(
            self.settings, self._state_server, self._state_keys, self.dispatch, self.state_stats
        )
        self._bans = KnownBans(partial(ban_file_of, self.settings))
        reset_after_fork(self._bans)
        self._abuse_body = AbuseBody(
            self.settings, self._state_server, self._state_keys, self.state_stats, self._bans
        )
        self._locks_body = LocksBody(
            self.settings, self._state_server, self._state_keys, self.state_stats
        )
        self.state_stats.riders.append(self._abuse_body.riding)
        self._at_exit = self.state_stats.at_exit = AtExit(self._deliver_last)
        self._sessions_body.on_event.append(self._tell_abuse)

    def __repr__(self) -> str:
        """Return where the room is: no password."""
        where, namespace = redact(self.settings.redis_url), self.settings.namespace
        return f"<{type(self).__name__} {where} namespace {namespace!r}>"

    def _server_of_state(self) -> Server | StateServer:
        settings = self.settings
        if settings.state_cluster:
            return StateServer(settings, HOUSE, self.keys.clock)
        if settings.cache_server == settings.redis_url:
            return self._server
        return Server(settings, settings.redis_url, "Redis")

    def _deliver_last(self) -> None:
        """Tell Redis what waits for it where this process ends, and complain of what is lost."""
        driver = Driver(self._wire_in_threads)
        driver.run(self._limits_body.deliver())
        _complain(driver.run(self._sessions_body.deliver()))

    def _limits(self, breaker: Breaker | Breakers) -> LimitsBody:
        """Make the limits' operations, which watch whether the state's Redis is away."""
        server, stats = self._state_server, self.state_stats
        return LimitsBody(self.settings, server, breaker, self._state_keys, stats, self._bans)

    def _cache(self, wires: Sequence[Any], aside: Sequence[Driver]) -> CacheParts:
        """Make the cache's operations on these wires, one for each shard."""
        clocks = [wire if self.settings.cluster else wire.server for wire in wires]
        runs = [driver.run for driver in aside]
        on_state = self.agreed, self.dead_letters, self._pauses
        return cache_on(self.settings, clocks, self.dispatch, self.stats, *on_state, runs)

    def _health(self, state_wire: Any, wires: Sequence[Any]) -> HealthBody:
        """Make health's operations, for the state's driver and those of `wires_of_cache`."""
        cache = wires_of_cache(self.settings, wires), self.wire.breaker, self.stats
        return health_on(self.settings, state_wire, self.state_stats, *cache)

    def _services(self, state: Any) -> list[Any]:
        """Return the faces that the upkeep is made of."""
        names = ("cache", "sessions", "limits", "abuse", "health")
        return [*(getattr(self, name) for name in names), Service(self._pauses, state)]

    def on_event(self, hook: Callable[[Event], object]) -> None:
        """Have `hook` called with an Event after each call of a service, each load and each task of this room.

        It is called where the operation runs, an event loop perhaps: it must not wait. What it raises is logged.
        """
        self._watched()
        hook_to(self.watch, hook)

    def observe(self, observer: Observer) -> None:
        """Call `observer.began(event)` when an operation begins, and `observer.ended(token, event)` when it ends.

        `token` is what `began` returned. Raises InvalidArgument.
        """
        if not (hasattr(observer, "began") and hasattr(observer, "ended")):
            raise InvalidArgument(
                f"observe={in_code(observer):.100}: an object with began() and ended(); a function is for on_event"
            )
        self._watched()
        self.watch.observers.append(observer)

    def _watched(self) -> None:
        """Wrap the drivers, so that operations make events from now on. Until then events cost nothing."""
        watch_drivers(self._drivers(), self.watch)
        self.stats.watch = self.state_stats.watch = self.watch

    def _drivers(self) -> list[Any]:
        """Return every driver that runs an app's calls. A face's driver is its service's."""
        names = ("cache", "sessions", "limits", "abuse", "tasks")
        services: list[Any] = [getattr(self, name) for name in names]
        faces = [*services, self.upkeep._cache, self.upkeep._housekeeping]
        faces.append(self.operations.cache_in_threads)
        return [*(face._driver for face in faces), vars(self)["state"]]

    def _complete(self, health: HealthBody, cache_in_threads: Cache, state: Any) -> None:
        """Connect the services with each other, and with OpenTelemetry if it is on."""
        bodies = self._cache_body, self._sessions_body, self._limits_body, self._abuse_body
        is_here = self._is_one_server and not self.settings.cluster and self.settings.shards == 1
        proofs = self._cache_body.proofs
        self.operations = Operations(*bodies, health, cache_in_threads, state, proofs, is_here)
        for name, moved in MOVED.items():  # a moved method can still be called here
            service: Any = getattr(self, name)
            service._moved, service._upkeep = moved, self.upkeep
        if isinstance(self.dispatch, CeleryDispatch) and not self.settings.state_cluster:
            self.dispatch.now_ms = self._state_server.now_ms
        if self.settings.otel:  # by name: who does not want it need not have it
            otel = import_module("stillroom.otel")
            self.observe(otel.Telemetry())
            if isinstance(self.dispatch, CeleryDispatch):
                self.dispatch.carry, self.dispatch.inside = otel.carried, otel.inside

    def _cluster(self) -> tuple[Settings, str, str, list[int]]:
        """Return what the wire to the cache's cluster is made of."""
        slots = [slot_of(keys.clock) for keys in shard_keys(self.settings)]
        return self.settings, self.settings.cache_server, "the cache's Redis", slots

    def _tell_abuse(self, event: SessionEvent) -> None:
        """Report a token that was used after it was replaced. Never waits: an event loop may be calling."""
        if event.kind == "replayed":
            self._abuse_body.hold("session_replay", user=event.user_id)

    def around_load(self, make: Make) -> Make:
        """Have each load of this room's loaders happen inside a context, in the app's processes and in workers.

        `make` is a function that returns a context manager, such as Flask's `app.app_context`, or a generator
        function that yields once. Async loaders may have async ones. It can be used as a decorator, and more than
        once: contexts are entered in that order. What it raises is the load's failure. Raises InvalidArgument.
        """
        self.cache.loaders.around.append(checked(make))
        return make

    def request(self) -> AbstractContextManager[Budget]:
        """Begin a request: `with room.request():`. The middlewares do this for each request of an app.

        All Redis calls inside share `request_timeout` seconds; after that they fall back at once. Loaders with
        `memo` look up each key once, and those with `near` prove what this process keeps.
        """
        return Budget(self.settings.request_timeout)

    def _answers_of(
        self, *wires: Wire | ClusterWire | AsyncWire | AsyncClusterWire, to_read: bool = False
    ) -> Operation[None]:
        """Wait until each of these servers answers. In asyncio a thread is busy for one attempt at a time."""
        for wire in {id(wire): wire for wire in wires}.values():
            yield from self._answer_of(wire.server.name, partial(wire.ping, to_read=to_read))

    def _rehearse_cache(self) -> Operation[None]:
        return rehearsal(of_cache(self.keys), self.wire.server)

    def _rehearse_state(self) -> Operation[None]:
        return rehearsal(of_state(self._state_keys), self._state_server)

    def _answer_of(self, name: str, ping: Callable[[], None]) -> Operation[None]:
        attempts = self.settings.connect_attempts
        for attempt in range(1, attempts + 1):
            try:
                yield Call(ping)
            except RedisUnavailable as error:
                if error.reason in FINAL:  # no other attempt comes, and the caller has the error
                    raise
                log.warning("%s, attempt %d of %d: %s", name, attempt, attempts, error)
                if attempt == attempts:
                    raise
                yield Pause(self.settings.connect_delay)
            else:
                log.info("%s answers (attempt %d)", name, attempt)
                return


class Stillroom(_Room):
    """The services of one app, for threads and greenlets.

    They are `cache`, `sessions`, `limits`, `abuse`, `health` and `tasks`. `upkeep` is what workers do.
    Settings come from the environment unless given: `Stillroom()`, `Stillroom("redis://…")`, `Stillroom(ttl=60)`
    with any of them by name, or `Stillroom(Settings(…))`. `dispatch` (default: Celery) is how background work is
    sent to workers; with `InlineDispatch()` the caller does it itself, at once.
    """

    cache: Cache
    sessions: Sessions
    limits: Limits
    abuse: Abuse
    health: Health
    tasks: Tasks
    upkeep: Upkeep
    operations: Operations[Driver]

    def __init__(
        self,
        settings: Settings | str | None = None,
        *,
        dispatch: Dispatch | None = None,
        **values: Any,
    ) -> None:
        super().__init__(settings, dispatch, values)
        self.wire: Wire | ClusterWire
        wires: Sequence[Wire | ShardWire[Wire]]
        if self.settings.cluster:
            self.wire = clustered = ClusterWire(*self._cluster(), probe=self.keys.clock)
            one = None
            wires = clustered.shards
        else:
            self.wire = one = Wire(self._server)
            wires = [one] * self.settings.shards
        self.state_wire: Wire | SpreadWire
        if isinstance(self._state_server, StateServer):
            self.state_wire = SpreadWire(self._state_server)
        elif one is not None and self._is_one_server:
            self.state_wire = one
        else:
            self.state_wire = Wire(self._state_server)
        drivers = drivers_of(wires, self.state_wire)
        self._cache_driver = drivers[0]
        parts = self._cache(wires, drivers)
        self._cache_body = parts.cache
        self.cache = Cache(parts.cache, parts.images, drivers[0])
        self.tasks = Tasks(TasksBody(parts.orders), drivers[0])
        self.wire.breaker.recovered.append(self._cache_body.deliver_aside)
        self._wire_in_threads = self.state_wire
        self.state = Driver(self.state_wire)  # runs what web/ makes of several services
        self.sessions = Sessions(self._sessions_body, self.state)
        self._limits_body = self._limits(self.state_wire.breaker)
        self.limits = Limits(self._limits_body, self.state)
        self.abuse = Abuse(self._abuse_body, Driver(self.state_wire))
        asked: list[Driver] = [Driver(self.state_wire)]
        asked += [Driver(wire) for wire in wires_of_cache(self.settings, wires)]
        health = self._health(self.state_wire, wires)
        self.health = Health(health, Driver(self.state_wire, asked))
        self.upkeep = Upkeep(Service(parts.housekeeping, drivers[0]), *self._services(self.state))
        self.state_wire.breaker.recovered += [
            self.upkeep.deliver_logouts,
            self.upkeep.deliver_charges,
        ]
        self._complete(health, self.cache, self.state)

    @explained
    def init_app(self, app: Any, **options: Any) -> None:
        """Make this the room of a Flask app. For an app factory, too; the room itself is made at module level.

        `sessions=True`: `flask.session` is kept by the room, with the cookie `cookie`. `routes`, `subject`: limits,
        as in StillroomMiddleware. `health=True`: /health, /metrics and /status. All Redis calls of a request share
        `request_timeout`. Loaders run in the app's context, in workers as well. The room is
        `app.extensions["stillroom"]`. Raises TypeError, SettingsError.
        """
        # By name: rooms know no framework, and only who calls this has one.
        import_module("stillroom.web.flask_room").init_app(self, app, **options)

    @explained
    def lock(
        self,
        name: str,
        *,
        lease: Duration = 30.0,
        wait: Duration = 10.0,
        longest: Duration = 3_600.0,
    ) -> Lock:
        """Return a lock that all processes share: `with room.lock("import") as held: …`

        `lease`: seconds it stays held after its process died, from 0.1 to 3,600; a living one renews it, for
        `longest` seconds in all. `wait`: seconds to wait for it; 0 tries once. Times may be timedeltas.
        `held.fence` is a number that is larger than every holder's before. Raises LockTaken when `wait`
        is over, LockLost at the end if it was lost meanwhile, InvalidKey. Redis away: RedisUnavailable.
        Cost: one script to take it, one to renew it, ZREM to give it back.
        """
        return Lock(self._locks_body, self.state, Terms(name, 1, lease, wait, longest))

    @explained
    def semaphore(
        self,
        name: str,
        slots: int,
        *,
        lease: Duration = 30.0,
        wait: Duration = 10.0,
        longest: Duration = 3_600.0,
    ) -> Lock:
        """Return a lock that `slots` holders can have at a time. See `lock`.

        All callers that use the name give the same number.
        """
        return Lock(self._locks_body, self.state, Terms(name, slots, lease, wait, longest))

    def connect(self) -> None:
        """Wait for Redis, with a log line for each attempt. Raises RedisUnavailable after the last one.

        There are `connect_attempts` of them, by default 5, `connect_delay` seconds apart, by default 5.
        A wrong password or missing right is raised at once. So is a server that can't do what it is there for: a
        node of a Redis Cluster without the setting for it, a version before Redis 6.2, a proxy without scripts. And
        so is SettingsDiffer, where the other processes of the namespace have another value of a setting that all
        must have alike.
        Not needed in an app: each call connects by itself.
        """
        self._connect_all(to_read=False)

    def connect_cache(self) -> None:
        """Wait for Redis, as `connect` does, but of a cluster one node is enough: each call says what it lacks.

        For a program that is about some keys, whose node may be well while another is away. A server that can't
        write its file answers reads.
        """
        self._connect_all(to_read=True)

    def _connect_all(self, *, to_read: bool) -> None:
        self.state.run(self._answers_of(self.wire, self.state_wire, to_read=to_read))
        self._cache_driver.run(self._rehearse_cache())
        self.state.run(self._rehearse_state())
        self._cache_driver.run(self._cache_body.terms.agree())

    def connect_state(self) -> None:
        """Wait for the Redis that holds the state, as `connect` does, whether the cache's answers or not.

        For a program that does not use the cache, such as one that lifts a ban. A server that can't write its file
        answers reads; of a cluster one node is enough, and each call says what it lacks.
        """
        self.state.run(self._answers_of(self.state_wire, to_read=True))
        self.state.run(self._rehearse_state())

    def close(self) -> None:
        """Deliver what waits, write the counts down, close the connections. The room can be used again."""
        self.dispatch.close()
        if not self.wire.breaker.is_open:
            self.upkeep.flush_cache_stats()
        self._cache_body.deliver_last()
        self.upkeep.deliver_charges()
        _complain(self.upkeep.deliver_logouts())
        self._at_exit.disarm()
        if not self.state_wire.breaker.is_open:
            self.upkeep.flush_session_stats()
        self.upkeep.deliver_events()
        self.wire.close()
        self.state_wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStillroom(_Room):
    """The services of one app, for asyncio: what they do is awaited. Otherwise as Stillroom.

    They are `cache`, `sessions`, `limits`, `abuse`, `health` and `tasks`. `upkeep` is what workers do.
    """

    cache: AsyncCache
    sessions: AsyncSessions
    limits: AsyncLimits
    abuse: AsyncAbuse
    health: AsyncHealth
    tasks: AsyncTasks
    upkeep: AsyncUpkeep
    operations: Operations[AsyncDriver]

    def __init__(
        self,
        settings: Settings | str | None = None,
        *,
        dispatch: Dispatch | None = None,
        **values: Any,
    ) -> None:
        super().__init__(settings, dispatch, values)
        self.wire: AsyncWire | AsyncClusterWire
        wires: Sequence[AsyncWire | AsyncShardWire]
        # The dispatcher's thread has no event loop: it frees a lease through a wire of its own.
        for_threads: Sequence[Wire | ShardWire[AsyncWire]]
        if self.settings.cluster:
            self.wire = clustered = AsyncClusterWire(*self._cluster(), probe=self.keys.clock)
            one = None
            wires, for_threads = clustered.shards, clustered.shards_for_threads
        else:
            self.wire = one = AsyncWire(self._server)
            wires, for_threads = (
                [one] * self.settings.shards,
                [one.for_threads] * self.settings.shards,
            )
        self.state_wire: AsyncWire | AsyncSpreadWire
        if isinstance(self._state_server, StateServer):
            self.state_wire = AsyncSpreadWire(self._state_server)
        elif one is not None and self._is_one_server:
            self.state_wire = one
        else:
            self.state_wire = AsyncWire(self._state_server)
        aside = drivers_of(for_threads, self.state_wire.for_threads)
        parts = self._cache(wires, aside)
        self._cache_body = parts.cache
        drivers = async_drivers_of(wires, self.state_wire)
        self._cache_driver = drivers[0]
        self.cache = AsyncCache(parts.cache, parts.images, drivers[0])
        self.tasks = AsyncTasks(TasksBody(parts.orders), drivers[0])
        self.wire.breaker.recovered.append(self._cache_body.deliver_aside)
        self.state = drivers[0].at(STATE)
        self.sessions = AsyncSessions(self._sessions_body, self.state)
        self._limits_body = self._limits(self.state_wire.breaker)
        self.limits = AsyncLimits(self._limits_body, self.state)
        self.abuse = AsyncAbuse(self._abuse_body, AsyncDriver(self.state_wire))
        # Nor has the prober, which tells of Redis' return.
        self._wire_in_threads = self.state_wire.for_threads
        for_prober = Driver(self._wire_in_threads)
        self.state_wire.breaker.recovered += [
            lambda: for_prober.run(self._sessions_body.deliver()),
            lambda: for_prober.run(self._limits_body.deliver()),
        ]
        asked = [AsyncDriver(self.state_wire)]
        asked += [AsyncDriver(wire) for wire in wires_of_cache(self.settings, wires)]
        health = self._health(self.state_wire, wires)
        self.health = AsyncHealth(health, AsyncDriver(self.state_wire, asked))
        self.upkeep = AsyncUpkeep(
            Service(parts.housekeeping, drivers[0]), *self._services(self.state)
        )
        self._complete(health, Cache(parts.cache, parts.images, aside[0]), self.state)

    @explained
    def lock(
        self,
        name: str,
        *,
        lease: Duration = 30.0,
        wait: Duration = 10.0,
        longest: Duration = 3_600.0,
    ) -> AsyncLock:
        """Return a lock that all processes share: `async with room.lock("import") as held: …`.

        See Stillroom.lock.
        """
        return AsyncLock(self._locks_body, self.state, Terms(name, 1, lease, wait, longest))

    @explained
    def semaphore(
        self,
        name: str,
        slots: int,
        *,
        lease: Duration = 30.0,
        wait: Duration = 10.0,
        longest: Duration = 3_600.0,
    ) -> AsyncLock:
        """Return a lock that `slots` holders can have at a time. See Stillroom.semaphore."""
        return AsyncLock(self._locks_body, self.state, Terms(name, slots, lease, wait, longest))

    async def connect(self) -> None:
        """See Stillroom.connect."""
        await self.state.run(self._answers_of(self.wire, self.state_wire))
        await self._cache_driver.run(self._rehearse_cache())
        await self.state.run(self._rehearse_state())
        await self._cache_driver.run(self._cache_body.terms.agree())

    async def close(self) -> None:
        """See Stillroom.close."""
        await aside(self.dispatch.close)
        if not self.wire.breaker.is_open:
            await self.upkeep.flush_cache_stats()
        await aside(self._cache_body.deliver_last)
        await self.upkeep.deliver_charges()
        _complain(await self.upkeep.deliver_logouts())
        self._at_exit.disarm()
        if not self.state_wire.breaker.is_open:
            await self.upkeep.flush_session_stats()
        await self.upkeep.deliver_events()
        await self.wire.close()
        await self.state_wire.close()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """For Starlette and FastAPI: `FastAPI(lifespan=room.lifespan)` closes the room when the app ends.

        `app.state.stillroom` is the room. With a lifespan of your own:
        `stillroom.web.fastapi_room.lifespan(room, yours)`.
        """
        if hasattr(app, "state"):
            app.state.stillroom = self
        for name in self.cache.loaders.uninstalled_pages():
            log.warning("the page %s is cached nowhere: Pages.install(app) was not called", name)
        async with self:
            yield

    async def __aenter__(self) -> Self:
        """Return the room. Raises Misplaced where the event loop is not asyncio's."""
        running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _settings_of(given: object, values: Mapping[str, Any]) -> Settings:
    """Return the settings that a room was given: none, a Redis URL, a Settings object, or values by name."""
    known = [*Settings.model_fields, "dispatch"]
    if unknown := [name for name in values if name not in known]:
        raise UnknownSetting(f"{unknown[0]} is not a setting{meant_setting(unknown[0], known)}")
    given = given if isinstance(given, Settings) else text_of_url(given)
    if isinstance(given, str):
        if "redis_url" in values:
            raise InvalidArgument(
                "the Redis URL is given twice: as the first argument, and by name"
            )
        return Settings(**{"redis_url": given, **values})
    if given is None:
        return Settings(**values)
    if not isinstance(given, Settings):
        raise InvalidArgument(
            f"{shown_url(given)}: a room is given Settings(…), the URL of Redis, or settings by name"
        )
    if values:
        raise InvalidArgument(
            f"Settings(…) and {', '.join(values)} are both given: put all of them into Settings(…)"
        )
    return given


def _check_dispatch(dispatch: object) -> None:
    if isinstance(dispatch, type):
        raise InvalidArgument(f"dispatch={dispatch.__name__}: write {dispatch.__name__}()")
    if dispatch is not None and not hasattr(dispatch, "send"):
        raise InvalidArgument(
            f"dispatch={in_code(dispatch):.100}: CeleryDispatch(…), InlineDispatch() or NoDispatch()"
        )


def ban_file_of(settings: Settings) -> Path | None:
    """Return the file of the bans that this machine knows of; None where there is none."""
    return ban_file(settings.ban_file, settings.namespace, settings.redis_url)


def listeners_of(room: Stillroom | AsyncStillroom) -> list[Callable[[SessionEvent], object]]:
    """Return the app's listeners to the sessions, without the room's own, which is bound to it."""
    return [one for one in room.sessions.on_event if getattr(one, "__self__", None) is not room]


def _complain(left: int) -> None:
    if left:
        log.error("%d logouts that were made while Redis was away are lost", left)
