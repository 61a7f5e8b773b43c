"""Sessions: who is logged in, from where, and for how long."""

from stillroom.sessions.asking import steady_us
from stillroom.sessions.body import SessionsBody, not_fresh
from stillroom.sessions.creating import LONGEST_S
from stillroom.sessions.data import decoded, decoded_value, encoded_value
from stillroom.sessions.many import SWEEP_TASK
from stillroom.sessions.probe import SessionProbe
from stillroom.sessions.session import Device, Session, SessionEvent, encoded_user, legible
from stillroom.sessions.sessions import AsyncSessions, Sessions

__all__ = [
    "LONGEST_S",
    "SWEEP_TASK",
    "AsyncSessions",
    "Device",
    "Session",
    "SessionEvent",
    "SessionProbe",
    "Sessions",
    "SessionsBody",
    "decoded",
    "decoded_value",
    "encoded_user",
    "encoded_value",
    "legible",
    "not_fresh",
    "steady_us",
]
