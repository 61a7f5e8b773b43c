"""Locks and semaphores against a model with three rules.

The first: never more callers hold a lock or semaphore than it has slots, each by its own clock. A server that has
lost what it knew, or whose clock was put forward, may give a slot away earlier. The second: each fence is larger
than those of the holders before. The third: in the end a slot is free, however holders and waiters have ended.
No call raises what it does not promise, and every key has an end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stillroom import LockLost, LockTaken, RedisUnavailable, Settings, Stillroom
from stillroom.locks.renewer import Renewal
from tests.explorer.explorer import Broken, Model
from tests.explorer.watch import endless
from tests.explorer.world import Actor, World

SLOTS = {"lock": 1, "semaphore": 2}
LEASES_S, WAITS_S = (1.0, 2.0, 5.0, 30.0), (0.0, 0.05, 0.3, 1.0, 5.0)


class ByHand:
    """Stands in for the thread that renews: in this world a lock is renewed when the model says so."""

    def add(self, every: float, renew: Callable[[], bool]) -> Renewal:
        return Renewal(every, renew)

    def drop(self, renewal: Renewal) -> None:
        renewal.renew = None


@dataclass
class Hold:
    """A slot that a call was given."""

    name: str
    held: Any
    call: Actor
    is_over: bool = False  # it is given back, or is being given back, or its process has died


class LocksModel(Model):
    """Three processes that want the same lock and the same semaphore."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "breaker_failures": 1_000_000,
        "breaker_calls": 1_000_000,
    }
    WEIGHTS: ClassVar[dict[str, float]] = {
        "take": 8,
        "release": 6,
        "renew": 3,
        "time": 1,
        "lose": 0.4,
        "die": 0.4,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        super().__init__(world, settings, weights)
        self.rooms = [self._room() for _ in range(3)]
        self.holds: list[Hold] = []

    def _room(self) -> Stillroom:
        room = super()._room()
        room._locks_body.renewer = ByHand()  # type: ignore[assignment]
        return room

    # Events

    def act(self) -> None:
        self._look()
        acts: dict[str, Callable[[int], None]] = {
            "take": self._take,
            "release": self._release,
            "renew": self._renew,
            "time": self._pass_time,
            "lose": lambda _: self.world.lose_scripts(),
            "die": self._begin_anew,
        }
        acts[self._next()](self.world.random.randrange(3))

    def _take(self, process: int) -> None:
        chance = self.world.random
        name = chance.choice(["lock", "lock", "semaphore"])
        lease, wait = chance.choice(LEASES_S), chance.choice(WAITS_S)

        def check(call: Actor) -> None:
            self._expect(call, (RedisUnavailable, LockTaken))
            if call.error is None:
                self._check_fence(name, call)
                self.holds.append(Hold(name, call.value, call))
                self._check_holders()

        acquire = self._slot(process, name, lease=lease, wait=wait).acquire
        self.world.call(f"take the {name}, {lease=}, {wait=}", process, acquire, check)

    def _slot(self, process: int, name: str, **terms: float) -> Any:
        return self.rooms[process].semaphore(name, SLOTS[name], **terms)

    def _release(self, process: int) -> None:
        if (hold := self._some(process)) is None:
            return
        hold.is_over, until = True, hold.held._until

        def check(call: Actor) -> None:
            self._expect(call, (LockLost,))
            if call.error and self.world.monotonic < until and self._is_sure(hold):
                raise Broken(f"{call.name} says that it was lost, and it was held until {until}")

        called = f"release the {hold.name} of fence {hold.held.fence}"
        self.world.call(called, process, hold.held.release, check)

    def _renew(self, process: int) -> None:
        if (hold := self._some(process)) is None:
            return

        def check(call: Actor) -> None:
            self._expect(call, ())
            self._check_holders()

        called = f"renew the {hold.name} of fence {hold.held.fence}"
        self.world.call(called, process, hold.held._renew, check)

    def _pass_time(self, _: int) -> None:
        self.world.pass_time(self.world.random.choice([0.3, 0.9, 2.1, 6.0]))

    def _begin_anew(self, process: int) -> None:
        """A process ends without a word, and another one begins."""
        self.world.kill(process)
        for hold in self.holds:
            hold.is_over |= hold.call.process == process
        self.rooms[process] = self._room()

    # Invariants

    def end(self) -> None:
        world = self.world
        for process in range(3):
            while self._some(process) is not None:
                self._release(process)
                world.finish()
        while world.copies:
            world.deliver_a_copy()
        self._look()
        if endings := endless(world, "*{lk:*"):
            raise Broken(f"these have no end: {endings}")
        world.pass_time(max(LEASES_S) + 1)  # of those that died, or were told nothing
        for name in () if self.watch.steps else SLOTS:
            call = world.run(f"last take of the {name}", 0, self._slot(0, name, wait=0.0).acquire)
            self._expect(call, ())

    def _check_holders(self) -> None:
        for name, slots in SLOTS.items():
            those = [one for one in self.holds if one.name == name and not one.is_over]
            held = [one for one in those if one.held.is_held and self._is_sure(one)]
            if len(held) > slots:
                told = [f"{one.call.name} until {one.held._until}" for one in held]
                raise Broken(f"{len(held)} hold the {name} at {self.world.monotonic}: {told}")

    def _check_fence(self, name: str, call: Actor) -> None:
        for one in self.holds:
            returned = one.call.returned or 0
            is_before = one.name == name and self.watch.lost < returned < call.began
            if is_before and one.held.fence >= call.value.fence:
                raise Broken(f"{call.name}: {call.value.fence} after {one.held.fence}")

    def _is_sure(self, hold: Hold) -> bool:
        """Return whether nothing has happened since that may give the slot to another caller early."""
        began = hold.call.began
        return self.watch.lost < began and not self.watch.stepped(began)[0]

    # Helpers

    def _some(self, process: int) -> Hold | None:
        own = [one for one in self.holds if one.call.process == process and not one.is_over]
        return self.world.random.choice(own) if own else None
