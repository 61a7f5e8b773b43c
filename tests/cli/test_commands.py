"""The `stillroom` command works as a person runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import stillroom
from shop.demo.browser import Browser
from stillroom import AUTH
from stillroom.cli import app
from stillroom.embedded import EmbeddedServer
from tests.support import nursery
from tests.support.celery_process import until
from tests.support.crowd import PATIENCE
from tests.support.processes import STILLROOM, attended, run_to_end

ROOT = Path(__file__).parents[2]
HEARD = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
DEMO = [sys.executable, "-m", "shop.demo"]
CHECKOUT = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}


def children_of_nobody(before: set[int]) -> list[str]:
    """Return the processes that appeared since and still live."""
    mine = psutil.Process().children(recursive=True)
    return [
        " ".join(p.cmdline())
        for p in mine
        if p.pid not in before and p.status() != psutil.STATUS_ZOMBIE
    ]


@contextmanager
def processes_end() -> Iterator[None]:
    """Check that no process that was started in here is alive afterwards."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    assert children_of_nobody(before) == []


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Check that no process of the test is alive afterwards."""
    with processes_end():
        yield


def tell(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return run_to_end([*DEMO, *options], env=CHECKOUT | PATIENCE | environment)


@pytest.fixture(scope="module")
def told() -> dict[str, subprocess.CompletedProcess[str]]:
    """Run the demo on an embedded server, and with the wire on one that is there."""
    with processes_end(), EmbeddedServer() as server:
        return {"embedded": tell(), "REDIS_URL": tell("-v", REDIS_URL=server.url)}


@pytest.mark.parametrize("where", ["embedded", "REDIS_URL"])
def test_the_demo_tells_its_four_steps_and_ends(told: Any, where: str) -> None:
    """The demo ends with exit code 0, and each step has a sentence, a line of code and what was seen."""
    done = told[where]
    assert done.returncode == 0, done.stdout + done.stderr
    text = re.sub(r"^ +# =>.*\n", "", done.stdout, flags=re.M)
    steps = re.findall(r"^\d\. (.+)\n   (.+?) +# (shop/\w+\.py):(\d+)\n   (.+)$", text, re.M)
    assert len(steps) == 4
    for sentence, code, file, line, _ in steps:
        assert sentence.endswith(".")
        there = (ROOT / "examples" / file).read_text().splitlines()[int(line) - 1]
        assert there.strip().startswith(code)
    said = [seen for *_, seen in steps]
    assert re.search(r"20 pages in [\d.]+ ms, 1 query", said[0])
    assert re.search(r"200 pages over HTTP, median [\d.]+ ms, no query", said[1])
    assert re.search(r"3.50 from before, and 3.99 after [\d.]+ ms: the worker", said[2])
    assert re.search(r"saved in [\d.]+ ms; .* the other process shows 2.75", said[3])
    assert "4 of 4 steps happened as told." in done.stdout
    assert where == "REDIS_URL" or "an embedded server" in done.stdout


def test_the_demo_speaks_to_who_has_never_seen_redis(told: Any) -> None:
    """Without -v the demo prints no command of Redis; it draws time, and ends with what to do next."""
    plain = told["embedded"].stdout
    assert "├──" in plain
    assert not re.search(r"# =>|EVALSHA|MGET", plain)
    _, _, after = plain.partition("What next:")
    for target in re.findall(r"make (\w+)", after):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    files = re.findall(r"^  ([\w/]+\.\w+) ", after, re.M)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_demo_prints_the_wire_where_it_is_asked_to(told: Any) -> None:
    """With -v each step is followed by the commands that Redis was sent."""
    said = told["REDIS_URL"].stdout
    for command in ("lease_load", "commit", "claim_refresh", "mark"):
        assert f"EVALSHA {command}" in said
    assert re.search(r"20\d x MGET", said)  # a refresh may ask as well


def test_the_demo_fails_where_a_step_does_not_happen(nothing_left: None) -> None:
    """With a server that takes no writes the story can't be told, and the exit code says so."""
    with EmbeddedServer(options={"maxmemory": "1"}) as server:
        done = tell(REDIS_URL=server.url)
    assert done.returncode == 1
    assert "0 of 4 steps happened as told." in done.stdout
    assert "What next" not in done.stdout


def test_the_demo_is_the_examples(tmp_path: Path) -> None:
    """A wheel has `stillroom up` and no demo, which it could not run."""
    package = tmp_path / "site/of/a/wheel"
    shutil.copytree(Path(stillroom.__file__).parent, package / "stillroom")
    done = run_to_end(
        [sys.executable, "-c", "from stillroom.cli import main; main()", "--help"],
        env=os.environ | {"PYTHONPATH": str(package)},
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert re.search(r"\bup\b", done.stdout)
    assert "demo" not in done.stdout


def test_the_shop_stays_open_until_ctrl_c(nothing_left: None) -> None:
    """`--serve` prints the addresses of shop, health and Flower, serves pages, and ends with code 0 on Ctrl-C."""
    port, flower = free_port(), free_port()
    program = [*DEMO, "--serve", "--port", str(port), "--flower-port", str(flower)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with attended(program, CHECKOUT | PATIENCE, **silent) as process:
        with Browser(port) as browser:
            until(lambda: browser.finds("/health/live"), "the shop to open", within=60)
            assert "Apricot jam" in browser.get("/").text
            assert browser.get("/status").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_up_runs_everything_until_ctrl_c(nothing_left: None, tmp_path: Path) -> None:
    """`stillroom up` runs worker, beat and Flower with one log, and Ctrl-C ends all with exit code 0.

    A file celery.py in the folder where it is started is not taken for Celery.
    """
    port = free_port()
    (tmp_path / "celery.py").write_text("1 / 0")
    command = [STILLROOM, "up", "--flower-port", str(port)]
    with attended(
        command, os.environ | {"PYTHONUNBUFFERED": "1"}, cwd=tmp_path, **HEARD
    ) as process:
        assert process.stdout is not None
        seen: list[str] = []
        wanted = [
            r"worker +\| .* ready\.",
            r"beat +\| .*beat: Starting",
            r"flower +\| .*Visit me at",
        ]
        for line in process.stdout:
            seen.append(line)
            if all(any(re.match(want, one) for one in seen) for want in wanted):
                break
        else:
            pytest.fail("".join(seen))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        code = process.wait()
    assert code == 0, rest
    assert "an embedded server" in seen[0]


def test_up_works_beside_a_password_for_another_server(nothing_left: None) -> None:
    """`stillroom up` starts a worker on its own server, which has no password, also where REDIS_PASSWORD is set."""
    environment = CHECKOUT | {"PYTHONUNBUFFERED": "1", "REDIS_PASSWORD": "of another server"}
    with attended([STILLROOM, "up", "--flower-port", "0"], environment, **HEARD) as process:
        assert process.stdout is not None
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            if "can't start" in line or re.match(r"worker +\| .* ready\.", line):
                break
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert re.match(r"worker +\| .* ready\.", seen[-1]), "".join(seen)


def test_a_mistake_may_look_like_markup() -> None:
    """A mistake that looks like markup is printed as it was given."""
    done = run_to_end([STILLROOM, "up"], env=os.environ | {"STILLROOM_TTL": "[/red]"})
    assert done.returncode == 2
    assert "STILLROOM_TTL='[/red]'" in done.stderr


@pytest.mark.parametrize("command", [[STILLROOM, "up"], DEMO], ids=["up", "demo"])
def test_a_mistake_is_a_sentence_and_exit_code_2(nothing_left: None, command: list[str]) -> None:
    """An unknown setting exits with 2 and a sentence with the probable one, without a traceback."""
    done = run_to_end(command, env=CHECKOUT | {"STILLROOM_TLL": "5"})
    assert done.returncode == 2
    assert "STILLROOM_TLL is not a setting; did you mean STILLROOM_TTL?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_begins_beside_files_with_the_names_of_libraries(tmp_path: Path) -> None:
    """A celery.py or queue.py in the folder where `stillroom worker` is started is not taken for the library."""
    for name in ("celery", "queue"):
        (tmp_path / f"{name}.py").write_text("1 / 0")
    done = nursery.run_text(
        [STILLROOM, "worker"], os.environ | {"STILLROOM_WORKER_THREADS": "many"}, tmp_path
    )
    assert "the worker can't start: STILLROOM_WORKER_THREADS" in done.stderr


def test_docs_prints_the_pages() -> None:
    """`stillroom docs` lists the pages, prints one, and knows one that is spelled alike, or where to look."""

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        return nursery.run_text([STILLROOM, "docs", *words], os.environ)

    assert "(howto/tags.md)" in said().stdout
    assert said("howto/tags").stdout.startswith("# How to choose tags\n")
    assert said("tags").stdout == said("howto/tags").stdout
    for page, hint in [
        ("howto/tag", "did you mean howto/tags?"),
        (
            "migration",
            "several pages: migration/cashews-fastapi-cache, migration/django-redis, ",
        ),
        ("quota", "these mention it: "),
        ("zzz", "there is no page 'zzz'\n"),
    ]:
        wrong = said(page)
        assert wrong.returncode == 2
        assert hint in wrong.stderr


@pytest.mark.parametrize(
    ("found", "is_wanted", "said"),
    [
        (None, True, "Flower is not installed: pip install 'stillroom[flower]'"),
        (None, False, None),
        (True, True, "Flower is http://127.0.0.1:{port}"),
    ],
)
def test_up_says_where_flower_is_or_how_to_get_it(
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    found: Any,
    is_wanted: bool,
    said: str | None,
) -> None:
    """`stillroom up` names Flower's address, or what to install, and nothing where nobody wants it."""
    port = str(free_port()) if is_wanted else "0"
    monkeypatch.setenv("REDIS_URL", server.url)
    command = import_module("stillroom.cli.up")
    monkeypatch.setattr("stillroom.cli.stack.importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr(command, "Supervisor", lambda wanted: SimpleNamespace(run=int))
    done = CliRunner().invoke(app, ["up", "--flower-port", port])
    assert done.exit_code == 0, (done.output, done.exception)
    assert said.format(port=port) in done.output if said else "Flower" not in done.output


def test_a_second_up_says_that_flowers_port_is_taken(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stillroom up` starts nothing where Flower's port is another program's, and names the option."""
    monkeypatch.setenv("REDIS_URL", server.url)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = CliRunner().invoke(app, ["up", "--flower-port", port])
    assert "Flower is" not in done.output
    assert "started" not in done.output
    assert f"Flower can't listen on port {port} (Address already in use)" in str(done.exception)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["pause", "refresh", "--for", "25h"],
            "'25h': a time is written as 90s, 30m, 2h or 7d",
        ),
        (["up", "--flower-port", "99999"], "65535"),
    ],
)
def test_a_number_that_is_too_large_is_refused_as_it_was_given(
    command: list[str], said: str
) -> None:
    """A number that no port and no pause can be is refused under the name and in the words of the command line."""
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, said in " ".join(done.output.split())) == (2, True), done.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sessions", "end", "u1"], "1 session ended"),
        (["bans", "lift", "203.0.113.7"], "is lifted"),
        (["limits", "reset", "203.0.113.7", "auth"], "is forgotten"),
        (["dead-letters", "list"], "0 of 0"),
        (["pause", "refresh"], "is paused"),
        (["resume", "refresh"], "was not paused"),
    ],
)
def test_what_is_not_about_the_cache_is_done_without_it(
    server: EmbeddedServer,
    make_room: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    said: str,
) -> None:
    """With the cache's own Redis away, commands about sessions, limits, bans, dead letters and pauses work."""
    room = make_room()
    room.sessions.create("u1")
    room.abuse.ban("203.0.113.7", 60)
    room.limits.check("203.0.113.9", [AUTH])
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("STILLROOM_CACHE_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("STILLROOM_CONNECT_ATTEMPTS", "1")
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, said in done.output) == (0, True), (done.output, done.exception)
