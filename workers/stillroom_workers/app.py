"""The Celery app of the workers: every setting with its reason."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import Celery
from kombu import Queue

from stillroom import Settings, Stillroom
from stillroom.dispatch import broker_tls, sent_now
from stillroom.keys import Keys
from stillroom_workers.lifecycle import attend, open_room
from stillroom_workers.schedule import beat_schedule
from stillroom_workers.spans import tell_of_tasks
from stillroom_workers.tasks import abuse, health, invalidation, marks, refresh, sessions, warm


class StillroomCelery(Celery):
    """A Celery app with a room."""

    settings: Settings

    @cached_property
    def room(self) -> Stillroom:
        """The room of this process, with the apps' loaders. Beat and Flower never ask for it."""
        return open_room(self.settings)

    def task(self, *args: Any, **options: Any) -> Any:
        """Not shared with other apps of this process: each has tasks that work on its own room."""
        return super().task(*args, **{"shared": False} | options)

    def send_task(self, *args: Any, **options: Any) -> Any:
        """With the time it is sent, which Celery's messages lack: beat's ticks come this way too."""
        headers = {**sent_now(), **(options.get("headers") or {})}
        return super().send_task(*args, **options | {"headers": headers})


def make_app(settings: Settings | None = None) -> StillroomCelery:
    """The app for worker, beat and Flower. Settings come from the environment unless given."""
    settings = settings or Settings()
    guards = "stillroom_workers.guards"
    app = StillroomCelery(
        "stillroom", broker=settings.broker, amqp=f"{guards}:AMQP", set_as_current=False
    )
    app.conf.worker_consumer = f"{guards}:Consumer"
    app.settings = settings
    app.conf.update(configuration(settings))
    for module in (refresh, invalidation, marks, warm, sessions, abuse, health):
        module.register(app)
    attend(app, settings)
    tell_of_tasks(app)
    return app


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings for a process of ours."""
    keys = Keys(settings.namespace)
    refresh_queue, maintenance_queue = keys.queue("refresh"), keys.queue("maintenance")
    return {
        # Two queues: a refresh is short and someone waits for it; maintenance is bulk, in bites.
        "task_queues": [Queue(refresh_queue), Queue(maintenance_queue)],
        "task_default_queue": maintenance_queue,
        "task_routes": {"stillroom.refresh*": {"queue": refresh_queue}},
        "beat_schedule": beat_schedule(maintenance_queue),
        "beat_scheduler": "stillroom_workers.beat:Scheduler",
        "beat_max_loop_interval": 5.0,  # seconds: its sign of life may be no older than a health check allows
        # JSON and nothing else: whoever can write to the broker must not be able to run code here.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
        # No results are kept: what a task did is in Redis, in the log, and in Flower's events.
        "task_ignore_result": True,
        "result_expires": None,  # else beat adds a daily clean-up of the results that do not exist
        # The work waits on Redis and on loaders; threads stop in half a second, prefork has hung.
        "worker_pool": "threads",
        "worker_concurrency": settings.worker_threads,
        # Held messages are what a crash or a restart delays: hold one per thread, no more.
        "worker_prefetch_multiplier": 1,
        # Acknowledged when done, so that a killed worker's work comes back. Each task is safe twice.
        "task_acks_late": True,
        "task_acks_on_failure_or_timeout": True,
        "task_reject_on_worker_lost": False,  # its own crash would be redelivered for ever
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # they can finish; the lease decides
        # No time limits by signal: one would land in the middle of a Redis reply. Calls have deadlines.
        "task_soft_time_limit": None,
        "task_time_limit": None,
        # A worker waits for its broker for ever: it has nothing else to do, and its health check tells.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": transport_options(settings),
        "broker_use_ssl": broker_tls(settings),
        # Logs are ours: the CLI, Docker and pytest each want them their way.
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "task_repr_maxlevels": 1,
        # Flower reads events; a task's start is one of them.
        "task_track_started": True,
        "worker_send_task_events": True,
    }


def transport_options(settings: Settings) -> dict[str, Any]:
    """kombu's Redis transport: it has no deadlines of its own."""
    return {
        # Longer than any task: what a killed worker held comes back after it, within seconds.
        "visibility_timeout": 3_600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # Both together: a link cut off without a word is noticed in 10 to 12 s, with either alone in 30 or more.
        "socket_timeout": 5,
        "health_check_interval": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "client_name": f"{settings.namespace}-worker",
        "set_aside_key": Keys(settings.namespace).aside,
    }
