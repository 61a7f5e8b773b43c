"""The sessions against a model with two rules.

The first: a read that began after the end of a session had returned yields nothing, by whatever name. What is
deferred holds for its own process at once, and for all once it is told. The second: a session that nobody ended
lives, under the newest name that anybody was given; and none lives of which nobody was given a name. No call raises
what it does not promise, and every key has an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from stillroom import (
    SessionConflict,
    SessionEnded,
    SessionStoreUnavailable,
    Settings,
    TooManySessions,
)
from tests.explorer.explorer import CALM, Broken, Model
from tests.explorer.watch import endless
from tests.explorer.world import Actor, World

WORKER = 2  # the process that works in the background
CAPPED = "cy"  # each login of this user counts the others
CAP = 1
TAGGED = "bob"  # each of this user's sessions has the tag
TAG = "t"
USERS = ("ann", TAGGED, CAPPED, CAPPED, None)
GRACE_S = 10.0
LATE_S = 400.0  # a command that is on its way for longer is not known any more


@dataclass
class Rotation:
    """A call that gives a session another token. Its times are the steady clock's."""

    call: Actor
    began_s: float
    grace_s: float
    returned_s: float = math.inf  # if it did so without an error


@dataclass
class Name:
    """A token, and the calls that gave its session another one."""

    token: str
    rotations: list[Rotation] = field(default_factory=list)


@dataclass
class Ended:
    """A call that ended a session."""

    call: Actor
    whose: int | None = None  # the process that knows so far; None: all do
    # It waited under an old name, which a clock that jumps forward makes worthless.
    is_by_grace: bool = False


@dataclass
class Life:
    """A session under all its names."""

    user: str | None
    born: Actor
    names: list[Name]
    doubts: int = 0  # how many calls may have ended it
    written: dict[int, int] = field(default_factory=dict)  # version → what was written
    ends: list[Ended] = field(default_factory=list)
    mutations: list[Actor] = field(default_factory=list)

    @property
    def newest(self) -> Name:
        return self.names[-1]

    def rotations_since(self, name: Name) -> list[Rotation]:
        """Return the rotations of this name and of all later names, each of which led to the next."""
        later = self.names[self.names.index(name) :]
        return [rotation for one in later for rotation in one.rotations]


class SessionsModel(Model):
    """Two processes and a worker."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "session_peppers": [
            "a-pepper-of-thirty-two-bytes-....",
            "another-of-thirty-two-bytes-.....",
        ],
        "session_shards": 2,
        "session_idle": 200_000.0,
        "session_grace": GRACE_S,
        "breaker_failures": 1_000_000,
        "breaker_calls": 1_000_000,
    }
    WEIGHTS: ClassVar[dict[str, float]] = {
        "create": 5,
        "read": 5,
        "update": 2,
        "rotate": 4,
        "destroy": 4,
        "destroy all": 1,
        "work": 1,
        "lose": 0.5,
        "die": 0.5,
        # Only where a test says so: the stories of the others stay what they were.
        "mutate": 0,
        "confirm": 0,
        "end": 0,
        "destroy by tag": 0,
        "destroy everybody": 0,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        super().__init__(world, settings, weights)
        self.rooms = [self._room() for _ in range(3)]
        self.lives: list[Life] = []
        self._numbers = iter(range(1_000_000))
        self._on_cap = world.random.choice(["reject", "evict_oldest"])
        self._revocations: list[tuple[str, Actor]] = []  # of whom
        self._is_somebody_lost = False  # a process died, and what it would have undone is not

    # Events

    def act(self) -> None:
        self._look()
        acts: dict[str, Callable[[int], None]] = {
            "create": self._create,
            "read": self._read,
            "update": self._update,
            "rotate": self._rotate,
            "destroy": self._destroy,
            "destroy all": self._destroy_all,
            "work": self._work,
            "lose": self._lose_scripts,
            "die": self._begin_anew,
            "mutate": self._mutate,
            "confirm": partial(self._rotate, how="confirm"),
            "end": self._end,
            "destroy by tag": self._destroy_by_tag,
            "destroy everybody": self._destroy_everybody,
        }
        acts[self._next()](self.world.random.randint(0, 1))

    def _look(self) -> None:
        before = self.watch.lost
        super()._look()
        if self.watch.lost > before:  # an ended session may be there again, and a new one may not
            self.lives.clear()

    def _create(self, process: int) -> None:
        chance, sessions = self.world.random, self.rooms[process].sessions
        user, value = chance.choice(USERS), next(self._numbers)
        old = self._some() if chance.random() < 0.4 else None
        cap: dict[str, Any] = {}
        if user == CAPPED:
            cap = {"max_per_user": CAP, "on_cap": self._on_cap}
        replaces = chance.choice(old.names) if old else None
        token = replaces.token if replaces else None

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable, TooManySessions))
            if isinstance(call.error, TooManySessions) and old and self.world.fates is CALM:
                old.doubts -= 1
            if call.error is None and call.began > self.watch.lost:
                born = Life(user, call, [Name(call.value.token)], written={1: value})
                born.doubts = self._doubts_of_newborn(born)
                self.lives.append(born)
                if old and replaces:
                    deferred = self.rooms[process]._sessions_body._deferred
                    self._have_ended(old, replaces, call, began, process if deferred else None)

        tags = (TAG,) if user == TAGGED else ()
        create = partial(sessions.create, user, {"n": value}, tags=tags, replaces=token, **cap)
        called = f"create for {user}, replacing {token and token[:8]}"
        began = self.world.monotonic
        self._call(called, process, create, check, [old] if old else [])

    def _read(self, process: int) -> None:
        life = self._some()
        if life is None:
            return
        name = self.world.random.choice(life.names)
        get = partial(self.rooms[process].sessions.get, name.token)
        check = partial(self._check_read, life)
        self._call(f"get {name.token[:8]}", process, get, check, [])

    def _update(self, process: int) -> None:
        life = self._some()
        if life is None:
            return
        value = next(self._numbers)
        token = life.newest.token

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable, SessionEnded))
            if call.error is None and call.value in life.written and self._is_known(life):
                raise Broken(f"{call.name} made version {call.value}, which there was")
            if call.error is None:
                self._check_is_over(life, call)
                life.written[call.value] = value

        update = partial(self.rooms[process].sessions.update, token, {"n": value})
        self._call(f"update {token[:8]} to {value}", process, update, check, [])

    def _mutate(self, process: int) -> None:
        life = self._some()
        if life is None:
            return
        token = life.newest.token

        def count(data: dict[str, Any]) -> None:
            data["mutated"] = data.get("mutated", 0) + 1

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable, SessionEnded))
            if call.error is None:
                self._check_is_over(life, call)

        mutate = partial(self.rooms[process].sessions.mutate, token, count)
        life.mutations.append(self._call(f"mutate {token[:8]}", process, mutate, check, []))

    def _rotate(self, process: int, how: str = "rotate") -> None:
        life = self._some()
        if life is None:
            return
        name = life.newest
        grace = self.world.random.choice([GRACE_S, GRACE_S, 0.0])

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable, SessionEnded, SessionConflict))
            if call.error is None:
                self._check_is_over(life, call)
                life.names.append(Name(call.value.token))
                rotation.returned_s = self.world.monotonic

        rotate = partial(getattr(self.rooms[process].sessions, how), name.token, grace=grace)
        called = f"{how} {name.token[:8]}, {grace=}"
        call = Actor(self.world, called, process, rotate, check)
        rotation = Rotation(call, self.world.monotonic, grace)
        name.rotations.append(rotation)
        self.world.begin_call(call)

    def _destroy(self, process: int) -> None:
        life = self._some()
        if life is None:
            return
        chance, sessions = self.world.random, self.rooms[process].sessions
        name, defer = chance.choice([*life.names, life.newest]), chance.random() < 0.5
        is_over = self._was_over(life, name)

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable,))
            if call.error is None:
                deferred = self.rooms[process]._sessions_body._deferred
                self._have_ended(life, name, call, began, process if deferred else None)

        destroy = partial(sessions.destroy, name.token, defer=defer)
        began = self.world.monotonic
        told = ", whose grace is over" if is_over else ""
        called = f"destroy {name.token[:8]}{told}"
        self._call(called, process, destroy, check, [] if is_over else [life])

    def _destroy_all(self, process: int) -> None:
        chance, sessions = self.world.random, self.rooms[process].sessions
        user = chance.choice([user for user in USERS if user])
        theirs = [life for life in self.lives if life.user == user]
        kept = chance.choice(theirs) if theirs and chance.random() < 0.5 else None
        keep = kept.newest.token if kept and not kept.newest.rotations else None

        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable, SessionEnded))
            for life in theirs:
                if call.error is None and not (keep and life is kept):
                    life.ends.append(Ended(call))

        destroy = partial(sessions.destroy_for_user, user, keep)
        touched = [life for life in theirs if not (keep and life is kept)]
        called = f"destroy all of {user} but {keep and keep[:8]}"
        self._revocations.append((user, self._call(called, process, destroy, check, touched)))

    def _end(self, process: int) -> None:
        """End a session by the handle that it began with, as a list showed it that is old by now."""
        life = self._some()
        if life is None or life.user is None:
            return
        handle = life.born.value.handle
        end = partial(self.rooms[process].sessions.end, life.user, handle)
        self._end_those([life], f"end {handle[:8]}", process, end)

    def _destroy_by_tag(self, process: int) -> None:
        theirs = [life for life in self.lives if life.user == TAGGED]
        destroy = partial(self.rooms[process].sessions.destroy_by_tag, "unknown", TAG)
        call = self._end_those(theirs, f"destroy all with the tag {TAG}", process, destroy)
        self._revocations.append((TAGGED, call))

    def _destroy_everybody(self, process: int) -> None:
        destroy = self.rooms[process].sessions.destroy_all
        call = self._end_those(list(self.lives), "destroy everybody", process, destroy)
        self._revocations += [(user, call) for user in set(USERS)]

    def _end_those(
        self, those: Sequence[Life], name: str, process: int, act: Callable[[], Any]
    ) -> Actor:
        def check(call: Actor) -> None:
            self._expect(call, (SessionStoreUnavailable,))
            for life in those:
                if call.error is None:
                    life.ends.append(Ended(call))

        return self._call(name, process, act, check, those)

    def _work(self, _: int) -> None:
        sweep = partial(self.rooms[WORKER].sessions.sweep, 2, 1.0)
        expect = partial(self._expect, errors=(SessionStoreUnavailable,))
        self._call("sweep", WORKER, sweep, expect, [])

    def _lose_scripts(self, _: int) -> None:
        self.world.lose_scripts()

    def _begin_anew(self, process: int) -> None:
        """A process ends without a word, and another one begins."""
        dying = [one for one in self.world.actors if one.process == process and not one.is_done]
        owes = self.rooms[process]._sessions_body._deferred
        self._is_somebody_lost |= bool(dying or owes)
        self.world.kill(process)
        self.rooms[process] = self._room()
        for life in self.lives:
            life.ends = [end for end in life.ends if end.whose != process]
            rotations = life.rotations_since(life.names[0])
            if owes or any(one.call.is_dead for one in rotations):
                life.doubts += len(rotations)

    # Invariants

    def end(self) -> None:
        world = self.world
        self._look()
        for process in (0, 1):
            self._deliver(process)
        while world.copies:
            world.deliver_a_copy()
        for life in self.lives:
            for name in life.names:
                get = partial(self.rooms[0].sessions.get, name.token)
                called = f"last get {name.token[:8]}"
                self._check_read(life, world.run(called, 0, get))
            last = world.run(called, 0, get)
            self._check_lives(life, last)
            self._check_mutations(life, last)
        self._check_lists()
        if endings := endless(world, "*:{s*"):
            raise Broken(f"these have no end: {endings}")

    def _deliver(self, process: int) -> None:
        """Deliver what this process has deferred, which holds for all processes from now on."""
        left = self.world.run("deliver", process, self.rooms[process].sessions.deliver).value
        if left:
            raise Broken(f"{left} ends were not told")
        for life in self.lives:
            for end in life.ends:
                end.whose = None if end.whose == process else end.whose

    def _check_lists(self) -> None:
        """Check that no session is listed whose name nobody was given, and that the cap holds."""
        world = self.world
        for user in ("ann", "bob", CAPPED):
            devices = world.run(
                "list", 0, partial(self.rooms[0].sessions.list_for_user, user)
            ).value
            if user == CAPPED and not self.watch.lost and len(devices) > CAP:
                raise Broken(f"{len(devices)} sessions of {user}, who may have {CAP}")
            known = [life for life in self.lives if life.user == user]
            is_sure = not (self._is_somebody_lost or self.watch.lost)
            if is_sure and self.watch.passed < LATE_S and len(devices) > len(known):
                raise Broken(f"{len(devices)} sessions of {user}, who was given {len(known)}")

    def _check_read(self, life: Life, call: Actor) -> None:
        self._expect(call, (SessionStoreUnavailable,))
        if call.error is None and call.value is not None:
            self._check_is_over(life, call)
            session = call.value
            said = life.written.get(session.version, session.data["n"])
            if self._is_known(life) and session.data["n"] != said:
                raise Broken(
                    f"{call.name}: {session.data} is not what version {session.version} was"
                )

    def _check_is_over(self, life: Life, call: Actor) -> None:
        """Check that nobody had ended a session that this call has found."""
        for end in life.ends:
            returned = end.call.returned
            is_before = returned is not None and returned < call.began
            is_known = end.whose in (None, call.process) and self._is_known(life)
            is_missed = end.is_by_grace and self.watch.stepped(end.call.began)[0]
            if is_before and is_known and not is_missed:
                raise Broken(
                    f"{call.name}, begun at {call.began}, in spite of {end.call.name}, ended at {returned}"
                )

    def _check_lives(self, life: Life, call: Actor) -> None:
        rotations = life.rotations_since(life.names[0])
        is_late = any(one.call.error for one in rotations) and self.watch.passed > LATE_S
        if call.value is None and not life.doubts and not is_late and self._is_known(life):
            raise Broken(f"{call.name}: gone, and nobody has ended it")

    def _check_mutations(self, life: Life, call: Actor) -> None:
        """Check that each mutation was done once if it returned, and not if its error says so."""
        if call.value is None or not self._is_known(life):
            return
        done = sum(one.returned is not None and one.error is None for one in life.mutations)
        open_ = sum(one.returned is None or _may_be_done(one.error) for one in life.mutations)
        if not done <= call.value.data.get("mutated", 0) <= done + open_:
            raise Broken(f"{call.name}: {call.value.data}, {done} mutations and {open_} perhaps")

    def _is_known(self, life: Life) -> bool:
        """Return whether the server has lost nothing since this session began."""
        return any(life is one for one in self.lives)

    # Helpers

    def _some(self) -> Life | None:
        """Return a session, mostly one of the last two, or None."""
        if not self.lives:
            return None
        return self.world.random.choice([*self.lives[-2:], *self.lives[-2:], *self.lives])

    def _doubts_of_newborn(self, life: Life) -> int:
        """Return 1 if an earlier eviction, or a revocation still on its way, may end the new session, else 0."""
        evicted = life.user == CAPPED and self._on_cap != "reject"
        revoked = any(
            user == life.user
            and (call.error is not None or not 0 < (call.returned or 0) < life.born.began)
            for user, call in self._revocations
        )
        return int(evicted or revoked)

    def _was_over(self, life: Life, name: Name) -> bool:
        """Return whether a grace on the way from this name is surely over: a call to end it now ends nothing."""
        return any(
            self.world.monotonic > one.returned_s + one.grace_s + 0.001
            and not self.watch.stepped(one.call.began)[1]
            for one in life.rotations_since(name)
        )

    def _have_ended(
        self, life: Life, name: Name, call: Actor, began: float, whose: int | None
    ) -> None:
        """Note that a call ended the session of this name, if the name was good when the call began."""
        was_good = all(
            (one.call.began > call.began or began < one.began_s + one.grace_s)
            and not self.watch.stepped(one.call.began)[0]
            for one in life.rotations_since(name)
        )
        if was_good:
            waits = whose is not None and bool(life.rotations_since(name))
            life.ends.append(Ended(call, whose, waits))

    def _call(
        self,
        name: str,
        process: int,
        act: Callable[[], Any],
        check: Callable[[Actor], None],
        touched: Sequence[Life],
    ) -> Actor:
        """Begin a call, which may end the sessions that it touches; it is checked as soon as it has ended."""
        for life in touched:
            life.doubts += 1
        return self.world.call(name, process, act, check)


def _may_be_done(error: BaseException | None) -> bool:
    return isinstance(error, SessionEnded) or (
        isinstance(error, SessionStoreUnavailable) and error.may_be_done
    )
