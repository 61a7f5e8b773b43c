"""The sessions' two faces: `Sessions` for threads, `AsyncSessions` for asyncio."""

from __future__ import annotations

from collections.abc import Callable

from stillroom.face import Service, awaiting, blocking
from stillroom.sessions.body import SessionsBody
from stillroom.sessions.session import SessionEvent


class _Face(Service):
    """The part of both faces that runs no operation."""

    _body: SessionsBody

    @property
    def on_event(self) -> list[Callable[[SessionEvent], object]]:
        """Return the functions to call with each SessionEvent, in the process that noticed it.

        A session expired, was evicted, began on a new device, or its old token was used.
        """
        return self._body.on_event


class Sessions(_Face):
    """The sessions for threads and greenlets: `room.sessions`."""

    create = blocking(SessionsBody.create)
    get = blocking(SessionsBody.get)
    update = blocking(SessionsBody.update)
    mutate = blocking(SessionsBody.mutate)
    touch = blocking(SessionsBody.touch)
    destroy = blocking(SessionsBody.destroy)
    rotate = blocking(SessionsBody.rotate)
    confirm = blocking(SessionsBody.confirm)
    list_for_user = blocking(SessionsBody.list_for_user)
    end = blocking(SessionsBody.end)
    destroy_for_user = blocking(SessionsBody.destroy_for_user)
    destroy_by_tag = blocking(SessionsBody.destroy_by_tag)
    destroy_all = blocking(SessionsBody.destroy_all)
    count = blocking(SessionsBody.count)


class AsyncSessions(_Face):
    """The sessions for asyncio: `room.sessions`. The same names, awaited."""

    create = awaiting(SessionsBody.create)
    get = awaiting(SessionsBody.get)
    update = awaiting(SessionsBody.update)
    mutate = awaiting(SessionsBody.mutate)
    touch = awaiting(SessionsBody.touch)
    destroy = awaiting(SessionsBody.destroy)
    rotate = awaiting(SessionsBody.rotate)
    confirm = awaiting(SessionsBody.confirm)
    list_for_user = awaiting(SessionsBody.list_for_user)
    end = awaiting(SessionsBody.end)
    destroy_for_user = awaiting(SessionsBody.destroy_for_user)
    destroy_by_tag = awaiting(SessionsBody.destroy_by_tag)
    destroy_all = awaiting(SessionsBody.destroy_all)
    count = awaiting(SessionsBody.count)
