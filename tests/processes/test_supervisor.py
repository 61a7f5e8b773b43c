"""The supervisor has one log and one Ctrl-C, and leaves no process behind."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator

import pytest

from stillroom.cli.supervisor import LINE_LIMIT, Service, ServiceError, Supervisor
from stillroom.errors import StillroomError
from stillroom.leash import until
from tests.support.processes import WITHIN, OwnProgram, all_gone, is_gone, our_children

POLITE = """
import signal, sys, time
def bye(*_):
    print("bye")
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
print("ready")
time.sleep(60)
"""

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print("grandchild", child.pid)
time.sleep(60)
"""

# A program that supervises `services`.
SUPERVISE = """
import sys
from stillroom.cli.supervisor import Service, Supervisor
def python(name, source, **options):
    return Service(name, [sys.executable, "-S", "-c", source], **options)
sys.exit(Supervisor([{services}]).run())
"""


def python(name: str, source: str, stop_after: float = 10.0) -> Service:
    return Service(
        name, [sys.executable, "-S", "-c", textwrap.dedent(source)], stop_after=stop_after
    )


def supervise(*services: str) -> OwnProgram:
    """Return a program that runs the services, given as source: python('name', 'source', stop_after=1)."""
    return OwnProgram(SUPERVISE.format(services=", ".join(services)))


def run(*services: Service) -> tuple[int, list[str]]:
    """Run the services here until one ends; return the exit code and the log."""
    out = io.StringIO()
    return Supervisor(services, out=out).run(), out.getvalue().splitlines()


def lines_of(name: str, log: list[str]) -> list[str]:
    """Return the lines that one service wrote."""
    prefix = re.compile(rf"{name} *\| ")
    return [line[found.end() :] for line in log if (found := prefix.match(line))]


def has_written(out: io.StringIO, text: str, times: int) -> bool:
    """Wait until `text` is that many times in the log."""
    return until(lambda: out.getvalue().count(text) == times, WITHIN)


def acts(log: list[str]) -> list[str]:
    """Return the supervisor's own lines."""
    return [line for line in lines_of("up", log) if "started" not in line]


@pytest.fixture(autouse=True)
def nobody_left(others: set[int]) -> Iterator[None]:
    """Check that no test leaves a process of its own, not even a zombie."""
    yield
    assert our_children() == others


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_in_reverse_order(number: signal.Signals) -> None:
    """A terminal's Ctrl-C, SIGTERM and SIGHUP stop the last started first; the code is 0."""
    names = ("server", "worker", "web")
    with supervise(*(f"python({name!r}, {POLITE!r})" for name in names)) as program:
        seen: list[str] = []
        while sum("ready" in line for line in seen) < len(names):
            seen += program.read_until("ready")
        os.killpg(program.process.pid, number)
        rest = program.read_rest()
        assert program.exit_code() == 0
    assert rest == [
        "up     | stopping web",
        "web    | bye",
        "up     | stopping worker",
        "worker | bye",
        "up     | stopping server",
        "server | bye",
    ]


def test_a_child_that_ignores_sigterm_is_killed_with_its_children() -> None:
    """After its grace a stubborn service is killed with its grandchildren, and the log says so."""
    with supervise(f"python('mule', {STUBBORN!r}, stop_after=0.2)") as program:
        grandchild = int(program.read_word("grandchild"))
        program.ctrl_c()
        log = program.read_rest()
        assert program.exit_code() == 0
    assert acts(log) == ["stopping mule", "killing mule: it did not stop in 0.2 s"]
    assert is_gone(grandchild)


def test_a_second_ctrl_c_kills_at_once() -> None:
    """A second Ctrl-C kills all services at once."""
    services = [f"python({name!r}, {STUBBORN!r}, stop_after=60)" for name in ("mule", "donkey")]
    with supervise(*services) as program:
        seen = program.read_until("grandchild") + program.read_until("grandchild")
        grandchildren = [int(line.split()[-1]) for line in seen if "grandchild" in line]
        program.ctrl_c()
        program.read_until("stopping donkey")
        program.ctrl_c()
        log = program.read_rest()
        assert program.exit_code() == 130
    assert acts(log)[0] == "killing donkey: a second signal came"
    assert acts(log)[-1] == "killing mule: a second signal came"
    assert all(map(is_gone, grandchildren))


def test_a_child_that_ends_brings_all_down() -> None:
    """When a service ends by itself the others are stopped, and its exit code is the result."""
    code, log = run(python("polite", POLITE), python("short", "raise SystemExit(7)"))
    assert code == 7
    assert acts(log) == ["short ended with exit code 7, stopping the others", "stopping polite"]


def test_a_child_that_ends_well_brings_all_down() -> None:
    """A service that ends with 0 ends the run with 0."""
    code, log = run(python("polite", POLITE), python("short", ""))
    assert code == 0
    assert "short ended with exit code 0, stopping the others" in acts(log)


def test_a_child_ended_by_a_signal() -> None:
    """A service that a signal ended gives 128 + the signal, and the log names it."""
    code, log = run(python("victim", "import os; os.kill(os.getpid(), 9)"))
    assert code == 137
    assert acts(log) == ["victim was ended by SIGKILL, stopping the others"]


def test_an_orphaned_grandchild_does_not_stay() -> None:
    """What a service leaves running when it ends is killed, though it holds the log open."""
    source = """
        import subprocess, sys
        sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
        print("grandchild", subprocess.Popen(sleep).pid)
    """
    code, log = run(python("careless", source))
    assert code == 0
    assert is_gone(int(lines_of("careless", log)[0].split()[1]))


def test_nobody_outlives_a_killed_supervisor() -> None:
    """SIGKILL for the supervisor ends its services and their children."""
    with supervise(f"python('a', {STUBBORN!r})", f"python('b', {STUBBORN!r})") as program:
        log = program.read_until("grandchild") + program.read_until("grandchild")
        pids = [int(line.split()[-1]) for line in log]
        assert len(pids) == 4  # two services started, two grandchildren
        program.kill()
        assert all_gone(*pids)


def test_lines_of_two_chatty_children_never_mix() -> None:
    """Every line of the log is one whole line of one service, and none is lost."""
    count = 3_000
    source = f"""
        import sys
        for number in range({count}):
            sys.stdout.write(f"{{number}} ")
            sys.stdout.write("x" * (number % 100))
            sys.stdout.write("\\n")
        print("done")
        import time; time.sleep(60)
    """
    out = io.StringIO()
    with Supervisor([python("tick", source), python("tock", source)], out=out):
        assert has_written(out, "| done", times=2)
    log = out.getvalue().splitlines()
    wanted = [*(f"{number} {'x' * (number % 100)}" for number in range(count)), "done"]
    assert lines_of("tick", log) == wanted
    assert lines_of("tock", log) == wanted
    assert len(log) == 2 * len(wanted) + len(lines_of("up", log))


def test_both_streams_are_in_the_log_in_their_order() -> None:
    """stderr stands between the lines of stdout where it was written."""
    source = """
        import sys
        print("one")
        print("two", file=sys.stderr)
        print("three")
    """
    assert lines_of("a", run(python("a", source))[1]) == ["one", "two", "three"]


def test_a_last_line_without_an_end_is_printed() -> None:
    """The last words of a service need no newline."""
    _, log = run(python("a", "import sys; sys.stdout.write('first\\n\\nlast words')"))
    assert lines_of("a", log) == ["first", "", "last words"]


def test_a_very_long_line_survives() -> None:
    """A line over the limit comes in pieces that lose nothing and break no character."""
    source = "import sys; sys.stdout.buffer.write(('aä€' * 100_000 + '\\nnext\\n').encode())"
    lines = lines_of("a", run(python("a", source))[1])
    assert "".join(lines[:-1]) == "aä€" * 100_000
    assert lines[-1] == "next"


def test_a_line_of_exactly_the_limit() -> None:
    """A line as long as the limit is one line, with no empty one behind it."""
    source = f"print('x' * {LINE_LIMIT}); print('next')"
    assert lines_of("a", run(python("a", source))[1]) == ["x" * LINE_LIMIT, "next"]


def test_invalid_utf8_survives() -> None:
    """Bytes that are no UTF-8 are shown by their number, also where a line or the log ends."""
    source = r"import sys; sys.stdout.buffer.write(b'a\xff\xc3\nb\xe2\x82\n\xe2')"
    assert lines_of("a", run(python("a", source))[1]) == [r"a\xff\xc3", r"b\xe2\x82", r"\xe2"]


def test_an_ascii_terminal_gets_the_rest_escaped() -> None:
    """A character the output can't show is escaped; the log goes on."""
    buffer = io.BytesIO()
    with io.TextIOWrapper(buffer, encoding="ascii") as out:
        source = "import sys; sys.stdout.buffer.write('50 €\\nnext\\n'.encode())"
        Supervisor([python("a", source)], out=out).run()
        log = buffer.getvalue().decode().splitlines()
    assert lines_of("a", log) == [r"50 \u20ac", "next"]


def test_names_have_one_width_and_no_colour_in_a_file() -> None:
    """Prefixes are as wide as the longest name, and plain where nobody sees colours."""
    _, log = run(python("a", "print('hello')"), python("longname", "import time; time.sleep(60)"))
    assert "a        | hello" in log
    assert not any("\x1b" in line for line in log)


def test_names_are_coloured_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal each name has its colour and the text none, unless NO_COLOR is set."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    Supervisor([python("a", "print('hello')")], out=out).run()
    assert "\x1b[36ma  | \x1b[0mhello\n" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    Supervisor([python("a", "print('hello')")], out=out).run()
    assert "a  | hello\n" in out.getvalue().splitlines(keepends=True)


def test_a_reader_that_leaves_stops_all() -> None:
    """When nobody reads the log any more, as after `| head`, the services are stopped."""
    chatty = "import time\nwhile True: print('tick'); time.sleep(0.01)"
    with supervise(f"python('a', {chatty!r})") as program:
        pid = int(program.read_until("started")[-1].split()[-1])
        program.read_until("tick")
        program.stdout.close()
        program.exit_code()
        assert is_gone(pid)


def test_a_command_that_does_not_exist(others: set[int]) -> None:
    """A command that does not exist is named with its service, and the started services are stopped."""
    services = [python("polite", POLITE), Service("web", ["/no/such", "thing"])]
    with pytest.raises(ServiceError, match=r"can't start web \(/no/such thing\): No such file"):
        Supervisor(services, out=io.StringIO()).run()
    assert issubclass(ServiceError, StillroomError)
    assert our_children() == others


def test_env_is_added_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service sees our environment with its own on top, and Python does not hold lines back."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    source = "from os import environ as e; print(e['JAM'], 'PATH' in e, e['PYTHONUNBUFFERED'])"
    service = Service("a", [sys.executable, "-S", "-c", source], env={"JAM": "plum"})
    assert lines_of("a", run(service)[1]) == ["plum True 1"]


def test_start_and_stop_in_a_demo() -> None:
    """start() returns at once, stop() stops in reverse order, and both can be done again."""
    out = io.StringIO()
    supervisor = Supervisor([python("a", POLITE), python("b", POLITE)], out=out)
    for ready in (2, 4):
        supervisor.start()
        assert has_written(out, "ready", times=ready)
        supervisor.stop()
        supervisor.stop()
    assert acts(out.getvalue().splitlines()) == ["stopping b", "stopping a"] * 2


def test_run_gives_the_signals_back() -> None:
    """After run() the handlers are those from before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run(python("a", ""))
    assert {number: signal.getsignal(number) for number in before} == before
