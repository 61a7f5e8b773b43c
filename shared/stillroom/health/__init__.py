"""Health: what is the matter with Redis, the services and the workers, and what to do about it."""

from stillroom.health.body import SNAPSHOT_TASK, TICKS_OF_BEAT, WEBHOOK_TASK, HealthBody
from stillroom.health.crew import CrewProbe, PauseProbe
from stillroom.health.health import AsyncHealth, Health
from stillroom.health.probe import Probe
from stillroom.health.report import Advice, Report, Snapshot, WorkerStats
from stillroom.health.source import Source
from stillroom.health.tasks import TaskProbe

__all__ = [
    "SNAPSHOT_TASK",
    "TICKS_OF_BEAT",
    "WEBHOOK_TASK",
    "Advice",
    "AsyncHealth",
    "CrewProbe",
    "Health",
    "HealthBody",
    "PauseProbe",
    "Probe",
    "Report",
    "Snapshot",
    "Source",
    "TaskProbe",
    "WorkerStats",
]
