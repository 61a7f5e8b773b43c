"""Describe image files: size, type, hash, time, width and height. Each version of a file is read once, then cached.

The key is `image:<name>@<size>-<mtime in ns>`, so one stat tells whether the cached answer is about the file as it
is: a file that changed has another key. Files are found under one configured root only, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from stillroom.cache.body import CacheBody
from stillroom.cache.failures import is_of_the_caller
from stillroom.cache.sharded import ShardedBody
from stillroom.errors import ImageRefused, ImagesUnavailable, LoadFailed, in_code
from stillroom.keys import sanitized
from stillroom.operation import Call, Operation

# Formats whose header can be read without decoding the picture, the most frequent first, and what browsers call
# them: a camera's second picture behind a JPEG, or a PNG that moves, makes no other type of it.
FORMATS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
TURNED = (5, 6, 7, 8)  # EXIF orientations whose width is shown as the height
ORIENTATION = 0x0112  # its tag in EXIF
CHUNKS = 1_000  # of a PNG that are passed over in search of its EXIF
# Atomic: what has matched is not tried in another way. To do so with 40 comments would take for ever.
SVG = re.compile(
    rb"(?>\s+|<\?xml[^>]*\?>|<!--.*?-->|<!DOCTYPE[^>]*>)*+<svg[\s>]", re.DOTALL | re.IGNORECASE
)
SVG_WITHIN = 4_096  # bytes
NAME_LIMIT = 512  # bytes of a file's name with its folders
ESCAPED_LIMIT = 900  # bytes of the same in a key, where a `%` takes three
TRIES = 3  # to read a file that is being written
CHUNK = 256 * 1024
# No link is followed; a FIFO does not wait for a writer.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
OPEN_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
# Errors that say nothing of the file: this process has no descriptor left, or its disk does not answer.
OF_THE_MACHINE = frozenset(
    (*(errno.EMFILE, errno.ENFILE, errno.ENOMEM), *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT))
)


class ImageInfo(BaseModel):
    """One version of an image file."""

    model_config = ConfigDict(frozen=True)

    filename: str
    size: int  # bytes
    type: str  # from its content: "image/png"
    sha256: str  # of its bytes, hexadecimal
    timestamp: float  # its modification time, seconds since 1970
    width: int  # pixels, as it is shown: a photo that says that it lies on its side is turned
    height: int


class Answer(BaseModel):
    """Hold the cached answer about a file: its description, or why it is refused."""

    info: ImageInfo | None = None
    reason: str = ""
    sentence: str = ""


class Images:
    """The operations on images, whose answers are in a cache. A driver of that runs them."""

    def __init__(self, cache: CacheBody | ShardedBody) -> None:
        self._cache = cache
        self._settings = cache.settings

    def get_image_info(self, filename: str) -> Operation[ImageInfo | None]:
        """Return size, type and dimensions of an image under `image_root`, or None if there is no such file.

        Cost: one stat, and one MGET; if the file is new or has changed, one caller of all processes reads it.
        A missing file costs the stat alone. Raises ImageRefused for what is no image, too large, or no plain file
        under the root (answered from the cache too, while the file does not change), ImagesUnavailable without
        `image_root`, that folder or Pillow, or where this machine can't read just now. Redis away: the file is
        read.
        """
        name, root = normalised(filename), self._image_root()
        for _ in range(TRIES):
            version = yield Call(fingerprint, (root, name))
            if version is None:
                return None
            try:
                answer = yield from self._answer_for(root, name, version)
            except OtherVersion:
                continue
            break
        else:
            raise ImageRefused(
                name, "changing", f"the file changed between two looks, {TRIES} times"
            )
        if answer.info is None:
            raise ImageRefused(name, answer.reason, answer.sentence)
        check_pixels(answer.info, self._settings.image_pixel_limit)
        return answer.info

    def _answer_for(self, root: Path, name: str, version: str) -> Operation[Answer]:
        """Return what the cache says of this version. Limits are this process's own, so they are in no answer."""
        limit = self._settings.image_byte_limit
        _check_bytes(name, int(version.partition("-")[0]), limit)
        call = Call(_answer, (root, name, version, limit))
        recipe = self._cache.recipe(call, [tag_of(name)], Answer)
        key = sanitized(f"{tag_of(name)}@{version}")
        try:
            answer: Answer = yield from self._cache.obtain(key, recipe)
        except LoadFailed:  # another process has read it for us, and does not say all of the reason
            answer = yield call
        return answer

    def invalidate_image(self, filename: str, *, defer: bool = False) -> Operation[None]:
        """Forget what is known of an image. It is needed only if the file changed and its size and time did not.

        Redis away: RedisUnavailable. `defer`: see `invalidate`.
        """
        yield from self._cache.invalidate_by_tag(tag_of(normalised(filename)), defer=defer)

    def _image_root(self) -> Path:
        if self._settings.image_root is None:
            raise ImagesUnavailable(
                "STILLROOM_IMAGE_ROOT is not set: it names the folder of the images"
            )
        return self._settings.image_root


def normalised(filename: str) -> str:
    """Return the one spelling of a file's name, `logos/acme.png`. Raises ImageRefused for what names no file under
    a root.
    """
    if not isinstance(filename, str):
        raise ImageRefused(in_code(filename), "name", "a file's name is a str")
    if any(ord(letter) < 32 or letter in "\\\x7f" for letter in filename):
        raise ImageRefused(
            filename, "name", "no control characters or backslashes in a file's name"
        )
    parts = [part for part in filename.split("/") if part not in ("", ".")]
    if filename.startswith("/") or ".." in parts or not parts:
        raise ImageRefused(
            filename, "name", "a file's name is relative to the root and stays under it"
        )
    name = "/".join(parts)
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ImageRefused(filename, "name", "a file's name has a UTF-8 form") from None
    if length > NAME_LIMIT:
        raise ImageRefused(
            filename, "name", f"a file's name has up to {NAME_LIMIT} bytes, not {length:,}"
        )
    if length + 2 * name.count("%") > ESCAPED_LIMIT:
        raise ImageRefused(
            filename,
            "name",
            f"a file's name has up to {ESCAPED_LIMIT} bytes; each % counts as three",
        )
    return name


def fingerprint(root: Path, name: str) -> str | None:
    """Return `<size>-<mtime in ns>`, or None if there is no such file. One stat."""
    try:
        found = os.stat(root / name, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        if not root.is_dir():
            raise _without_root(root, "there is no such folder") from None
        return None
    except OSError as error:
        raise _unreadable(name, error) or ImageRefused(
            name, "denied", error.strerror or "it can't be looked at"
        ) from None
    return _version(found)


class OtherVersion(Exception):
    """The file is not the version that was asked for, any more or yet."""


def read_image(
    root: Path,
    name: str,
    byte_limit: int,
    *,
    version: str | None = None,
) -> ImageInfo | None:
    """Return the description of a file, or None if there is no such file. Raises ImageRefused, ImagesUnavailable.

    `version`: raise OtherVersion if what was opened is not this fingerprint's version.
    """
    for _ in range(TRIES):
        with _opened(root, name) as file:
            if file is None:
                return None
            before = os.fstat(file.fileno())
            if version not in (None, _version(before)):
                raise OtherVersion
            _check_bytes(name, before.st_size, byte_limit)
            try:
                digest = _hashed(file, byte_limit)
                kind, (width, height) = _header(file, name)
            except OSError as error:
                raise _unreadable(name, error) or error from None
            after = os.fstat(file.fileno())
        if digest is None or _version(before) != _version(after):
            continue  # another process is writing it just now
        return ImageInfo(
            filename=name,
            size=before.st_size,
            type=kind,
            sha256=digest,
            timestamp=before.st_mtime_ns / 1e9,
            width=width,
            height=height,
        )
    raise ImageRefused(name, "changing", f"the file changed while it was read, {TRIES} times")


def _check_bytes(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ImageRefused(name, "bytes", f"it has {size:,} bytes; the limit is {limit:,}")


def check_pixels(info: ImageInfo, limit: int) -> None:
    """Raise ImageRefused for an image of more pixels than `limit`, or of none."""
    if info.width * info.height > limit or min(info.width, info.height) < 1:
        sentence = f"it has {info.width:,} × {info.height:,} pixels; the limit is {limit:,}"
        raise ImageRefused(info.filename, "pixels", sentence)


def _answer(root: Path, name: str, version: str, byte_limit: int) -> Answer:
    """Return what is said of this version and of no other: its description, or why it is refused.

    The answer is kept under the version's key, and the version may come back (a rollback that keeps the time). So a
    refusal that ends without a change of the file is raised, not kept.
    """
    try:
        info = read_image(root, name, byte_limit, version=version)
    except ImageRefused as refused:
        if refused.reason in ("changing", "denied", "bytes"):
            raise
        return Answer(reason=refused.reason, sentence=refused.sentence)
    if info is not None:
        return Answer(info=info)
    if fingerprint(root, name) == version:  # it is there, but not for who follows no link
        raise ImageRefused(name, "link", "one of its folders is a link, and no link is followed")
    raise OtherVersion


@contextmanager
def _opened(root: Path, name: str) -> Iterator[IO[bytes] | None]:
    """Open the file through its folders, each opened in the one before, so that none can be swapped."""
    *folders, last = name.split("/")
    try:
        descriptors = [os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    except OSError as error:
        raise _without_root(root, error.strerror or "it can't be opened") from None
    try:
        for folder in folders:
            descriptors.append(os.open(folder, OPEN_FOLDER, dir_fd=descriptors[-1]))
        descriptor = os.open(last, OPEN_FILE, dir_fd=descriptors[-1])
    except (FileNotFoundError, NotADirectoryError):
        yield None  # a folder that is a link is none
        return
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ImageRefused(name, "link", "it is a link, and no link is followed") from None
        reason = "special" if error.errno == errno.ENXIO else "denied"
        raise _unreadable(name, error) or ImageRefused(
            name, reason, error.strerror or "it can't be opened"
        ) from None
    finally:
        for one in descriptors:
            os.close(one)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageRefused(name, "special", "the file is no plain file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _without_root(root: Path, why: str) -> ImagesUnavailable:
    return ImagesUnavailable(f"STILLROOM_IMAGE_ROOT is {root}: {why}")


def _unreadable(name: str, error: OSError) -> ImagesUnavailable | None:
    """Return the error to raise where the machine, and not the file, is why it can't be read; else None."""
    if error.errno not in OF_THE_MACHINE:
        return None
    return ImagesUnavailable(f"{in_code(name):.100} can't be read here: {error.strerror}")


def _is_not_of_the_file(error: Exception) -> bool:
    """Return whether a reader was ended by its task's time limit, or by the machine. Its answer would be kept."""
    return is_of_the_caller(error) or getattr(error, "errno", None) in OF_THE_MACHINE


def _hashed(file: IO[bytes], byte_limit: int) -> str | None:
    """Return the SHA-256 of the whole file, or None if it grew past the limit meanwhile."""
    digest, size = sha256(), 0
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if size > byte_limit:
            return None
    return digest.hexdigest()


def _header(file: IO[bytes], name: str) -> tuple[str, tuple[int, int]]:
    """Return (type, (width, height) as shown) by Pillow's readers; Image.open warns of bombs too late."""
    try:
        from PIL import Image
    except ImportError:
        raise ImagesUnavailable('images need Pillow: pip install "stillroom[images]"') from None
    Image.preinit()
    if not FORMATS.keys() <= Image.OPEN.keys():
        Image.init()
    file.seek(0)
    start = file.read(16)
    for kind, mime in FORMATS.items():
        factory, accepts = Image.OPEN.get(kind, (None, None))
        if factory is None or accepts is None or accepts(start) is not True:
            continue
        file.seek(0)
        try:
            with factory(file, "") as image:
                width, height = image.size
                is_turned = _orientation(image, file) in TURNED
                return mime, (height, width) if is_turned else (width, height)
        except MemoryError:
            raise
        except Exception as error:  # any error that a reader raises for bytes that are no image
            if _is_not_of_the_file(error):
                raise
            sentence = f"its header is no {kind}'s ({type(error).__name__})"
            raise ImageRefused(name, "content", sentence) from None
    file.seek(0)
    if SVG.match(file.read(SVG_WITHIN).removeprefix(b"\xef\xbb\xbf")):
        raise ImageRefused(
            name, "content", "the file is an SVG, a drawing that has no pixels of its own"
        )
    raise ImageRefused(name, "content", f"the file is none of {', '.join(FORMATS)}")


def _orientation(image: Any, file: IO[bytes]) -> int:
    """Return the orientation that EXIF names, or 1. No pixel is decoded."""
    from PIL import Image

    if image.format == "TIFF":
        return 1  # Pillow has turned it already
    found = _png_exif(file) if image.format == "PNG" else image.info.get("exif")
    if not found:
        return 1
    exif = Image.Exif()
    try:
        exif.load(found)
        orientation = exif.get(ORIENTATION, 1)
    except Exception as error:  # any error that a reader raises for bytes that are no EXIF
        if _is_not_of_the_file(error):
            raise
        return 1  # browsers show such a picture as it lies
    return orientation if isinstance(orientation, int) else 1


def _png_exif(file: IO[bytes]) -> bytes | None:
    """Return the EXIF of a PNG, which may stand behind the pixels."""
    file.seek(8)
    for _ in range(CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return None
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return file.read(min(length, CHUNK))
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _version(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def tag_of(name: str) -> str:
    return f"image:{name}"
