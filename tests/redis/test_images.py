"""get_image_info costs one stat and one MGET and describes the file as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shop.demo.recorder import Recorder
from stillroom import ImageRefused, ImagesUnavailable, Settings, Stillroom
from stillroom.cache import images
from stillroom.cache.images import Images
from stillroom.embedded import EmbeddedServer
from tests.support.faces import FACES, open_room
from tests.support.stepper import Stepper


@pytest.fixture(params=FACES)
def room(
    request: pytest.FixtureRequest, settings: Settings, dispatch: Any, tmp_path: Path
) -> Iterator[Any]:
    """Open a room whose images are in tmp_path."""
    settings = Settings(**{**settings.model_dump(exclude_unset=True), "image_root": tmp_path})
    with open_room(request.param, settings, dispatch) as room:
        yield room


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the files that are read."""
    names: list[str] = []
    real = images.read_image

    def read(root: Path, name: str, *limits: int, **how: Any) -> Any:
        names.append(name)
        return real(root, name, *limits, **how)

    monkeypatch.setattr(images, "read_image", read)
    return names


def save(path: Path, size: tuple[int, int] = (30, 20)) -> None:
    Image.new("RGB", size).save(path, "png")


def test_a_file_is_read_once_per_version(
    room: Any, server: EmbeddedServer, tmp_path: Path, reads: list[str]
) -> None:
    """A file is read once for each version.

    A hit is one MGET, and a changed file is seen without an invalidation.
    """
    save(tmp_path / "a.png")
    info = room.cache.get_image_info("a.png")
    assert (info.width, info.type) == (30, "image/png")
    assert room.cache.get_image_info("a.png") == info
    with Recorder(server.url) as recorder:
        assert room.cache.get_image_info("./a.png") == info
        commands = recorder.commands()
    assert [c.split()[0] for c in commands] == ["MGET"]
    assert reads == ["a.png"]
    save(tmp_path / "a.png", (60, 20))
    assert room.cache.get_image_info("a.png").width == 60
    assert reads == ["a.png", "a.png"]


def test_an_image_whose_size_and_time_stayed_is_invalidated_by_name(
    room: Any, tmp_path: Path, reads: list[str]
) -> None:
    """Invalidating an image by name forgets all its versions, for a file whose size and time did not change."""
    save(tmp_path / "a.png", (10, 20))
    before = (tmp_path / "a.png").stat()
    assert room.cache.get_image_info("a.png").width == 10
    save(tmp_path / "a.png", (20, 10))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(tmp_path / "a.png", ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert room.cache.get_image_info("a.png").width == 10
    room.cache.invalidate_image("a.png")
    assert room.cache.get_image_info("a.png").width == 20


def test_a_missing_file_costs_no_redis_and_no_file_is_made_up(
    room: Any, server: EmbeddedServer, tmp_path: Path
) -> None:
    """A missing file is None at the price of one stat, and is seen as soon as it exists."""
    with Recorder(server.url) as recorder:
        assert room.cache.get_image_info("a.png") is None
        assert recorder.commands() == []
    save(tmp_path / "a.png")
    assert room.cache.get_image_info("a.png").width == 30


def test_a_refusal_is_cached_until_the_file_changes(
    room: Any, tmp_path: Path, reads: list[str]
) -> None:
    """A file that cannot be used raises the same error without a second reading, until it changes."""
    (tmp_path / "a.png").write_bytes(b"text")
    for _ in range(3):
        with pytest.raises(ImageRefused, match="none of JPEG") as refused:
            room.cache.get_image_info("a.png")
        assert refused.value.reason == "content"
    assert reads == ["a.png"]
    save(tmp_path / "a.png")
    assert room.cache.get_image_info("a.png").width == 30


@pytest.mark.parametrize(
    ("limit", "reason"), [("image_pixel_limit", "pixels"), ("image_byte_limit", "bytes")]
)
def test_a_limit_is_that_of_the_process_that_is_asked(
    room: Any, make_room: Any, tmp_path: Path, reads: list[str], limit: str, reason: str
) -> None:
    """An answer that is cached says nothing of limits, so a raised or lowered one holds at once."""
    save(tmp_path / "a.png")
    strict = make_room(image_root=tmp_path, **{limit: 50})
    for _ in range(2):
        with pytest.raises(ImageRefused, match="the limit is 50") as refused:
            strict.cache.get_image_info("a.png")
        assert refused.value.reason == reason
        assert room.cache.get_image_info("a.png").width == 30
    assert reads == ["a.png"]


def test_an_image_behind_a_link_is_refused_for_the_link(room: Any, tmp_path: Path) -> None:
    """A file that is a link, or lies in a folder that is one, is refused as such, until the link is gone."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    save(elsewhere / "a.png")
    (tmp_path / "a.png").symlink_to(elsewhere / "a.png")
    folder.symlink_to(elsewhere)
    for name, what in {"a.png": "it is a link", "folder/a.png": "one of its folders is"}.items():
        with pytest.raises(ImageRefused, match=f"{what}.*no link is followed") as refused:
            room.cache.get_image_info(name)
        assert refused.value.reason == "link"
    folder.unlink()
    elsewhere.rename(folder)
    assert room.cache.get_image_info("folder/a.png").type == "image/png"


@pytest.mark.any_server
def test_who_waits_for_another_process_is_told_the_same(make_room: Any, tmp_path: Path) -> None:
    """Callers who wait for another process' look at a file are told why it is refused, as that process is."""
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "folder").symlink_to("elsewhere")
    one, other = (make_room(image_root=tmp_path) for _ in range(2))
    waits = look_at("folder/a.png", other)
    reads = look_at("folder/a.png", one).run_to_the_load()
    assert waits.run().is_waiting
    assert refused_in(reads.run()) == "link"
    look_at("folder/a.png", one).run_to_the_load()  # it is not waited for
    waits.step()
    assert refused_in(waits.run()) == "link"


def look_at(name: str, room: Stillroom) -> Stepper:
    """Return a look at an image that has found the file, and asks Redis about it."""
    look = Stepper(room, Images(room._cache_body).get_image_info(name))
    look.step()
    look.step()
    return look


def refused_in(look: Stepper) -> str:
    assert isinstance(look.error, ImageRefused)
    return look.error.reason


def test_bad_names_never_reach_redis(room: Any, server: EmbeddedServer) -> None:
    """A bad name reaches neither Redis nor the file system."""
    with Recorder(server.url) as recorder:
        for name in ("../a", "/etc/passwd", "a\0", ""):
            with pytest.raises(ImageRefused):
                room.cache.get_image_info(name)
            with pytest.raises(ImageRefused):
                room.cache.invalidate_image(name)
        assert recorder.commands() == []


def test_without_a_root_or_pillow_it_says_what_to_do(
    make_room: Any, room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an images root or Pillow the error names what is missing."""
    with pytest.raises(ImagesUnavailable, match="STILLROOM_IMAGE_ROOT"):
        make_room().cache.get_image_info("a.png")
    save(tmp_path / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImagesUnavailable, match=r"stillroom\[images\]"):
        room.cache.get_image_info("a.png")


def test_redis_away_reads_the_file(tmp_path: Path, dispatch: Any) -> None:
    """When Redis is away the file is read."""
    save(tmp_path / "a.png")
    settings = Settings(redis_url="redis://127.0.0.1:1", image_root=tmp_path)
    with Stillroom(settings, dispatch=dispatch) as room:
        info = room.cache.get_image_info("a.png")
        assert info is not None
        assert info.width == 30
