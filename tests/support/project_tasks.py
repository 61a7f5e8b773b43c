"""Tasks of the project that belong to whatever Celery app is current, as its reusable parts write them."""

from __future__ import annotations

from celery import shared_task

from tests.support.project import note


@shared_task(name="project.tell")
def tell(text: str) -> None:
    note.rpush("project:told", text)
