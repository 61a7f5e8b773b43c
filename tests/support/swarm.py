"""A real Docker engine, the image, and the stack on a Swarm of one node."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom.cli.credentials import write_secrets
from tests.support import celery_process
from tests.support.processes import run_to_end

ROOT = Path(__file__).parents[2]
STACK = "stillroom-test"
IMAGE = "stillroom:test"
TRAEFIK = f"{STACK}-public"
REDIS_PORT, CACHE_PORT, FLOWER_PORT = 26_379, 26_380, 25_555  # stack.test.yml
FILES = (ROOT / "stack.yml", ROOT / "tests/stack/stack.test.yml")
COPIED = (*FILES, ROOT / "stack.ha.yml", ROOT / "tests/stack/stack.ha.test.yml")
# Where no registry can be reached, what stands in for the official images is called so.
PYTHON, REDIS = "python:3.13-slim", "redis:7.2.14-alpine"
STAND_INS = {PYTHON: "local/python:3.13-slim", REDIS: "local/redis:7"}
HEALTHY_WITHIN = 180.0  # seconds, on a machine that runs other tests meanwhile
UPDATED_WITHIN = 300.0
REMOVED_WITHIN = 90.0


def until(
    condition: Callable[[], Any], what: str, within: float = celery_process.PATIENCE_S
) -> Any:
    """Wait until the condition is true; fail with `what` at the deadline (seconds).

    A look is a command of Docker: without a pause the looks alone keep a CPU busy for as long as the Swarm takes.
    """
    return celery_process.until(condition, what, within, pause=0.5)


def docker(*words: str, check: bool = True, **environment: str) -> str:
    """Return what `docker …` prints."""
    done = run_to_end(
        ["docker", *words],
        env={**os.environ, "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0")} | environment,
        timeout=300,
    )
    assert done.returncode == 0 or not check, f"docker {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def require_engine() -> None:
    """Skip the test where no engine answers."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if not docker("version", "--format", "{{.Server.Version}}", check=False):
        pytest.skip("no Docker engine answers; DOCKER_HOST names one")


def image_of(name: str) -> str:
    """Return an official image, or its substitute here."""
    stand_in = STAND_INS[name]
    return stand_in if docker("image", "ls", "--quiet", stand_in) else name


def build_image() -> str:
    """Build the image as anybody builds it; return its name."""
    base = image_of(PYTHON)
    docker("build", "--quiet", "--build-arg", f"PYTHON_IMAGE={base}", "--tag", IMAGE, str(ROOT))
    return IMAGE


def guide() -> dict[str, list[str]]:
    """Return the commands of each chapter of docs/operating.md."""
    text = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    chapters = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {
        chapter.partition("\n")[0]: re.findall(r"^\$ (.*)$", chapter, flags=re.MULTILINE)
        for chapter in chapters
    }


# The tests use other names, so that a real stack on this machine is left alone, and other files.
ADAPTED = {
    "stillroom:0.1.0": IMAGE,
    "traefik-public": f"{STACK}-another",
    "stillroom_": f"{STACK}_",
    "stack.yml stillroom": f"stack.yml --compose-file stack.test.yml {STACK}",
    "stack.ha.yml stillroom": "stack.ha.yml --compose-file stack.test.yml"
    f" --compose-file stack.ha.test.yml {STACK}",
    "services stillroom": f"services {STACK}",
    "stack deploy": "stack deploy --resolve-image never",
    "docker build": "docker build --build-arg PYTHON_IMAGE=$PYTHON_IMAGE",
}


class Swarm:
    """The stack, deployed from nothing, in a folder of its own that holds the secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secrets = folder, folder / "secrets"
        self.environment = {
            "STILLROOM_IMAGE": IMAGE,
            "REDIS_IMAGE": image_of(REDIS),
            "PYTHON_IMAGE": image_of(PYTHON),
            "REDIS_FSYNC": "always",  # servers are killed here, and nothing acknowledged may be lost
            "SECRETS_FOLDER": str(self.secrets),
            "SECRETS": "1",
            "TRAEFIK_NETWORK": TRAEFIK,
        }

    def deploy(self, **changes: str) -> None:
        """Run `docker stack deploy`, as in the guide; return when it is accepted."""
        self.environment |= changes
        files = [word for path in FILES for word in ("--compose-file", str(path))]
        docker("stack", "deploy", "--resolve-image", "never", *files, STACK, **self.environment)

    def type(self, command: str, folder: Path | None = None, **changes: str) -> str:
        """Type a command of the guide here or in another folder; return its output. It has to end well."""
        for ours, tests in ADAPTED.items():
            command = command.replace(ours, tests)
        self.environment |= changes
        if given := re.match(r"SECRETS=(\d+) ", command):
            self.environment["SECRETS"] = given[1]  # Docker keeps a secret as it is, under its name
        done = run_to_end(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=folder or self.folder,
            env={**os.environ, **self.environment},
            errors="replace",
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def services(self) -> dict[str, str]:
        """Return each service → "running/wanted"."""
        lines = docker("stack", "services", "--format", "{{.Name}} {{.Replicas}}", STACK)
        return {
            name.removeprefix(f"{STACK}_"): replicas.split()[0]
            for name, _, replicas in (line.partition(" ") for line in lines.splitlines())
        }

    def containers(self, service: str = "") -> list[str]:
        """Return the ids of the running containers of a service, or of all."""
        label = f"com.docker.swarm.service.name={STACK}_{service}"
        stack = f"com.docker.stack.namespace={STACK}"
        return docker("ps", "--quiet", "--filter", f"label={label if service else stack}").split()

    def await_healthy(self) -> None:
        """Wait until every service runs as many healthy containers as it should."""

        def all_there() -> bool:
            counts = [replicas.split("/") for replicas in self.services().values()]
            return bool(counts) and all(running == wanted for running, wanted in counts)

        until(all_there, f"healthy: {self.services()}", HEALTHY_WITHIN)

    def await_updates(self) -> None:
        """Wait until no update is under way; an update that was rolled back fails the test."""

        until(
            lambda: self.states() <= {"completed"} or any("roll" in s for s in self.states()),
            "updates",
            UPDATED_WITHIN,
        )
        assert self.states() <= {"completed"}

    def states(self, *services: str) -> set[str]:
        """Return the result of the last updates of these services, or of all."""
        names = [f"{STACK}_{service}" for service in services]
        names = names or docker("stack", "services", "--quiet", STACK).split()
        form = "{{with .UpdateStatus}}{{.State}}{{end}}"
        return set(docker("service", "inspect", "--format", form, *names).split())

    def kill(self, container: str) -> None:
        """Send SIGKILL, as the kernel does when memory is short."""
        docker("kill", "--signal", "KILL", container, check=False)

    def scale(self, **replicas: int) -> None:
        words = [f"{STACK}_{service}={count}" for service, count in replicas.items()]
        docker("service", "scale", "--detach", *words)

    def redis(self, port: int = REDIS_PORT) -> Any:
        """Return a client that looks, from outside."""
        password = (self.secrets / "ops_password").read_text()
        return redis.Redis(port=port, username="ops", password=password, decode_responses=True)

    def stillroom(self, service: str, *words: str) -> str:
        """Run `stillroom …` in a container of the service, as an operator types it."""
        return docker("exec", self.containers(service)[0], "stillroom", *words)

    def logs(self) -> str:
        """Return what every container has logged, ended ones included."""
        names = docker(
            "ps", "--all", "--quiet", "--filter", f"label=com.docker.stack.namespace={STACK}"
        )
        said = []
        for container in names.split():
            done = run_to_end(["docker", "logs", container], timeout=15)
            said.append(done.stdout + done.stderr)
        return "\n".join(said)


@contextmanager
def customers(seconds: float, products: int, at_once: int = 1) -> Iterator[Any]:
    """Give the shop customers for so long; yield a function that waits for the last and returns their record."""
    script = ROOT / "tests/stack/crowd.py"
    command = ["docker", "run", "--rm", "--network", TRAEFIK, "--volume", f"{script}:/crowd.py:ro"]
    command += [
        "--no-healthcheck",
        IMAGE,
        "python",
        "/crowd.py",
        str(seconds),
        str(products),
        str(at_once),
    ]
    crowd = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def report() -> dict[str, Any]:
        out, err = crowd.communicate(timeout=seconds + 150)
        assert crowd.returncode == 0, err
        told: dict[str, Any] = json.loads(out)
        print(told)
        return told

    with crowd:  # which closes its pipes
        try:
            yield report
        finally:
            crowd.kill()


@contextmanager
def swarm_with_stack(
    folder: Path, deploy: Callable[[Swarm], object] = Swarm.deploy
) -> Iterator[Swarm]:
    """Deploy the stack from nothing until it is healthy, and remove it without a trace afterwards."""
    for file in COPIED:
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    write_secrets(folder / "secrets")
    began = docker("info", "--format", "{{.Swarm.LocalNodeState}}") != "active"
    if began:
        docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    swarm = Swarm(folder)
    _remove_stack(swarm)  # one whose tests were stopped half-way
    docker("network", "create", "--driver", "overlay", "--attachable", TRAEFIK)
    try:
        deploy(swarm)
        swarm.await_healthy()
        yield swarm
    finally:
        _remove_stack(swarm)
        if began:
            docker("swarm", "leave", "--force")


def _remove_stack(swarm: Swarm) -> None:
    """Remove the stack with its network and volumes, as far as it is there."""
    docker("stack", "rm", STACK, check=False)  # "nothing found" is fine
    until(lambda: not swarm.containers(), "the end of all containers", REMOVED_WITHIN)
    own = f"label=com.docker.stack.namespace={STACK}"
    volumes = docker("volume", "ls", "--quiet", "--filter", own).split()
    _remove([("network", "rm", TRAEFIK), *(("volume", "rm", one) for one in volumes)])


def _remove(commands: Sequence[tuple[str, ...]]) -> None:
    """Remove it again and again, because containers that are just ending hold things for a moment."""
    for command in commands:
        until(
            lambda command=command: "Error" not in _tried(*command),
            " ".join(command),
            REMOVED_WITHIN,
        )


def _tried(*words: str) -> str:
    """Return "Error" if the command failed for another reason than that there is nothing to remove."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    is_gone = re.search("no such|not found", done.stderr, re.IGNORECASE)
    return "" if done.returncode == 0 or is_gone else "Error"
