"""The processes of one machine share the bans they know of."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from stillroom import known_bans
from stillroom.known_bans import KnownBans, ban_file

NOW = int(time.time() * 1_000)
KEY, OTHER = b"ns:{rl:ip:203.0.113.7}:!ban", b"ns:{rl:ip:203.0.113.8}:!ban"


def known(path: Path | None) -> KnownBans:
    """Open the known bans as a process of the machine does."""
    return KnownBans(lambda: path)


def left_ms(bans: KnownBans, keys: Iterable[bytes], now_ms: int) -> int:
    """Return what a process knows of a ban when it looks."""
    bans.look()
    return bans.left_ms(keys, now_ms)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every look read the file."""
    monkeypatch.setattr(known_bans, "LOOKS_EVERY_S", -1.0)


def test_one_process_learns_what_another_has_met(tmp_path: Path) -> None:
    """A process learns from another which bans were met, lifted or prolonged."""
    one, two = known(tmp_path / "bans"), known(tmp_path / "bans")
    one.learn(KEY, NOW + 5_000)
    assert left_ms(two, [OTHER, KEY], NOW) == 5_000
    assert left_ms(two, [OTHER], NOW) == 0
    assert left_ms(two, [KEY], NOW + 6_000) == 0
    one.learn(KEY, NOW + 60_000)
    assert left_ms(two, [KEY], NOW) == 60_000
    two.forget(KEY)
    assert left_ms(one, [KEY], NOW) == 0


def test_a_ban_that_is_met_again_is_not_written_again(tmp_path: Path) -> None:
    """A known ban is not written again, so that a flood of denials is one line."""
    bans = known(tmp_path / "bans")
    for n in range(1_000):
        bans.learn(KEY, NOW + 5_000 + n % 10)
    assert (tmp_path / "bans").read_bytes().count(b"\n") == 1


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is bounded: it is written anew with the newest bans, whatever time it is on this machine."""
    monkeypatch.setattr(known_bans, "FILE_LIMIT", 5_000)
    monkeypatch.setattr(time, "time", lambda: NOW + 10**6)
    bans = known(tmp_path / "bans")
    sizes = []
    for n in range(1_000):
        bans.learn(b"key %d" % n, NOW + 5_000)
        sizes.append((tmp_path / "bans").stat().st_size)
    assert max(sizes) <= 5_000
    assert sum(after < before for before, after in pairwise(sizes)) < 20
    kept = [n for n in range(1_000) if left_ms(known(tmp_path / "bans"), [b"key %d" % n], NOW)]
    assert len(kept) > 100
    assert kept == [*range(kept[0], 1_000)]
    assert [one.name for one in tmp_path.iterdir()] == ["bans"]


def test_the_file_is_its_owner_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the user of the app can read the file, also once written anew, and no planted link is followed."""
    monkeypatch.setattr(known_bans, "FILE_LIMIT", 100)
    path, victim = tmp_path / "known.bans", tmp_path / "victim"
    victim.write_text("precious")
    bans = known(path)
    bans.learn(KEY, NOW + 60_000)
    assert path.stat().st_mode & 0o777 == 0o600
    path.with_suffix(f".{os.getpid()}").symlink_to(victim)
    for n in range(3):
        bans.learn(KEY, NOW + 70_000 + 10_000 * n)
    assert victim.read_text() == "precious"
    path.with_suffix(f".{os.getpid()}").unlink()
    bans.learn(KEY, NOW + 10**9)
    assert path.read_bytes().count(b"\n") == 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a process is bounded, and the newest bans stay."""
    monkeypatch.setattr(known_bans, "KNOWN", 10)
    bans = known(None)
    for n in range(100):
        bans.learn(b"key %d" % n, NOW + 5_000)
    assert [n for n in range(100) if left_ms(bans, [b"key %d" % n], NOW)] == [*range(90, 100)]


def test_junk_in_the_file_harms_nobody(tmp_path: Path) -> None:
    """A file that is cut short or foreign does no harm."""
    (tmp_path / "bans").write_bytes(b"\n\nx y\n123\n-5 key\n" + b"9" * 400 + b" key\n\xff\xfe\n5")
    assert left_ms(known(tmp_path / "bans"), [b"none"], NOW) == 0


@pytest.mark.parametrize("path", ["/dev/null", "/nowhere/at/all", "/proc/none"])
def test_without_a_file_a_process_has_its_memory(path: str) -> None:
    """Without a usable file a process has its own memory."""
    bans = known(Path(path))
    bans.learn(KEY, NOW + 5_000)
    assert left_ms(bans, [KEY], NOW) == 5_000
    bans.forget(KEY)
    assert left_ms(bans, [KEY], NOW) == 0


def test_the_file_is_in_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in a folder that only its user can write; another folder is not used."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    found = ban_file(None, "shop", "redis://a")
    assert found is not None
    assert found.parent.stat().st_mode & 0o077 == 0
    assert ban_file(None, "shop", "redis://b") != found
    assert ban_file(Path("/x"), "shop", "redis://a") == Path("/x")
    found.parent.chmod(0o777)
    assert ban_file(None, "shop", "redis://a") is None
    found.parent.rmdir()
    os.symlink("/tmp", found.parent)
    assert ban_file(None, "shop", "redis://a") is None


def test_without_a_temporary_folder_a_process_has_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no temporary folder can be written to, a process remembers the bans that it has met."""
    monkeypatch.setattr(tempfile, "tempdir", None)  # found once in a process
    bans = KnownBans(lambda: ban_file(None, "ns", "redis://one"))
    with nothing_can_be_written():
        assert left_ms(bans, [KEY], NOW) == 0
        bans.learn(KEY, NOW + 5_000)
        assert left_ms(bans, [KEY], NOW) == 5_000
        bans.forget(KEY)
        assert left_ms(bans, [KEY], NOW) == 0


@contextmanager
def nothing_can_be_written() -> Iterator[None]:
    """Let no file of this process grow, as on a read-only file system, which only root can mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(FileNotFoundError):
            tempfile.gettempdir()
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A link in the place of the file is not followed."""
    (tmp_path / "bans").symlink_to(tmp_path / "elsewhere")
    known(tmp_path / "bans").learn(KEY, NOW + 5_000)
    assert not (tmp_path / "elsewhere").exists()
