"""docs/tutorial.md can be walked as a reader walks it: each file, command and printed line."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Self

import pytest

from stillroom.embedded import free_port
from tests.support.guide import DOCS
from tests.support.processes import run_to_end

STEP = re.compile(
    r"^## (?P<title>[^\n]+)$|^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
PATIENCE = 40.0


@pytest.mark.long
def test_the_tutorial_can_be_walked(tmp_path: Path) -> None:
    """A reader who copies each file and command of the tutorial sees what it says."""
    with Reader(tmp_path) as reader:
        for step in STEP.finditer((DOCS / "tutorial.md").read_text(encoding="utf-8")):
            match step["kind"]:
                case None:
                    reader.begin(step["title"])
                case "python":
                    reader.write(step["text"])
                case "console":
                    reader.type(step["text"])
        assert reader.commands >= 15


class Reader:
    """A reader with three terminals."""

    def __init__(self, folder: Path) -> None:
        self.commands = 0
        self._folder = folder
        self._ports = {"8000": str(free_port()), "5555": str(free_port())}
        here = str(Path(sys.executable).parent)
        self._environment = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
        self._environment.pop("REDIS_URL", None)
        self._aliases: list[str] = []
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._is_shop_old = self._has_slept = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self._end(name)

    def begin(self, title: str) -> None:
        """Begin the last part with Ctrl-C in the first terminal."""
        if "away" in title:
            self._end("stillroom")

    def write(self, code: str) -> None:
        """Add a block to the file it names, after which the shop has to be started again."""
        name = code.split()[1]
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(code)
        self._is_shop_old = True

    def type(self, block: str) -> None:
        """Type each command of a block and compare what it prints."""
        for said in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = said.partition("\n")
            self._type(command, printed)

    def _type(self, command: str, printed: str) -> None:
        first = shlex.split(command)[0]
        if first == "export":
            name, _, value = command.removeprefix("export ").partition("=")
            if name != "REDIS_URL":  # that one was copied when it was printed
                self._environment[name] = value
        elif first == "alias":
            self._aliases.append(command)
        elif first == "stillroom" and command.endswith(" up"):
            self._start_all(command, printed)
        elif first == "uvicorn":
            self._start_shop(command)
        elif first != "pip":
            self._run(command, printed)

    def _run(self, command: str, printed: str) -> None:
        if "http:" in command and self._is_shop_old:
            self._start_shop("uvicorn shop:app --port 8000")
        script = "\n".join(["shopt -s expand_aliases", *self._aliases, self._with_ports(command)])
        until = time.monotonic() + (PATIENCE if self._has_slept else 0)
        while not as_printed(printed, said := self._output_of(script)):
            assert time.monotonic() < until, (command, printed, said)
            time.sleep(0.1)
        self._has_slept = command.startswith("sleep")  # for a worker, which may take longer here
        self.commands += 1

    def _output_of(self, script: str) -> str:
        done = run_to_end(
            ["bash", "-c", script], cwd=self._folder, env=self._environment, timeout=PATIENCE
        )
        assert done.returncode == 0, (script, done.stderr)
        return done.stdout

    def _start_all(self, command: str, printed: str) -> None:
        words = [*shlex.split(command), "--flower-port", self._ports["5555"]]
        output = self._start("stillroom", words).stdout
        assert output is not None
        lines = [next_line(output) for _ in printed.splitlines()]
        assert as_printed(self._with_ports(printed), "\n".join(lines)), lines
        self._environment["REDIS_URL"] = lines[0].split()[2]

    def _start_shop(self, command: str) -> None:
        self._end("uvicorn")
        self._start("uvicorn", shlex.split(self._with_ports(command)))
        self._is_shop_old = False
        for _ in range(int(PATIENCE * 10)):
            url = f"http://127.0.0.1:{self._ports['8000']}/openapi.json"
            if subprocess.run(["curl", "-sf", "-o", os.devnull, url], check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError("the shop did not open")

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[str]:
        log = subprocess.PIPE if name == "stillroom" else subprocess.DEVNULL
        self._running[name] = subprocess.Popen(
            words,
            cwd=self._folder,
            env={**self._environment, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        return self._running[name]

    def _end(self, name: str) -> None:
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PATIENCE)
        process.kill()
        process.wait()

    def _with_ports(self, text: str) -> str:
        for written, free in self._ports.items():
            text = re.sub(rf"(?<=:){written}\b|(?<=--port ){written}\b", free, text)
        return text


def next_line(output: IO[str]) -> str:
    """Return the next line that a program printed."""
    return output.readline().rstrip("\n")


def as_printed(page: str, said: str) -> bool:
    """Return whether a command printed what the page shows; `…` and seconds match anything within a line."""
    pattern = r"[^\n]*".join(map(re.escape, re.sub(r"\d\.\d+ s", "…", page.strip()).split("…")))
    return not page.strip() or re.fullmatch(pattern, said.strip()) is not None
