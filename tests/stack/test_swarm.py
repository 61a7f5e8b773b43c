"""The stack on a real Swarm of one node comes up, is updated under load, and outlives its failures."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from stillroom.cli.credentials import roles
from tests.support.swarm import (
    CACHE_PORT,
    FLOWER_PORT,
    IMAGE,
    ROOT,
    STACK,
    Swarm,
    build_image,
    customers,
    docker,
    guide,
    require_engine,
    swarm_with_stack,
    until,
)

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(600)]
OUR_SERVICES = {"web", "refresh", "maintenance", "beat", "flower"}
# While Redis or the broker is away a page is loaded, an order says 503, nobody can say whose session it is.
DEGRADED = {"order 503", "login 503", "me 503"}
GOOD = {"product 200", "stock 200", "order 202", "login 201", "me 200"}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Start one stack for all tests; each leaves it healthy."""
    require_engine()
    build_image()
    with swarm_with_stack(tmp_path_factory.mktemp("stack")) as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def healthy(swarm: Swarm) -> Iterator[None]:
    """Wait until the stack is healthy again."""
    yield
    swarm.await_healthy()


def flower(
    swarm: Swarm, path: str, *, anonymous: bool = False, method: str = "GET"
) -> tuple[int, str]:
    """Ask Flower; return (status, page)."""
    request = urllib.request.Request(f"http://127.0.0.1:{FLOWER_PORT}/{path}", method=method)
    if not anonymous:
        request.add_header("Authorization", f"Basic {login(swarm)}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def login(swarm: Swarm) -> str:
    return base64.b64encode(flower_login(swarm).encode()).decode()


def flower_login(swarm: Swarm) -> str:
    return (swarm.secrets / "flower_config").read_text().split('"')[1]


def assert_nothing_was_lost(told: dict[str, Any]) -> None:
    """Check that every request was answered as promised, every order carried out and nobody logged out."""
    assert set(told["answers"]) <= GOOD | DEGRADED, told
    assert all(told["answers"][answer] > 0 for answer in GOOD), told
    assert told["promised"] > 0
    assert told["broken"] == [], told
    assert told["logged out"] == 0, told


def test_it_comes_up_from_nothing(swarm: Swarm) -> None:
    """All services become healthy from nothing, without root, capabilities or anything to write to."""
    assert set(swarm.services()) == OUR_SERVICES | {"redis", "redis-cache"}
    for service in OUR_SERVICES:
        (found,) = json.loads(docker("inspect", swarm.containers(service)[0]))
        assert found["State"]["Health"]["Status"] == "healthy", service
        assert found["Config"]["User"] == "10001:10001", service
        assert found["HostConfig"]["ReadonlyRootfs"], service
        assert found["HostConfig"]["CapDrop"] == ["ALL"], service
    for service in ("redis", "redis-cache"):
        (found,) = json.loads(docker("inspect", swarm.containers(service)[0]))
        assert found["Config"]["User"] == "999", service
        assert found["HostConfig"]["ReadonlyRootfs"], service
        assert found["HostConfig"]["CapDrop"] == ["ALL"], service


def test_every_service_has_its_limits(swarm: Swarm) -> None:
    """Every service has limits of memory, CPU, processes and logs, a grace to stop in, and rules for updates."""
    names = docker("stack", "services", "--quiet", STACK).split()
    for service in json.loads(docker("service", "inspect", *names)):
        spec = service["Spec"]
        task, name = spec["TaskTemplate"], spec["Name"]
        limits, reserved = task["Resources"]["Limits"], task["Resources"]["Reservations"]
        assert limits["MemoryBytes"] > reserved["MemoryBytes"] > 0, name
        assert limits["NanoCPUs"] <= 1_000_000_000, name  # more than a node has is refused there
        assert limits["Pids"] > 0, name
        assert task["RestartPolicy"]["Condition"] == "any", name
        assert task["LogDriver"]["Options"]["max-size"] == "10m", name
        assert task["ContainerSpec"]["StopGracePeriod"] >= 30_000_000_000, name
        assert spec["UpdateConfig"]["Order"] == ("start-first" if "web" in name else "stop-first")


def test_the_server_knows_each_process_by_its_role(swarm: Swarm) -> None:
    """Only the stack's users are connected to the server and to the cache."""

    def users() -> set[str]:
        return {client["user"] for client in swarm.redis().client_list()}

    until(lambda: users() >= {"worker", "beat", "flower"}, "worker, beat and Flower", 30)
    assert users() <= {*roles()}
    assert swarm.redis().acl_log() == swarm.redis(CACHE_PORT).acl_log() == []


def test_tasks_flow_and_flower_shows_them(swarm: Swarm, tmp_path: Path) -> None:
    """A stale value has its task, and Flower shows the task's name and the worker's place."""
    with customers(6, 20) as report:
        assert_nothing_was_lost(report())
    until(
        lambda: "stillroom.refresh" in flower(swarm, "tasks/datatable?" + DATATABLE)[1],
        "the task",
        30,
    )
    until(
        lambda: "celery@stillroom-refresh-1" in flower(swarm, "workers")[1], "the worker's name", 30
    )
    of_the_loader = 'task="stillroom.refresh: stock"'
    until(
        lambda: of_the_loader in flower(swarm, "metrics")[1],
        "its figures, by the loader's name",
        30,
    )
    picture(swarm, "tasks", tmp_path / "tasks.png")


DATATABLE = "draw=1&start=0&length=10000&search[value]=&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"


def picture(swarm: Swarm, page: str, path: Path) -> None:
    """Take a picture of the page in Chromium, or skip quietly where there is none."""
    browser = shutil.which("chromium")
    if browser is None:
        return
    subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
            f"--user-data-dir={path.parent / 'browser'}",
            "--window-size=1400,900",
            "--virtual-time-budget=8000",
            f"--screenshot={path}",
            f"http://{flower_login(swarm)}@127.0.0.1:{FLOWER_PORT}/{page}",
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )
    assert path.stat().st_size > 20_000


def test_flower_is_closed_and_read_only(swarm: Swarm) -> None:
    """Flower shows no page without its password, and stops no worker with it."""
    assert flower(swarm, "tasks", anonymous=True)[0] == 401
    assert flower(swarm, "tasks")[0] == 200
    assert flower(swarm, "api/worker/shutdown/celery@stillroom-refresh-1", method="POST")[0] == 403


def test_no_secret_is_to_be_seen(swarm: Swarm) -> None:
    """No secret is in Docker's data on containers, services and image, in logs, or in Flower."""
    secrets = {
        word.strip('"')
        for path in swarm.secrets.iterdir()
        if path.name not in ("users.acl",)
        for word in path.read_text().split()
        if len(word) > 30
    } | {flower_login(swarm).partition(":")[2]}
    services = docker("stack", "services", "--quiet", STACK).split()
    seen = {
        "containers": docker("inspect", *swarm.containers()),
        "services": docker("service", "inspect", *services),
        "environment": "".join(docker("exec", one, "env") for one in swarm.containers()),
        "command lines": "".join(docker("top", one) for one in swarm.containers()),
        "image": docker("history", "--no-trunc", IMAGE) + docker("inspect", IMAGE),
        "logs": swarm.logs(),
        "Flower": "".join(
            flower(swarm, page)[1] for page in ("workers", "tasks", "broker", "metrics")
        ),
    }
    assert all(seen.values())
    assert len(secrets) > 8
    assert {place: s for place, text in seen.items() for s in secrets if s in text} == {}


def test_an_update_under_load_loses_nothing(swarm: Swarm) -> None:
    """A new image and a new password for the workers while customers shop, as the guide says it is done.

    Every request is answered, every order carried out. Redis restarts with its new list of users.
    """
    rotate, deploy, forget, deploy_without = guide()["Secrets"]
    docker("tag", IMAGE, f"{IMAGE}-next")
    old = (swarm.secrets / "worker_password").read_text()
    with customers(25, 200) as report:
        swarm.type(rotate)
        swarm.type(deploy, STILLROOM_IMAGE=f"{IMAGE}-next")
        swarm.await_updates()
        swarm.await_healthy()
        assert_nothing_was_lost(report())
    new = (swarm.secrets / "worker_password").read_text()
    assert old != new
    assert sha256(old.encode()).hexdigest() in (swarm.secrets / "users.acl").read_text()
    swarm.type(forget)
    assert sha256(old.encode()).hexdigest() not in (swarm.secrets / "users.acl").read_text()
    swarm.type(deploy_without)
    swarm.await_updates()


def test_what_the_guide_says_to_type_works(swarm: Swarm) -> None:
    """The guide's commands to build, look, back up and restore work."""
    init, build, secrets, network, _, services, state = guide()["Deploy"]
    assert init.startswith("docker swarm init")  # as swarm_with_stack has done
    swarm.type(build, folder=ROOT)
    swarm.type(secrets)
    swarm.type(network)
    docker("network", "rm", f"{STACK}-another")
    assert "maintenance" in swarm.type(services)
    assert swarm.type(state).strip() in {"", "completed"}
    look, read, change, ask = guide()["Look"]
    memory, invalidate, sessions = map(swarm.type, (look, change, ask))
    logs = swarm.type(f"{read} 2>&1")  # a terminal shows both
    swarm.type(*guide()["Dead letters"])
    assert "used_memory" in memory
    assert "stillroom." in logs
    assert "invalidated" in invalidate
    assert " sessions" in sessions
    (back_up,) = guide()["Back up"]
    swarm.stillroom("maintenance", "bans", "add", "203.0.113.7", "--for", "1h")
    swarm.type(back_up)
    assert "appendonlydir" in swarm.type("tar -tf redis-data.tar")
    swarm.stillroom("maintenance", "bans", "lift", "203.0.113.7")
    for command in guide()["Restore"]:
        swarm.type(command)
    swarm.await_healthy()
    until(lambda: "203.0.113.7" in swarm.stillroom("maintenance", "bans", "list"), "the backup", 30)


BROKEN = """
FROM {image}
COPY broken.py ./
"""


@pytest.mark.full
def test_workers_that_cannot_work_are_rolled_back(swarm: Swarm) -> None:
    """An image whose loaders raise takes no task, and Swarm rolls back without a loss."""
    folder = swarm.folder / "broken"
    folder.mkdir()
    (folder / "Dockerfile").write_text(BROKEN.format(image=IMAGE))
    (folder / "broken.py").write_text("import os\n\nos.environ['NOT_SET_ANYWHERE']\n")
    docker("build", "--quiet", "--tag", f"{IMAGE}-broken", str(folder))
    workers = ("refresh", "maintenance")
    with customers(20, 200) as report:
        swarm.deploy(STILLROOM_IMAGE=f"{IMAGE}-broken", STILLROOM_LOADERS="broken")
        until(lambda: swarm.states(*workers) == {"rollback_completed"}, "both rolled back", 150)
        swarm.await_healthy()
        assert_nothing_was_lost(report())
    assert "broken raised KeyError: 'NOT_SET_ANYWHERE' (/app/broken.py, line 3)" in swarm.logs()
    docker("tag", IMAGE, f"{IMAGE}-mended")
    swarm.deploy(STILLROOM_IMAGE=f"{IMAGE}-mended", STILLROOM_LOADERS="shop")
    swarm.await_updates()


@pytest.mark.full
def test_scaling_loses_nothing(swarm: Swarm) -> None:
    """Workers scaled 1 → 4 → 1 under load, and a second beat by mistake, lose nothing."""
    (scale,) = guide()["Scale"]
    with customers(12, 200) as report:
        for count in (1, 4, 1):
            swarm.type(scale.replace("=3", f"={count}"))
            swarm.scale(beat=min(count, 2))
            swarm.await_healthy()
        assert_nothing_was_lost(report())
    swarm.scale(maintenance=2, refresh=2)


def test_killed_containers_cost_nothing_that_was_promised(swarm: Swarm) -> None:
    """SIGKILL to one after the other under load: each comes back, and so does all that was acknowledged.

    A killed Redis has what it acknowledged in its file; a killed redis-cache is empty, and pages are loaded again.
    """
    with customers(30, 100) as report:
        for service in ("redis", "redis-cache", "web", "maintenance", "beat"):
            swarm.kill(swarm.containers(service)[0])
            time.sleep(1)
            swarm.await_healthy()
        assert_nothing_was_lost(report())


@pytest.mark.full
def test_ten_thousand_changes_outlive_twenty_killed_workers(swarm: Swarm) -> None:
    """Twenty killed workers lose none of ten thousand ordered changes, and nothing is left to do at the end."""
    swarm.scale(maintenance=4, refresh=4)
    swarm.await_healthy()
    with customers(30, 2_000, at_once=50) as report:
        for kill in range(20):
            service = ("maintenance", "refresh")[kill % 2]
            until(lambda service=service: swarm.containers(service), "a worker to kill")
            swarm.kill(random.choice(swarm.containers(service)))
            time.sleep(1.2)
        told = report()
    swarm.scale(maintenance=2, refresh=2)
    assert told["changes"] >= 10_000
    assert_nothing_was_lost(told)
    until(lambda: not swarm.redis(CACHE_PORT).zcard("stillroom:{0}:todo"), "an empty list", 90)
