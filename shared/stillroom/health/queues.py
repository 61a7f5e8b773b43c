"""Finds out whether the broker is the Redis that holds the state.

Its queues can then be read without another connection.
"""

from __future__ import annotations

import socket
import threading

from stillroom.background import started
from stillroom.place import Place, is_same_place, place_of
from stillroom.settings import Settings


class BrokerHere:
    """Compares the two servers, not what their URLs look like: each may be another user's, or another name.

    Where two names differ the resolver decides, which may take seconds. A thread asks it; until then `answer` is
    None.
    """

    def __init__(self, settings: Settings) -> None:
        self._urls = settings.broker_url or settings.redis_url, settings.redis_url
        self._answer: bool | None = is_same_place(*self._urls)
        self._thread: threading.Thread | None = None

    @property
    def answer(self) -> bool | None:
        """Return whether both are one server. None: not known yet."""
        if self._answer is None:
            self._ask()
        return self._answer

    def _ask(self) -> None:
        """Begin to ask, unless that is under way. Two checks at once may begin twice, which does no harm."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = started(self._resolve, "stillroom resolver")

    def _resolve(self) -> None:
        places = [place_of(url) for url in self._urls]
        try:
            first, second = (_addresses(place) for place in places if place is not None)
        except (OSError, ValueError):
            return
        self._answer = bool(first & second)


def _addresses(place: Place) -> set[str]:
    found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}
