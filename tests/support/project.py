"""A project with a plain Celery app of its own, which knows nothing of Stillroom."""

from __future__ import annotations

import os

from celery import Celery

import redis

app = Celery("project", broker=os.environ["PROJECT_BROKER"], backend=os.environ["PROJECT_BROKER"])
app.conf.update(
    broker_transport_options={"visibility_timeout": 12 * 3600},  # its ETAs are hours ahead
    task_default_queue="project",
    task_ignore_result=True,
)
note = redis.Redis.from_url(os.environ["PROJECT_BROKER"])


@app.task(name="project.mail")
def mail(text: str) -> None:
    note.rpush("project:mails", text)


@app.task(name="project.price", ignore_result=False)
def price(id: int) -> int:
    return id
