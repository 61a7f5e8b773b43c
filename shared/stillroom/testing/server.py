"""The server of an app's tests: patient while it answers, given up as fast as in production while it is frozen."""

from __future__ import annotations

from typing import Any

from stillroom.embedded import EmbeddedServer
from stillroom.room import living_rooms
from stillroom.settings import Settings
from stillroom.testing.parts import parts_of

# A busy machine is no reason to give up, where deadlines are not what a test is about.
PATIENT: dict[str, Any] = {
    "jitter": 0.0,  # nor is chance what a test is about
    "connect_timeout": 10.0,
    "command_timeout": 10.0,
    "call_timeout": 30.0,
    "request_timeout": 60.0,
    "pool_timeout": 10.0,
}
# The one server of the tests, whatever servers, and file of bans, the environment names: a test writes into none of
# those.
ALONE: dict[str, Any] = {
    "redis_password": None,
    "sentinel_user": None,
    "sentinel_password": None,
    "cache_url": None,
    "cluster": False,
    "state_cluster": False,
    "replicas": 0,
    "cache_replicas": None,
    "broker_url": None,
    "result_backend": None,
    "ban_file": None,
}
_CALL, _COMMAND = "_call_timeout", "_command_timeout"  # of a driver


class TestServer(EmbeddedServer):
    """An EmbeddedServer whose `freeze()` brings back the deadlines that apps have: 0.15 s for a call.

    Deadlines that the app's tests set themselves (`stillroom_options`) are kept. `thaw()` and `restart()` make the
    rooms patient again.
    """

    __test__ = False  # pytest takes a class of this name for a test

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._before: list[tuple[Any, float, float]] = []

    @property
    def is_frozen(self) -> bool:
        return self._frozen

    @property
    def is_running(self) -> bool:
        return self._server is not None and self._server.exit_code is None

    def freeze(self) -> None:
        """Send SIGSTOP: connections stay open and nothing answers. Calls of this process give up after 0.15 s."""
        super().freeze()
        self._be_patient()
        for driver in self._drivers():
            call, command = getattr(driver, _CALL), getattr(driver, _COMMAND)
            self._before.append((driver, call, command))
            setattr(driver, _CALL, _usual("call_timeout", call))
            setattr(driver, _COMMAND, _usual("command_timeout", command))

    def thaw(self) -> None:
        """Send SIGCONT: what was sent meanwhile is answered now."""
        super().thaw()
        self._be_patient()

    def restart(self) -> None:
        super().restart()
        self._be_patient()

    def _drivers(self) -> list[Any]:
        """Return the drivers of this process's rooms on this server, each once."""
        rooms = [
            room
            for room in list(living_rooms)
            if self.url in (room.settings.redis_url, room.settings.cache_server)
        ]
        drivers = {id(part): part for room in rooms for part in parts_of(room)}
        return [part for part in drivers.values() if hasattr(part, _CALL)]

    def _be_patient(self) -> None:
        for driver, call, command in self._before:
            setattr(driver, _CALL, call)
            setattr(driver, _COMMAND, command)
        self._before.clear()


def _usual(name: str, seconds: float) -> float:
    """Return the default deadline, unless the test has set its own."""
    return Settings.model_fields[name].default if seconds == PATIENT[name] else seconds
