"""The Celery app of the workers: every setting with its reason."""

from __future__ import annotations

import logging
import threading
from functools import cached_property, wraps
from typing import Any

from kombu import Exchange, Queue

from stillroom import Settings, Stillroom
from stillroom.broker import broker_tls, is_amqp, kept_alive, own_names, sent_now, sentinel_options
from stillroom.dispatch import CeleryDispatch
from stillroom.keys import Keys
from stillroom.own_celery import OwnCelery, read_no_options
from stillroom_workers.contained import contained
from stillroom_workers.letters import Letters
from stillroom_workers.lifecycle import attend, open_room
from stillroom_workers.neighbour import Neighbour, Registry
from stillroom_workers.results import results_configuration, sparing
from stillroom_workers.schedule import beat_schedule
from stillroom_workers.spans import tell_of_tasks
from stillroom_workers.tasks import abuse, health, invalidation, marks, refresh, sessions, warm
from stillroom_workers.worker import Worker

log = logging.getLogger("stillroom.workers")

# With so many tasks waiting beat adds none: the other half of the places is for orders.
TICKS_LIMIT = CeleryDispatch.queue_limit // 2
DJANGO = "celery.fixups.django:fixup"  # calls django.setup() where DJANGO_SETTINGS_MODULE is set


class StillroomCelery(OwnCelery):
    """A Celery app with a room."""

    registry_cls = Registry
    amqp_cls = "stillroom_workers.connections:AMQP"
    control_cls = "stillroom_workers.control:Control"
    log_cls = "stillroom_workers.logs:Logging"
    task_cls = "stillroom_workers.tasks.base:Task"

    def __init__(self, settings: Settings) -> None:
        super().__init__(broker=settings.broker, fixups={DJANGO})
        self.settings = settings
        self.neighbour = Neighbour(self)
        self.letters = Letters(self)
        self.threads = settings.worker_threads  # at most, of this worker: it may be told others
        self.failed = 0  # tasks of this worker, in whatever process they ran
        self.withholds_ticks = False
        self.asked_to_reclaim = threading.Event()  # by a task that found no place

    @cached_property
    def room(self) -> Stillroom:
        """Return the room of this process, with the apps' loaders. Beat and Flower never ask for it."""
        return open_room(self.settings)

    @property
    def user_options(self) -> Any:
        """Return further options of Celery's command, which asks the app that it runs before it reads its own."""
        read_no_options()
        return self._user_options

    @user_options.setter
    def user_options(self, options: Any) -> None:
        self._user_options = options

    @cached_property
    def places_to_reclaim(self) -> threading.Semaphore:
        """Return the places for runs of reclaim: half of the threads. A run takes up to 20 s, and while work is due
        each run and each tick begins another: what else is scheduled, and refreshes, would wait behind them all."""
        return threading.Semaphore(max(1, self.threads // 2))

    @cached_property
    def Worker(self) -> Any:  # noqa: N802  # Celery's name
        """Return the worker program that `celery worker` runs."""
        return self.subclass_with_self(Worker)

    def _get_backend(self) -> Any:
        return sparing(super()._get_backend())

    def task(self, body: Any, **options: Any) -> Any:
        """Make a task. It is not shared with other apps of this process: each has tasks that work on its own room.

        While it runs, the project's Celery app is the current one: loaders may call the project's tasks.

        It is made at once. Stock shares each task that is made later where FORKED_BY_MULTIPROCESSING is set, as it
        is in processes that a spawned worker starts: this app would have none, and every order be a dead letter.
        """

        @wraps(body)
        def run(*args: Any, **fields: Any) -> Any:
            with self.neighbour.at_home(), contained():
                return body(*args, **fields)

        return super().task(run, **{"shared": False, "lazy": False} | options)

    def queue_of(self, task: str) -> str:
        """Return the queue that a task of ours goes to."""
        return str(self.amqp.router.route({}, task)["queue"].name)

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task with the time it is sent, which Celery's messages lack: beat's ticks come this way too.

        They are the sign of life of beat, whatever scheduler it has: the broker took what was due. One of a task
        that is not ours is the project's: django-celery-beat has one table for both, and both beats read all of it.
        """
        headers = {**sent_now(), **(options.get("headers") or {})}
        is_tick = headers.get("celery_beat_task")
        if is_tick and name not in self.tasks:
            return None
        sent = None
        if not (is_tick and self._withholds(options.get("queue"), options.get("producer"))):
            sent = super().send_task(name, *args, **options | {"headers": headers})
        if is_tick:
            self.signs.of_beat()
        return sent

    def _withholds(self, queue: Any, producer: Any) -> bool:
        """Return whether so many tasks wait in Redis that no tick is sent. RabbitMQ drops ticks that have expired.

        Redis keeps them until a worker takes them: of a beat without workers it would be full within days.
        """
        before = self.withholds_ticks
        try:
            with producer.channel.conn_or_acquire() as client:
                self.withholds_ticks = client.llen(queue) >= TICKS_LIMIT
        except Exception:  # another broker, or one that is away: sending tells, and tries again
            self.withholds_ticks = False
        if self.withholds_ticks and not before:
            log.error(
                "%s tasks or more wait in %s: too few workers take from it. Ticks are sent when there are fewer",
                f"{TICKS_LIMIT:,}",
                queue,
            )
        return self.withholds_ticks


def make_app(settings: Settings | None = None) -> StillroomCelery:
    """Return the app for worker, beat and Flower. Settings come from the environment unless given."""
    settings = settings or Settings()
    app = StillroomCelery(settings)
    app.conf.update(configuration(settings))
    app.conf.broker_transport_options["undeliverable"] = app.letters.bury
    for module in (refresh, invalidation, marks, warm, sessions, abuse, health):
        module.register(app)
    attend(app, settings)
    tell_of_tasks(app)
    return app


def configuration(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings for a process of ours."""
    keys = Keys(settings.namespace)
    refresh_queue, maintenance_queue = keys.queue("refresh"), keys.queue("maintenance")
    return {
        **own_names(settings),
        "worker_consumer": "stillroom_workers.worker:Consumer",
        # Two queues: a refresh is short and someone waits for it; maintenance is bulk, in bites. Each has
        # an exchange and a key of its own. Celery's default is one exchange for all: an order sent to it
        # comes out of both.
        "task_queues": [_queue(settings, name) for name in (refresh_queue, maintenance_queue)],
        "task_default_queue": maintenance_queue,
        "task_routes": {"stillroom.refresh*": {"queue": refresh_queue}},
        "beat_schedule": beat_schedule(maintenance_queue),
        "beat_scheduler": "stillroom_workers.beat:Scheduler",
        # Which deletes what its app's schedule does not name: by default another app's.
        "redbeat_key_prefix": f"{keys.redbeat}:",
        "beat_max_loop_interval": 5.0,  # seconds: its sign of life may be no older than a health check allows
        # JSON and nothing else: whoever can write to the broker must not be able to run code here.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
        **results_configuration(settings),
        "worker_pool": None,  # see worker.py: with a pool here `celery worker -P prefork` runs that one
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
        # Seconds between signs of life that RabbitMQ and a worker give each other: two of them missing are a lost
        # connection. Celery's default comes to a minute, and a worker that was deaf looked alive for over two. Not
        # shorter: with `-P solo` a task of twenty seconds gives none.
        "broker_heartbeat": 20.0,
        # RabbitMQ takes a channel away from a worker that has had an order for longer than half an hour, be it that
        # its time has not come. Stock ends then, and so does the next worker that takes the order. On Redis this
        # setting would hide that a right is missing.
        "broker_channel_error_retry": is_amqp(settings),
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


def _queue(settings: Settings, name: str) -> Queue:
    """Return a queue that RabbitMQ keeps on most of its nodes, where that is the broker. Redis has one kind of
    lists.
    """
    kind = {"x-queue-type": "quorum"} if is_amqp(settings) else None
    exchange = Exchange(name, type="direct")
    return Queue(name, exchange, routing_key=name, queue_arguments=kind)


def transport_options(settings: Settings) -> dict[str, Any]:
    """Return the options of kombu's transport, with deadlines: it has none of its own."""
    names: dict[str, Any] = own_names(settings)["broker_transport_options"]
    keys = Keys(settings.namespace)
    return names | {
        "own_queues": [keys.queue(kind) for kind in ("refresh", "maintenance")],
        # Longer than any task: what a killed worker held comes back after it, within seconds.
        "visibility_timeout": 3_600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # Both together: a link cut off without a word is noticed in 10 to 12 s, with either alone in 30 or more.
        "socket_timeout": 5,
        "health_check_interval": 5,
        "socket_connect_timeout": 2,
        **kept_alive(),
        "client_name": f"{settings.namespace}-worker",
        **sentinel_options(settings),
    }
