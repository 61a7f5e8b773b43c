"""Rate limits: how often a client may, and what it is told when it may not."""

from stillroom.limits.body import LimitsBody
from stillroom.limits.changes import Change
from stillroom.limits.decision import Decision, Standing
from stillroom.limits.limit import API, AUTH, DEFAULT, STATIC, Limit
from stillroom.limits.limits import AsyncLimits, Limits
from stillroom.limits.probe import LimitsProbe
from stillroom.limits.reservation import Reservation
from stillroom.limits.routes import Route, Routes

__all__ = [
    "API",
    "AUTH",
    "DEFAULT",
    "STATIC",
    "AsyncLimits",
    "Change",
    "Decision",
    "Limit",
    "Limits",
    "LimitsBody",
    "LimitsProbe",
    "Reservation",
    "Route",
    "Routes",
    "Standing",
]
