"""deploy/compose.yml starts as its first lines say, does the work of workers, and stops in time."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shop.demo.browser import Browser
from stillroom.embedded import free_port
from tests.support.processes import run_to_end
from tests.support.swarm import IMAGE, PYTHON, REDIS, ROOT, docker, image_of, require_engine, until

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(600)]

PROJECT = "stillroom-compose-test"
FILE = ROOT / "deploy/compose.yml"
SERVICES = {"redis", "web", "worker"}
STARTS_WITHIN = 90.0  # seconds


def compose() -> list[str]:
    """Return the command: the plugin of Docker, or the program that was there before. Skip where neither is."""
    if shutil.which("docker") and docker("compose", "version", check=False):
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor docker-compose is installed")


def first_lines() -> list[str]:
    """Return the commands that the file begins with."""
    found = re.findall(r"^#   (\w.*?)(?:  +#.*)?$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in found] == ["docker", "sudo", "docker", "docker"]
    return found


class Machine:
    """A folder with the file and its secrets, and what runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._compose = compose()
        text = FILE.read_text(encoding="utf-8")
        if self._compose == ["docker-compose"]:  # it knows no name in the file, and all else of it
            text = text.replace("\nname: stillroom\n", "\n")
        (folder / "deploy").mkdir()
        (folder / "deploy/compose.yml").write_text(text, encoding="utf-8")
        self.environment = os.environ | {
            "STILLROOM_IMAGE": IMAGE,
            "REDIS_IMAGE": image_of(REDIS),
            "WEB_ADDRESS": f"127.0.0.1:{self.port}",
            "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0"),
        }

    def type(self, line: str) -> str:
        """Type a line of the file's beginning. The names are the test's own, and root needs no sudo."""
        line = line.replace("stillroom:0.1.0", IMAGE).removeprefix("sudo ")
        line = line.replace(
            "docker build", f"docker build --build-arg PYTHON_IMAGE={image_of(PYTHON)}"
        )
        line = line.replace("docker compose", shlex.join([*self._compose, "-p", PROJECT]))
        folder = ROOT if line.startswith("docker build") else self.folder
        done = run_to_end(["bash", "-c", line], cwd=folder, env=self.environment, timeout=200)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def told(self, words: str) -> str:
        """Run `docker compose … words` as the last of the first lines does."""
        up = first_lines()[-1]
        return self.type(up.replace("up --detach", words))

    def state(self, service: str) -> dict[str, Any]:
        """Return what the engine says of the container of a service."""
        labels = (f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}")
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        (container,) = docker("ps", "--all", "--quiet", *filters).split()
        found: dict[str, Any] = json.loads(docker("inspect", container))[0]["State"]
        return found

    def is_healthy(self) -> bool:
        return all(self.state(one)["Health"]["Status"] == "healthy" for one in SERVICES)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Start everything by the file's first lines, from nothing."""
    require_engine()
    if os.geteuid():
        pytest.skip("secrets are given to another user, which takes root")
    machine = Machine(tmp_path_factory.mktemp("compose"))
    try:
        for line in first_lines():
            machine.type(line)
        yield machine
    finally:
        machine.told("down --volumes --timeout 10")


def test_it_starts_works_stops_and_starts_again(machine: Machine) -> None:
    """A worker refreshes and carries out an order, a stop ends all services, and sessions outlive it."""
    until(machine.is_healthy, "all services to be healthy", STARTS_WITHIN)
    with Browser(machine.port) as browser:

        def loaded(page: str) -> float:
            reply = browser.get(page)
            assert reply.status == 200
            return float(json.loads(reply.text)["loaded"])

        stock, product = loaded("/stock/7"), loaded("/product/7")
        until(lambda: loaded("/stock/7") > stock, "a refresh by the worker", 30)
        assert loaded("/product/7") == product
        assert browser.ask("POST", "/order/7").status == 202
        until(lambda: loaded("/product/7") > product, "the order to be carried out", 30)
        bearer = (machine.folder / "secrets/health_token").read_text()
        status = browser.ask("GET", "/health", {"Authorization": f"Bearer {bearer}"})
        assert '"checks"' in status.text
        session = {"X-Session": browser.ask("POST", "/login").text.strip('"')}
    machine.told("stop")
    codes = {service: machine.state(service)["ExitCode"] for service in SERVICES}
    assert codes == dict.fromkeys(SERVICES, 0)
    machine.told("up --detach")
    until(machine.is_healthy, "all services to be healthy", STARTS_WITHIN)
    with Browser(machine.port) as browser:
        assert browser.ask("GET", "/me", session).text == '"u1"'
