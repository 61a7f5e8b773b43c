"""`stillroom secrets` makes secrets once and replaces them without an interruption."""

from __future__ import annotations

import errno
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import redis
from stillroom import Settings
from stillroom.cli import app, secret_files
from stillroom.cli.credentials import NothingToPromote, UnknownSecret, names
from stillroom.cli.secret_files import SecretRefused
from stillroom.embedded import EmbeddedServer
from stillroom.errors import SettingsError
from tests.support.roles import admin, environment_of, server_with_roles, url_of


def secrets(folder: Path, *arguments: str) -> str:
    """Run the command as a person types it."""
    done = CliRunner().invoke(app, ["secrets", str(folder), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def may_enter(server: EmbeddedServer, user: str, password: str) -> bool:
    with redis.Redis.from_url(url_of(server, user), password=password) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


def test_each_secret_is_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """Each secret (one per role, the peppers, Flower's login) is a different, long value in a file for
    its owner alone.
    """
    folder = tmp_path / "secrets"
    assert "web_password" in secrets(folder)
    made = contents(folder)
    assert set(made) == {*names(), "users.acl", "sentinels.acl"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(set(made.values())) == len(made)
    assert all(len(text) == 64 for name, text in made.items() if name.endswith("_password"))


def test_the_server_s_file_holds_hashes_only(tmp_path: Path) -> None:
    """The server's file holds only hashes, because readers of the stack's configuration may read it."""
    secrets(tmp_path)
    made = contents(tmp_path)
    acl = made.pop("users.acl")
    assert not [name for name, text in made.items() if text.strip() in acl]
    assert "<" not in acl
    assert {line.split()[0] for line in acl.splitlines()} == {"user"}


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    """A second run makes only missing secrets."""
    secrets(tmp_path)
    before = contents(tmp_path)
    secrets(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "beat_password").unlink()
    secrets(tmp_path)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {
        "beat_password",
        "users.acl",
    }


def test_an_old_password_works_until_it_is_forgotten(tmp_path: Path) -> None:
    """An old password works until it is forgotten, so that processes change over one by one."""
    with server_with_roles(tmp_path, None) as server:

        def write(*arguments: str) -> None:
            secrets(tmp_path, *arguments)
            with (tmp_path / "users.acl").open("a") as acl:
                acl.write("user admin on nopass ~* &* +@all\n")
            admin(server).acl_load()

        old = (tmp_path / "worker_password").read_text()
        write("--rotate", "worker_password")
        new = (tmp_path / "worker_password").read_text()
        assert new != old
        assert may_enter(server, "worker", old)
        assert may_enter(server, "worker", new)
        write("--forget", "worker_password")
        assert not may_enter(server, "worker", old)
        assert may_enter(server, "worker", new)


def test_an_app_s_password_opens_the_queues_too(tmp_path: Path) -> None:
    """An app publishes as `producer` with its one secret."""
    with server_with_roles(tmp_path, None) as server:
        assert may_enter(server, "producer", (tmp_path / "web_password").read_text())
        assert not may_enter(server, "web", (tmp_path / "producer_password").read_text())


def ring_of(folder: Path) -> list[str]:
    return (folder / "session_peppers").read_text().split()


def test_a_new_pepper_is_read_by_all_before_any_uses_it_first(tmp_path: Path) -> None:
    """A rotated pepper is last in the ring, promoted after the deploy it is first, and three are kept."""
    secrets(tmp_path)
    rings = [ring_of(tmp_path)]
    for _ in range(3):
        for step in ("--rotate", "--promote"):
            secrets(tmp_path, step, "session_peppers")
            rings.append(ring_of(tmp_path))
    assert [len(ring) for ring in rings] == [1, 2, 2, 3, 3, 3, 3]
    for before, added, promoted in zip(rings[0::2], rings[1::2], rings[2::2], strict=False):
        assert added[:-1] == before[:2]
        assert promoted == [added[-1], *added[:-1]]
    assert all(set(one) & set(other) for one, other in pairwise(rings))
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    secrets(tmp_path, "--forget", "session_peppers")
    assert ring_of(tmp_path) == rings[-1][:1]


def test_a_pepper_is_promoted_once(tmp_path: Path) -> None:
    """Promoting without a new pepper is refused with the step that comes first."""
    secrets(tmp_path)
    with pytest.raises(NothingToPromote, match="say --rotate session_peppers and deploy first"):
        secrets(tmp_path, "--promote", "session_peppers")
    secrets(tmp_path, "--rotate", "session_peppers")
    secrets(tmp_path, "--promote", "session_peppers")
    promoted = ring_of(tmp_path)
    with pytest.raises(NothingToPromote):
        secrets(tmp_path, "--promote", "session_peppers")
    assert ring_of(tmp_path) == promoted
    with pytest.raises(NothingToPromote):
        secrets(tmp_path, "--promote", "web_password")


def test_a_pepper_that_was_not_promoted_may_be_forgotten(tmp_path: Path) -> None:
    """Forgetting a pepper that was not promoted keeps the current one first."""
    secrets(tmp_path)
    (before,) = ring_of(tmp_path)
    secrets(tmp_path, "--rotate", "session_peppers")
    secrets(tmp_path, "--forget", "session_peppers")
    assert ring_of(tmp_path) == [before]
    with pytest.raises(NothingToPromote):
        secrets(tmp_path, "--promote", "session_peppers")


def test_a_name_that_is_no_secret_is_refused(tmp_path: Path) -> None:
    """An unknown name is refused before anything is written, with the list of secrets."""
    with pytest.raises(UnknownSecret, match=r"wb_password; did you mean web_password\? There are"):
        secrets(tmp_path, "--rotate", "wb_password")
    assert not list(tmp_path.iterdir())


def refused(folder: Path, *arguments: str) -> str:
    """Run a command that fails, and return its sentence."""
    done = CliRunner().invoke(app, ["secrets", str(folder), *arguments])
    assert isinstance(done.exception, SecretRefused), done.output
    return str(done.exception)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_a_line_break_behind_a_password_is_no_part_of_it(tmp_path: Path, ending: str) -> None:
    """A line break behind a password, from an editor or a copy, is no part of it, nor is it left for a shell."""
    secrets(tmp_path)
    path = tmp_path / "worker_password"
    path.write_text(path.read_text() + ending)
    with server_with_roles(tmp_path, None) as server:
        environment = environment_of(server, tmp_path, "worker")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            sent = Settings().password
        assert sent is not None
        assert may_enter(server, "worker", sent)
        assert path.read_bytes() == sent.encode()  # so `$(cat …)` is the same


def test_what_lies_there_is_not_followed(tmp_path: Path) -> None:
    """A link in the place of a secret or its temporary file is not followed."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in names():
        (folder / f"{name}.new").symlink_to(victim)
    secrets(folder)
    assert victim.read_text() == "mine"
    for name in ("web_password", "session_peppers", "flower_config"):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
        assert f"{name} is a link" in refused(folder)
        (folder / name).unlink()
    (folder / "users.acl").unlink()
    (folder / "users.acl").symlink_to(victim)
    secrets(folder)
    assert victim.read_text() == "mine"
    assert not (folder / "users.acl").is_symlink()


def test_a_secret_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    """A secret file that others could have written is refused."""
    secrets(tmp_path)
    (tmp_path / "web_password").chmod(0o622)
    assert "could be written by others (mode 622)" in refused(tmp_path)


def test_a_secret_that_others_could_read_is_closed_and_told_of(tmp_path: Path) -> None:
    """A secret file that others could read is closed, reported, and used until it is replaced."""
    secrets(tmp_path)
    (tmp_path / "web_password").chmod(0o644)
    assert "web_password could be read by others" in secrets(tmp_path)
    assert stat.S_IMODE((tmp_path / "web_password").stat().st_mode) == 0o600
    assert "could be read" not in secrets(tmp_path)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    """Whatever the umask, only the owner can read a secret."""
    before = os.umask(umask)
    try:
        folder = tmp_path / "secrets"
        folder.mkdir()
        folder.chmod(0o777)
        assert "others could write here" in secrets(folder)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("text", ["", "\n", "\xff"])
def test_a_file_without_a_secret_in_it_is_refused(tmp_path: Path, text: str) -> None:
    """An empty secret file is refused, because its hash would let everybody in."""
    secrets(tmp_path)
    (tmp_path / "worker_password").write_bytes(text.encode("latin-1"))
    assert "worker_password" in refused(tmp_path)
    (tmp_path / "worker_password").unlink()
    (tmp_path / "session_peppers").write_text("\n")
    assert "is empty" in refused(tmp_path, "--forget", "session_peppers")


@pytest.mark.parametrize("text", ["two words", 'a"b', "it's", "tab\there"])
def test_a_password_that_redis_could_not_read_is_refused(tmp_path: Path, text: str) -> None:
    """A password that stands in Redis' own configuration has no space and no quotation mark; an app's may have."""
    secrets(tmp_path)
    (tmp_path / "web_password").write_text(text)
    secrets(tmp_path)
    for name in ("replica_password", "sentinel_password"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        assert f"{name} has a space or a quotation mark" in refused(tmp_path)
        (tmp_path / name).write_text(kept)


def test_a_full_disk_harms_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the old secrets and no other file, and the sentence names the reason."""
    secrets(tmp_path)
    before = contents(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(tmp_path, "--rotate", "web_password")
    assert contents(tmp_path) == before


def test_a_password_that_is_rotated_again_works_until_it_is_forgotten(tmp_path: Path) -> None:
    """After a password was rotated thrice in a row, Redis takes all four, and after `--forget` only the last."""
    given = []
    for _ in range(3):
        secrets(tmp_path)
        given.append((tmp_path / "worker_password").read_text())
        secrets(tmp_path, "--rotate", "worker_password")
    given.append((tmp_path / "worker_password").read_text())
    with server_with_roles(tmp_path, None) as server:
        assert [may_enter(server, "worker", one) for one in given] == [True] * 4
    secrets(tmp_path, "--forget", "worker_password")
    with server_with_roles(tmp_path, None) as server:
        assert [may_enter(server, "worker", one) for one in given] == [False, False, False, True]


def test_a_command_that_is_refused_has_replaced_nothing(tmp_path: Path) -> None:
    """A command that is refused for one of its options has replaced no secret for another one."""
    secrets(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(NothingToPromote):
        secrets(tmp_path, "--rotate", "web_password", "--promote", "session_peppers")
    assert contents(tmp_path) == before


def test_a_mistake_in_the_settings_replaces_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the settings is told before a password is replaced that the ACL file would not have."""
    secrets(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setenv("STILLROOM_NAMESPACE", "no namespace")
    with pytest.raises(SettingsError, match="STILLROOM_NAMESPACE"):
        secrets(tmp_path, "--rotate", "web_password")
    assert contents(tmp_path) == before


def test_a_pepper_is_not_promoted_before_a_deploy(tmp_path: Path) -> None:
    """A pepper that no process can have yet is not promoted by the command that makes it."""
    secrets(tmp_path)
    secrets(tmp_path, "--rotate", "session_peppers")
    before = contents(tmp_path)
    with pytest.raises(NothingToPromote, match="deploy, and then --promote session_peppers"):
        secrets(tmp_path, "--rotate", "session_peppers", "--promote", "session_peppers")
    assert contents(tmp_path) == before


def test_a_pepper_that_waits_to_be_promoted_is_in_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation that breaks off leaves no pepper to promote that is not in the ring: no process could read it."""
    secrets(tmp_path)
    write, written = secret_files.write, []

    def write_one(path: Path, text: str) -> None:
        if path.name.startswith("session_peppers"):
            if written:
                raise SecretRefused("the disk is full")
            written.append(path)
        write(path, text)

    monkeypatch.setattr(secret_files, "write", write_one)
    with pytest.raises(SecretRefused):
        secrets(tmp_path, "--rotate", "session_peppers")
    made = contents(tmp_path)
    assert made.get("session_peppers.next", "") in made["session_peppers"]
