"""The example's README has commands that run as they stand, and its pages are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from shop.demo.browser import Browser
from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer, free_port
from tests.support.celery_process import until
from tests.support.shop import EXAMPLES

ROOT = EXAMPLES.parent
README = (EXAMPLES / "shop/README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]


def environment(redis_url: str, folder: Path) -> dict[str, str]:
    """Return what the README exports, with our Redis and a database for this test."""
    exported: dict[str, str] = {}
    for command in commands():
        if command.startswith("export "):
            script = f"{command} && env -0"
            done = subprocess.run(
                ["bash", "-c", script], capture_output=True, text=True, check=True, env=on_path({})
            )
            found = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
            exported |= {
                name: found[name] for name in re.findall(r"(\w+)=", command) if name in found
            }
    assert set(exported) >= {"REDIS_URL", "PYTHONPATH", "STILLROOM_LOADERS"}
    assert len(exported["STILLROOM_SESSION_PEPPERS"]) >= 32
    paths = [str(ROOT / exported["PYTHONPATH"]), *filter(None, sys.path)]
    return exported | {
        "REDIS_URL": redis_url,
        "PYTHONPATH": os.pathsep.join(paths),
        "SHOP_DATABASE": str(folder / "shop.db"),
    }


def on_path(changes: Mapping[str, str]) -> dict[str, str]:
    here = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}", **changes}


def test_the_parts_it_starts_by_hand_are_a_shop(tmp_path: Path) -> None:
    """gunicorn, worker and beat as the README starts them are a shop whose pages all answer."""
    programs = [
        shlex.split(line) for line in commands() if line.split()[0] in ("gunicorn", "celery")
    ]
    assert [words[0] for words in programs] == ["gunicorn", "celery", "celery"]
    port = free_port()
    programs[0][1:1] = ["--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    with EmbeddedServer() as server, (tmp_path / "log").open("w") as log:
        told = on_path(environment(server.url, tmp_path))
        running = [
            subprocess.Popen(words, cwd=tmp_path, env=told, stdout=log, stderr=log)
            for words in programs
        ]
        try:
            visit(port)
            with Stillroom(Settings(redis_url=server.url)) as room:
                until(lambda: has_worker(room), "the worker", within=60)
            assert all(program.poll() is None for program in running)
        finally:
            for program in running:
                program.terminate()
            for program in running:
                with suppress(subprocess.TimeoutExpired):
                    program.wait(20)
                program.kill()
                program.wait()


def has_worker(room: Stillroom) -> bool:
    tasks = room.health.check().tasks
    return tasks is not None and tasks.workers == 1


def visit(port: int) -> None:
    with Browser(port) as browser:
        until(lambda: browser.finds("/"), "the shop to open", within=60)
        browser.post("/login", name="admin", password="quince")
        rows = re.findall(r"^\| (`/.*?) \|", README, flags=re.MULTILINE)
        pages = [page for row in rows for page in re.findall(r"`(.*?)`", row)]
        assert len(pages) >= 8
        assert {page: browser.get(page).status for page in pages} == dict.fromkeys(pages, 200)


def test_the_make_targets_and_extras_it_names_are_there() -> None:
    """The make targets and the extra that the README names exist, and make passes ARGS on."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "-m shop.demo $(ARGS)" in makefile
    assert re.findall(r"'\.\[(\w+)\]'", README) == ["example"]
    assert "\nexample = [" in (ROOT / "pyproject.toml").read_text()


def test_it_is_short() -> None:
    """The README takes five minutes with its three files."""
    assert len(README.splitlines()) <= 40
