"""Image files are found under one root only, read without decoding, and refused with a reason."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stillroom import ImageRefused, ImagesUnavailable
from stillroom.cache import images
from stillroom.cache.images import (
    ImageInfo,
    check_pixels,
    fingerprint,
    normalised,
    read_image,
)
from tests.support.threads import repeated

BYTE_LIMIT, PIXEL_LIMIT = 10_000_000, 1_000_000
KINDS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def save(path: Path, kind: str = "png", size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 90, 200)).save(path, kind)
    return path


def read_checked(root: Path, name: str, pixel_limit: int = PIXEL_LIMIT) -> ImageInfo | None:
    info = read_image(root, name, BYTE_LIMIT)
    if info is not None:
        check_pixels(info, pixel_limit)
    return info


def reason(root: Path, name: str) -> str:
    with pytest.raises(ImageRefused) as refused:
        read_checked(root, name)
    return refused.value.reason


def outcome(root: Path, name: str) -> str:
    try:
        return "answered" if read_checked(root, name) else "missing"
    except ImageRefused as refused:
        return refused.reason


def png(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and has no content."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"IHDR" + fields
    chunk = struct.pack(">I", len(fields)) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_type_is_what_the_content_says(root: Path, kind: str) -> None:
    """The type is read from the content, whatever the file is called."""
    path = save(root / "a" / "picture.exe", kind)
    info = read_image(root, "a/picture.exe", BYTE_LIMIT)
    assert info is not None
    assert (info.type, info.width, info.height) == (KINDS[kind], 30, 20)
    assert info.size == path.stat().st_size
    assert info.sha256 == sha256(path.read_bytes()).hexdigest()
    assert info.timestamp == pytest.approx(path.stat().st_mtime)
    assert info.filename == "a/picture.exe"


def test_a_second_picture_makes_no_other_type(root: Path) -> None:
    """A second picture makes no other type: a Multi-Picture JPEG is a JPEG, an animated PNG a PNG."""
    more = [Image.new("RGB", (30, 20), "red")]
    Image.new("RGB", (30, 20)).save(root / "photo", "MPO", save_all=True, append_images=more)
    Image.new("RGB", (30, 20)).save(root / "moves", "PNG", save_all=True, append_images=more)
    assert read_image(root, "photo", BYTE_LIMIT).type == "image/jpeg"  # type: ignore[union-attr]
    assert read_image(root, "moves", BYTE_LIMIT).type == "image/png"  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_width_and_height_are_those_that_are_shown(root: Path, kind: str, orientation: int) -> None:
    """Width and height are those that browsers show, after the rotation that a phone wrote."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(root / "photo", kind, exif=exif)
    info = read_image(root, "photo", BYTE_LIMIT)
    assert info is not None
    assert (info.width, info.height) == ((30, 20) if orientation < 5 else (20, 30))


BROKEN = [
    b"",
    b"Exif",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"\0" * 5_000,
    b"Exif\0\0garbage",
    b"Exif\0\0MM\0*",
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF
@pytest.mark.parametrize("exif", BROKEN, ids=lambda exif: f"{exif!r:.30}")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_an_exif_that_cannot_be_read_is_none(root: Path, kind: str, exif: bytes) -> None:
    """A picture with an EXIF that can't be read is described as it lies."""
    Image.new("RGB", (30, 20)).save(root / "photo", kind, exif=exif)
    info = read_image(root, "photo", BYTE_LIMIT)
    assert info is not None
    assert (info.width, info.height) == (30, 20)


@pytest.mark.parametrize(
    "text",
    [
        '<svg xmlns="http://www.w3.org/2000/svg" width="3"/>',
        '\ufeff<?xml version="1.0"?>\n<!-- a drawing -->\n<!DOCTYPE svg>\n<svg>',
        "  \n<SVG>",
    ],
)
def test_a_drawing_is_refused_by_its_name(root: Path, text: str) -> None:
    """An SVG is refused by name, because it has no pixels of its own."""
    (root / "drawing").write_text(text, encoding="utf-8")
    with pytest.raises(
        ImageRefused, match="the file is an SVG, a drawing that has no pixels"
    ) as refused:
        read_image(root, "drawing", BYTE_LIMIT)
    assert refused.value.reason == "content"


@pytest.mark.parametrize(
    "piece", ["<!-- -->", "<?xml?>", "<!DOCTYPE x>", " ", "<!--", "<?xml ?><!-- -->"]
)
def test_what_begins_like_a_drawing_is_refused_at_once(root: Path, piece: str) -> None:
    """A file of comments, or of blanks, that is no SVG is refused at once, and not tried in every way."""
    (root / "upload").write_text(piece * (4_000 // len(piece)) + "<x>")
    with pytest.raises(ImageRefused, match="the file is none of"):
        read_image(root, "upload", BYTE_LIMIT)


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "/etc/passwd", "..", "a/../../b", "a\\b", "a\0b", "a\nb", "\x7f", "\ud800"],
)
def test_a_name_that_is_no_path_under_a_root_is_refused(name: str) -> None:
    """A name that is no path under a root is refused before any file is looked at."""
    with pytest.raises(ImageRefused) as refused:
        normalised(name)
    assert refused.value.reason == "name"


def test_names_have_one_spelling_and_a_length() -> None:
    """An image name has one spelling and a maximal length, so that an image has one tag."""
    assert normalised("./a//b/./c.png") == "a/b/c.png"
    with pytest.raises(ImageRefused, match="512 bytes, not 600"):
        normalised("ä" * 300)
    with pytest.raises(ImageRefused, match="512 bytes, not 5,000"):
        normalised("a" * 5_000)
    with pytest.raises(ImageRefused, match="up to 900 bytes; each % counts as three"):
        normalised("%" * 350)  # each takes three bytes in a key
    with pytest.raises(ImageRefused, match="is a str"):
        normalised(b"a.png")  # type: ignore[arg-type]


def test_links_are_not_followed_wherever_they_stand(root: Path, tmp_path: Path) -> None:
    """No link is followed, as the file or as a folder on the way, wherever it leads."""
    save(tmp_path / "outside" / "secret.png")
    save(root / "inside.png")
    (root / "file").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "near").symlink_to("inside.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    assert reason(root, "file") == reason(root, "near") == "link"
    assert read_image(root, "folder/secret.png", BYTE_LIMIT) is None


def test_what_is_no_plain_file_is_refused_at_once(root: Path) -> None:
    """A FIFO without a writer, a device, a folder and a socket are refused at once."""
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    assert reason(root, "fifo") == "special"
    assert reason(root, "folder") == "special"
    assert reason(Path("/dev"), "zero") == "special"


def test_a_missing_file_is_none(root: Path) -> None:
    """A missing file is None, also under a folder that is a file."""
    save(root / "a.png")
    assert read_image(root, "b.png", BYTE_LIMIT) is None
    assert read_image(root, "a.png/b.png", BYTE_LIMIT) is None
    assert fingerprint(root, "b.png") is None
    assert fingerprint(root, "a.png/b.png") is None


def test_a_file_is_not_missing_where_the_folder_of_images_is(root: Path) -> None:
    """Without the images' root nothing says that a file is missing: a disk that is not mounted is no deletion."""
    save(root / "a.png")
    for gone in (root / "unmounted", root / "a.png"):
        with pytest.raises(
            ImagesUnavailable, match=r"STILLROOM_IMAGE_ROOT is .*: there is no such folder"
        ):
            fingerprint(gone, "b.png")
        with pytest.raises(ImagesUnavailable, match=r"STILLROOM_IMAGE_ROOT is .*: N"):
            read_image(gone, "b.png", 100)  # it was there a moment ago


def test_limits_are_told_with_what_was_found(root: Path) -> None:
    """A file over the limit of bytes or declared pixels is refused with its figure, without decoding."""
    save(root / "large.png", size=(400, 400))
    with pytest.raises(ImageRefused, match="bytes; the limit is 100") as refused:
        read_image(root, "large.png", 100)
    assert refused.value.reason == "bytes"
    with pytest.raises(ImageRefused, match="400 × 400 pixels; the limit is 9,999"):
        read_checked(root, "large.png", 9_999)
    (root / "bomb.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    assert reason(root, "bomb.png") == "pixels"


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"<svg/>", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"RIFF"],
)
def test_what_is_no_image_is_refused(root: Path, content: bytes) -> None:
    """An empty file, text, other formats and short headers are refused."""
    (root / "file").write_bytes(content)
    assert reason(root, "file") == "content"


def test_a_file_that_may_not_be_read_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable file is refused with the system's own words."""
    save(root / "a.png")
    monkeypatch.setattr(images, "OPEN_FILE", os.O_WRONLY | os.O_EXCL | os.O_CREAT)
    with pytest.raises(ImageRefused, match="File exists") as refused:
        read_image(root, "a.png", BYTE_LIMIT)
    assert refused.value.reason == "denied"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_disk_that_fails_is_no_refusal_of_the_file() -> None:
    """A file whose reading fails with an error of the disk is told as what this machine can't do just now."""
    with pytest.raises(ImagesUnavailable, match="'mem' can't be read here: Input/output error"):
        read_image(Path("/proc/self"), "mem", BYTE_LIMIT)


def test_a_disk_that_fails_within_a_header_is_no_refusal(root: Path) -> None:
    """A disk that fails while the header is read makes no answer that the cache keeps for everybody."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 16:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error"):
        images._header(Failing(save(root / "a.png").read_bytes()), "a.png")


@pytest.mark.parametrize("spared", [0, 1])
def test_a_process_without_descriptors_refuses_no_file(root: Path, spared: int) -> None:
    """A process that has too many open files says so, and does not refuse the image for it."""
    save(root / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spared, hard))
    try:
        with pytest.raises(ImagesUnavailable, match="Too many open files"):
            read_image(root, "a.png", BYTE_LIMIT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_written_while_it_is_read_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is written while it is read is read again, and refused if it never rests."""
    path = save(root / "a.png")
    real, changes = images._hashed, iter([1])

    def hashed(file: Any, limit: int) -> Any:
        digest = real(file, limit)
        if next(changes, None):
            save(path.with_suffix(".new"), size=(50, 50))
            path.write_bytes(path.with_suffix(".new").read_bytes())
        return digest

    monkeypatch.setattr(images, "_hashed", hashed)
    info = read_image(root, "a.png", BYTE_LIMIT)
    assert info is not None
    assert info.width == 50
    assert info.sha256 == sha256(path.read_bytes()).hexdigest()
    changes = iter([1] * 99)
    numbers = iter(range(1, 99))
    monkeypatch.setattr(
        images, "_hashed", lambda f, n: (os.utime(path, ns=(next(numbers), next(numbers))), "x")[1]
    )
    assert reason(root, "a.png") == "changing"


def test_swapping_a_file_for_a_link_never_reads_the_link(root: Path, tmp_path: Path) -> None:
    """Swapping a file for a link while it is read never reads the link."""
    save(tmp_path / "secret.png", size=(77, 77))
    plain = save(root / "a.png")

    def swap() -> None:
        (root / "link").symlink_to(tmp_path / "secret.png")
        os.replace(root / "link", plain)
        save(root / "plain")
        os.replace(root / "plain", plain)

    seen: set[int | str] = set()
    with repeated(swap):
        for _ in range(1_500):
            try:
                info = read_image(root, "a.png", BYTE_LIMIT)
                seen.add(info.width if info else 0)
            except ImageRefused as refused:
                seen.add(refused.reason)
    assert 77 not in seen
    assert {30, "link"} <= seen


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(list(KINDS)),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 2_000),
)
def test_damaged_files_are_answered_or_refused(
    root: Path, kind: str, changes: list[tuple[int, int]], cut: int
) -> None:
    """A file with changed or missing bytes is answered or refused, and raises no other error."""
    content = bytearray(save(root / "x", kind, (8, 8)).read_bytes()[: cut or None])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    (root / "x").write_bytes(content)
    assert outcome(root, "x") in ("answered", "content", "pixels")


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    magic=st.sampled_from(
        [
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"RIFF\x10\0\0\0WEBP",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"MM\0*",
        ]
    ),
    rest=st.binary(max_size=600),
)
def test_random_bytes_behind_any_magic_are_answered_or_refused(
    root: Path, magic: bytes, rest: bytes
) -> None:
    """Random bytes behind any magic number are answered or refused, and raise no other error."""
    (root / "x").write_bytes(magic + rest)
    assert outcome(root, "x") in ("answered", "content", "pixels")
