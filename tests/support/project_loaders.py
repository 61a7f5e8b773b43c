"""Loaders that call tasks of their project, or of none."""

from __future__ import annotations

import os

from stillroom import AsyncStillroom, Stillroom

# early, late (Django imports tasks when an app is ready), or orphaned
HOW = os.environ["PROJECT_TASKS"]

if HOW != "orphaned":
    import tests.support.project
if HOW == "early":
    import tests.support.project_tasks  # noqa: F401

room = Stillroom()
async_room = AsyncStillroom()


@room.cache.cached("page:{id}", ttl=60, swr=600, name="page")
def page(id: int) -> int:
    _tell(f"page {id}")
    return os.getpid()


@async_room.cache.cached("async-page:{id}", ttl=60, swr=600, name="async_page")
async def async_page(id: int) -> int:
    _tell(f"async page {id}")
    return os.getpid()


@room.cache.cached("price:{id}", ttl=60, swr=600, name="price")
def price(id: int) -> int:
    from tests.support import project

    return int(project.price.delay(id).get(timeout=20))


def _tell(text: str) -> None:
    if HOW == "orphaned":
        from celery import shared_task

        shared_task(lambda text: None, name="project.tell").delay(text)
    else:
        from tests.support.project_tasks import tell

        tell.delay(text)
