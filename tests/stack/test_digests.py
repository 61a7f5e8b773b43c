"""Images are pinned by their digest through one variable for each, and the guide's commands read the digest."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from tests.support.registry import registry
from tests.support.swarm import ROOT, docker, guide, require_engine

CHAPTER = "Images by digest"
VARIABLES = {"STILLROOM_IMAGE", "REDIS_IMAGE"}
FILES = ("stack.yml", "stack.ha.yml", "stack.local.yml", "deploy/compose.yml")


@pytest.mark.parametrize("name", FILES)
def test_each_image_has_one_variable(name: str) -> None:
    """No file names an image but through its variable, with a tag as the default and no digest that gets old."""
    text = (ROOT / name).read_text(encoding="utf-8")
    images = re.findall(r"^\s*image: *(.*)$", text, re.MULTILINE)
    for image in images:
        found = re.fullmatch(r"\$\{(\w+):-[a-z]+:[\w.-]+\}", image)
        assert found, image
        assert found[1] in VARIABLES
    assert images or name == "stack.local.yml"


def test_the_images_base_has_an_argument() -> None:
    """The Dockerfile builds every stage on the base that its argument names."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON_IMAGE=python:[\w.-]+$", text, re.MULTILINE)
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.MULTILINE)
    names = {name for _, name in stages}
    assert {base for base, _ in stages} <= {"${PYTHON_IMAGE}", "$PYTHON_IMAGE"} | names


@pytest.fixture
def pushed() -> Iterator[str]:
    """Push a small image to a registry; yield its name with the tag."""
    require_engine()
    with registry() as address:
        name = f"{address}/stillroom-digest-test:1"
        small = io.BytesIO()
        with tarfile.open(fileobj=small, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("empty"))
        subprocess.run(
            ["docker", "import", "-", name], input=small.getvalue(), check=True, capture_output=True
        )
        docker("push", "--quiet", name)
        docker("image", "rm", name)
        try:
            yield name
        finally:
            left = docker("image", "ls", "--quiet", name.rpartition(":")[0])
            docker("image", "rm", "--force", *left.split(), check=False)


@pytest.mark.docker
def test_the_guides_commands_read_a_digest_that_an_engine_takes(pushed: str) -> None:
    """What the guide's command prints names the image that was pushed, whatever its tag means by now."""
    pull, read, *_ = guide()[CHAPTER]
    for command in (pull, read):
        assert "redis:7.2.14-alpine" in command
    typed = [command.replace("redis:7.2.14-alpine", pushed) for command in (pull, read)]
    done = subprocess.run(
        ["bash", "-c", "; ".join(typed)], capture_output=True, text=True, check=True, timeout=120
    )
    pinned = done.stdout.split()[-1]
    assert re.fullmatch(re.escape(pushed.rpartition(":")[0]) + r"@sha256:[0-9a-f]{64}", pinned)
    first = docker("image", "inspect", "--format", "{{.Id}}", pushed)
    docker("image", "rm", pushed, pinned, check=False)
    docker("pull", "--quiet", pinned)
    assert docker("image", "inspect", "--format", "{{.Id}}", pinned) == first
