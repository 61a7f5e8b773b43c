"""A worker whose broker is behind Sentinels lives through a failover, and what was ordered is done."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stillroom import Settings, Stillroom
from stillroom.dispatch import sentinel_options
from tests.failover.conftest import UNHURRIED
from tests.support.celery_process import CeleryProcess, until
from tests.support.sentinels import MASTER, Sentinels

TASK = "stillroom.trim_marks"


def done(worker: CeleryProcess) -> int:
    return sum(f"Task {TASK}" in line and "succeeded" in line for line in worker.log.splitlines())


def ordered_until_done(room: Stillroom, worker: CeleryProcess, within: float) -> None:
    """Ask for work until some is done: a wake-up may be lost, what has to happen is written down."""
    before = done(worker)

    def asked() -> bool:
        room.dispatch.wake(TASK)
        time.sleep(0.2)
        return done(worker) > before

    until(asked, "a task", within)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("accident", ["killed", "frozen", "cut"])
def test_a_worker_goes_on_with_the_new_primary(
    sentinels: Sentinels, tmp_path: Path, accident: str
) -> None:
    """The same process, and the same room that orders work."""
    log, arguments = tmp_path / "worker.log", ("worker", "-l", "INFO", "-P", "threads")
    worker = CeleryProcess(log, {"REDIS_URL": sentinels.url}, *arguments)
    try:
        worker.await_line("ready.", 60)
        settings = Settings(redis_url=sentinels.url, **UNHURRIED)
        with Stillroom(settings) as room:
            ordered_until_done(room, worker, 30)
            with sentinels.accident(accident):
                sentinels.promote_another()
                ordered_until_done(room, worker, 60)
            ordered_until_done(room, worker, 60)
        assert worker.process.poll() is None
        assert worker.terminate() == 0
    finally:
        worker.kill()


def test_kombu_is_told_of_the_sentinels() -> None:
    """Their addresses are in its URL; the primary's name and their own login are options."""
    url = f"redis+sentinel://app:secret@s1:26379,s2:26380/{MASTER}/3"
    settings = Settings(redis_url=url, sentinel_user="watch", sentinel_password="canary")
    assert settings.broker == "sentinel://app:secret@s1:26379/3;sentinel://app:secret@s2:26380/3"
    options = sentinel_options(settings)
    assert options["master_name"] == MASTER
    assert options["sentinel_kwargs"]["username"] == "watch"
    assert options["sentinel_kwargs"]["password"] == "canary"
    assert sentinel_options(Settings(redis_url="redis://one")) == {}
