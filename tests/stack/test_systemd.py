"""What docs/operating.md says to type on a machine with systemd works, in other folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer, free_port
from tests.support.crowd import PATIENCE, PATIENT
from tests.support.processes import STILLROOM, run_to_end
from tests.support.swarm import guide


@pytest.fixture
def type_(tmp_path: Path) -> Callable[[str], str]:
    """Return what types a command of the guide, with the folders of this test."""
    for folder in ("etc", "acl", "data", "opt/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "opt/bin/stillroom").symlink_to(STILLROOM)
    moved = {
        "/etc/stillroom": tmp_path / "etc",
        "/etc/redis": tmp_path / "acl",
        "/var/lib/redis": tmp_path / "data",
        "/opt/stillroom": tmp_path / "opt",
        "-o redis -g redis ": "",
    }
    known = PATIENCE | {
        name: value for name, value in os.environ.items() if not name.startswith(("REDIS", "STILL"))
    }

    def type_(command: str) -> str:
        for written, here in moved.items():
            command = command.replace(written, str(here))
        done = run_to_end(["sh", "-c", command], cwd=tmp_path, env=known)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    return type_


def test_a_machine_with_systemd_is_set_up_backed_up_and_restored(
    tmp_path: Path, type_: Callable[[str], str]
) -> None:
    """Redis starts with the users that were made, a command gets the worker's environment, and a backup has the
    sessions of its time.
    """
    make, install, restart, health, back_up, stop, restore, start = guide()["Without a Swarm"]
    assert {one.split()[0] for one in (restart, stop, start)} == {"systemctl"}
    type_(make)
    type_(install)
    port = free_port()
    (tmp_path / "etc/environment").write_text(f"REDIS_URL=redis://worker@127.0.0.1:{port}\n")
    options = {"aclfile": str(tmp_path / "acl/users.acl")}
    server = partial(
        EmbeddedServer, directory=tmp_path / "data", port=port, appendonly=True, options=options
    )
    app = Settings(
        **PATIENT,
        redis_url=f"redis://web@127.0.0.1:{port}",
        redis_password=(tmp_path / "etc/secrets/web_password").read_text(),
    )
    with server(), Stillroom(app, dispatch=NoDispatch()) as room:
        assert "sessions" in type_(health)
        before = room.sessions.create("ann")
        type_(back_up)
        after = room.sessions.create("ann")
    type_(restore)
    with server(), Stillroom(app, dispatch=NoDispatch()) as room:
        assert room.sessions.get(before.token)
        assert room.sessions.get(after.token) is None
