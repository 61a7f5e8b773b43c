"""The commands of docs/operating.md work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from stillroom.cli.credentials import names
from stillroom.settings import environment_names
from tests.support.swarm import ROOT, guide

STACK_FILE, HA_FILE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("stack.yml", "stack.ha.yml")
)


def test_no_chapter_tells_what_to_do_only_in_words() -> None:
    """Each chapter of the guide has commands, which test_swarm.py, test_digests.py or test_systemd.py runs."""
    assert {chapter for chapter, found in guide().items() if found} == {
        "Deploy",
        "Images by digest",
        "Secrets",
        "Scale",
        "Three servers",
        "Look",
        "Dead letters",
        "Back up",
        "Restore",
        "Without a Swarm",
    }


def test_the_stack_has_every_secret_it_needs() -> None:
    """Each secret of the stack is declared once, given to a service, and made by `stillroom secrets`."""
    declared = declared_in(STACK_FILE)
    made = {*names(), "users_acl", "abuse_rules"} - FOR_THREE
    assert declared <= made
    assert made - declared == {"ops_password", "producer_password"}  # for people and other apps
    for name in declared:
        assert re.search(rf"(source: {name}\b|\[{name}\])", STACK_FILE), name


def declared_in(text: str) -> set[str]:
    return set(re.findall(r"^  (\w+): \{name: \"stillroom_\w+_\$\{SECRETS", text, re.MULTILINE))


FOR_THREE = {"replica_password", "sentinel_password", "watch_password"}


def test_three_servers_have_every_secret_they_need() -> None:
    """stack.ha.yml adds the passwords of replicas and Sentinels, and gives that of `watch` to everybody."""
    declared = declared_in(HA_FILE)
    assert declared == FOR_THREE | {"sentinels_acl", "redis_member", "redis_sentinel"}
    assert set(names()) >= FOR_THREE
    assert HA_FILE.count("secrets: [*watch]") == 4  # web, workers, beat, Flower


@pytest.mark.parametrize("name", ["stack.yml", "stack.ha.yml", "deploy/compose.yml"])
def test_each_setting_in_the_files_is_one(name: str) -> None:
    """Each variable of Stillroom that a file gives to a container is a setting of this version."""
    text = (ROOT / name).read_text(encoding="utf-8")
    given = set(re.findall(r"^ +(STILLROOM_\w+|REDIS_URL|REDIS_PASSWORD\w*):", text, re.MULTILINE))
    known = set(environment_names().values())
    assert given
    assert {one.removesuffix("_FILE") for one in given} <= known


def test_the_workers_post_what_they_find_where_the_shell_says() -> None:
    """WEBHOOK_URL in the shell that deploys reaches the workers, and no other container."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    done = subprocess.run(
        ["docker", "stack", "config", "--compose-file", "stack.yml"],
        cwd=ROOT,
        env={**os.environ, "WEBHOOK_URL": "https://chat.example/x", "WEBHOOK_SECRET": "s" * 16},
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not a docker command" in done.stderr:
        pytest.skip("this docker has no `stack config`")
    (text,) = re.findall(r"^services:\n((?: .*\n)+)", done.stdout, re.MULTILINE)
    services = re.split(r"^  (?=\w[\w-]*:$)", text, flags=re.MULTILINE)
    told = {one.partition(":")[0] for one in services if "https://chat.example/x" in one}
    assert told == {"refresh", "maintenance"}
    assert {one.partition(":")[0] for one in services if "s" * 16 in one} == told


@pytest.mark.parametrize(
    "files",
    [
        ["stack.yml"],
        ["stack.yml", "stack.local.yml"],
        ["stack.yml", "stack.ha.yml"],
        ["stack.yml", "stack.ha.yml", "stack.local.yml"],
    ],
)
def test_docker_reads_the_stack_with_nothing_edited(files: list[str]) -> None:
    """`docker stack config` reads the stack without a set variable or an edited file."""
    words = [word for file in files for word in ("--compose-file", file)]
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    done = subprocess.run(
        ["docker", "stack", "config", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "is not a docker command" in done.stderr:
        pytest.skip("this docker has no `stack config`")
    assert done.returncode == 0, done.stderr
    assert "redis:7.2.14-alpine" in done.stdout
