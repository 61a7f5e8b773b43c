"""pytest-celery on images that were built here: a worker of the image under test, and a Redis of its own.

The plugin is not loaded by its entry point (`-p no:celery` in pyproject.toml): its fixtures would hide ours
everywhere. What is asked of it differently here:

- ports of containers are those the engine publishes, also where the tests themselves run in a container;
- the images are ours and the ones that are there: nothing is built from PyPI or pulled behind our back;
- Redis is the broker, and there is no result backend: no task of ours has a result.
"""

from __future__ import annotations

from typing import Any

import pytest
from pytest_celery import *  # noqa: F403
from pytest_celery import CELERY_REDIS_BROKER, CeleryWorkerContainer
from pytest_docker_tools import container, fxtr, wrappers
from pytest_docker_tools.plugin import *  # noqa: F403

from tests.support.swarm import REDIS, build_image, image_of, require_engine

wrappers.container.tests_inside_container = lambda: False


class Worker(CeleryWorkerContainer):  # type: ignore[misc]
    """A worker of the image with the command of stack.yml for both queues."""

    @classmethod
    def command(cls, *args: str, **_: Any) -> list[str]:
        return ["celery", "-A", "stillroom_workers", "worker", "--without-gossip", "-l", "INFO"]

    @classmethod
    def initial_env(cls, celery_worker_cluster_config: dict[str, Any], initial: Any = None) -> Any:
        (url,) = celery_worker_cluster_config["celery_broker_cluster_config"]["urls"]
        return {
            "REDIS_URL": url,
            "STILLROOM_LOADERS": "shop",
            "STILLROOM_SESSION_PEPPERS": "a-pepper-for-tests-long-enough-to-be-one",
        }


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    """Skip where no engine answers, before the plugin's client fails and leaves a socket open."""
    require_engine()


@pytest.fixture(scope="session")
def stillroom_image() -> str:
    return build_image()


@pytest.fixture
def default_worker_container_cls() -> type[Worker]:
    return Worker


default_worker_container = container(
    image="{stillroom_image}",
    environment=fxtr("default_worker_env"),
    network="{default_pytest_celery_network.name}",
    wrapper_class=Worker,
    timeout=60,
    command=fxtr("default_worker_command"),
)


@pytest.fixture
def default_redis_broker_image(stillroom_image: str) -> str:
    return image_of(REDIS)


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def celery_backend_cluster() -> None:
    """Use no result backend: tasks write down their results and nobody fetches any."""
