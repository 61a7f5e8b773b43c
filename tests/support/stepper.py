"""An operation run by hand: a test decides what happens between any two of its steps.

A batch is sent one command at a time, since that is how a server may interleave it with other clients'
commands, and its replies are handed over in a step of their own, since they may travel for a while. What is said
to the state's server (`On`) is one step.
"""

from __future__ import annotations

import time
from typing import Any

from stillroom import Stillroom
from stillroom.errors import RedisUnavailable
from stillroom.operation import Call, Driver, Freeing, On, Once, Operation, Pause

PATIENCE = 10.0  # seconds for one command


class Stepper:
    """One operation of one room, and how far it has come."""

    def __init__(self, room: Stillroom, operation: Operation[Any]) -> None:
        is_spread = room.settings.state_cluster
        self._driver: Driver = room.state if is_spread else room.cache._driver
        # Send each command twice, as the wire does when a connection was found dead.
        self.twice = False
        self._operation: Any = iter(operation)
        self._answers: list[Any] = []  # to the step it stands at
        self._failure: BaseException | None = None
        self.at: Any = None
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._resume(None)

    @property
    def is_waiting(self) -> bool:
        """Return whether the operation stands at a pause, waiting for another's load."""
        return isinstance(self.at, Pause)

    @property
    def is_loading(self) -> bool:
        """Return whether the operation is about to call the loader."""
        return isinstance(self.at, Call) and not self._is_answered()

    def step(self) -> None:
        """Send one command, call the loader, or hand over the replies."""
        if self._is_answered():
            self._deliver()
            return
        try:
            self._answers.append(self._perform())
        except BaseException as error:
            self._failure = error

    def interrupt(self, error: BaseException) -> None:
        """Raise this in the middle of what it does, as a signal's handler or a timeout of gevent's may."""
        self._failure = error
        self._deliver()

    def run(self) -> Stepper:
        """Run on, until it has ended or waits."""
        while not self.done and not self.is_waiting:
            self.step()
        return self

    def run_to_the_load(self) -> Stepper:
        """Run on, until the loader is about to be called."""
        while not self.is_loading:
            assert not self.done, "it ended without a load"
            self.step()
        return self

    def value(self) -> Any:
        """Run the operation to its end; return its result."""
        self.run()
        if self.error is not None:
            raise self.error
        assert self.done, "it waits for another's load"
        return self.result

    def _is_answered(self) -> bool:
        wanted = len(self.at) if isinstance(self.at, list) else 1
        return self._failure is not None or len(self._answers) == wanted or self.is_waiting

    def _perform(self) -> Any:
        if isinstance(self.at, Call | On):
            return self._driver._take(self.at, time.monotonic() + PATIENCE)
        batch = type(self.at)([self.at[len(self._answers)]])  # its kind says how it is sent
        if self.twice and type(batch) in (list, Freeing):
            self._send(batch)
        (reply,) = self._send(batch)
        return reply

    def _send(self, batch: Any) -> Any:
        if type(batch) in (list, Once):
            return self._driver._exchange(batch, PATIENCE)
        return self._driver._take(batch, time.monotonic() + PATIENCE)

    def _deliver(self) -> None:
        answers, self._answers = self._answers, []
        failure, self._failure = self._failure, None
        if isinstance(self.at, list):
            self._resume(answers, failure)
        else:
            self._resume(answers[0] if answers else None, failure)

    def _resume(self, answer: Any, failure: BaseException | None = None) -> None:
        try:
            if failure is not None:
                self.at = self._operation.throw(failure)
            else:
                self.at = self._operation.send(answer)
        except StopIteration as stop:
            self.at, self.done, self.result = None, True, stop.value
        except RedisUnavailable:
            raise  # the server of a test is always there
        except BaseException as error:
            self.at, self.done, self.error = None, True, error


# When a load begins, reads and stores, of four moments of a transaction beside it.
MOMENTS = [(a, b, c) for a in range(4) for b in range(a, 4) for c in range(b, 4)]


class LoadBeside:
    """A load of a cached function that begins, reads and stores at three moments of what goes on beside it."""

    def __init__(
        self, room: Stillroom, loader: Any, args: tuple[Any, ...], moments: tuple[int, int, int]
    ) -> None:
        self._room = room
        self._call = loader, args, {}
        self._lease_at, self._read_at, self._store_at = moments

    def at(self, moment: int) -> None:
        """Do what the load does at this moment. They are told in their order, each once."""
        if moment == self._lease_at:
            operation = self._room._cache_body.call(*self._call)
            self._load = Stepper(self._room, operation).run_to_the_load()
        if moment == self._read_at:
            self._load.step()
        if moment == self._store_at:
            self._load.run()
