"""A mistake in a template or registration is answered where it is made."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy.orm import Session

from stillroom import (
    InvalidArgument,
    InvalidKey,
    NoDispatch,
    RedisUnavailable,
    Settings,
    Stillroom,
    UnknownLoader,
)
from stillroom.cache.declared import result_of
from stillroom.cache.loaders import BadArguments
from stillroom.integrations.model_tags import ModelTags
from stillroom.integrations.sqlalchemy import AfterCommit
from stillroom.web.pages import Pages


class Parcel(BaseModel):
    label: Label | None = None


def parcel() -> Parcel:
    return Parcel()


EARLY = Stillroom(Settings(), dispatch=NoDispatch()).cache.cached("parcel")(parcel)


class Label(BaseModel):
    text: str


@pytest.fixture
def room() -> Stillroom:
    return Stillroom(Settings(), dispatch=NoDispatch())


def test_a_class_may_be_defined_below_the_loader(room: Stillroom) -> None:
    """A loader whose type names a class that is defined below it has the release that it has in every process."""
    late = room.cache.cached("parcel")(parcel)
    versioned = room.cache.cached("other", name="other", version=2)(parcel)
    assert EARLY.loader.release == late.loader.release != versioned.loader.release


def test_a_name_is_registered_once(room: Stillroom) -> None:
    """A loader's name is registered once, because a message could not tell two of them apart."""

    def load(id: int) -> int:
        return id

    room.cache.cached("a:{id}")(load)
    with pytest.raises(ValueError, match="a loader named 'load' exists already"):
        room.cache.cached("b:{id}")(load)
    room.cache.cached("b:{id}", name="load-b")(load)
    assert room.cache.loaders.names() == ["load", "load-b"]


def test_loaders_of_several_threads_are_all_registered(room: Stillroom) -> None:
    """None is lost where modules with loaders are imported in several threads at once."""
    before, threads = sys.getswitchinterval(), 4

    def load(number: int) -> int:
        return number

    def module(thread: int) -> None:
        for one in range(40):
            room.cache.cached(f"{thread}:{one}:{{number}}", name=f"{thread}.{one}")(load)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(module, range(threads)))
    finally:
        sys.setswitchinterval(before)
    assert len(room.cache.loaders.names()) == threads * 40


def test_a_key_belongs_to_one_loader(room: Stillroom) -> None:
    """A key belongs to one loader, because two would serve each other's values."""
    room.cache.cached("a:{id}", name="one")(lambda id: id)  # noqa: A006
    with pytest.raises(ValueError, match=r"two: the loader 'one' has the key 'a:\{id\}'"):
        room.cache.cached("a:{id}", name="two")(lambda id: id)  # noqa: A006


def test_a_key_has_one_loader_whatever_its_parameters_are_called(room: Stillroom) -> None:
    """Two loaders whose keys differ only in the names of parameters are refused: a slug "7" would be the id 7."""
    room.cache.cached("a:{id}", name="one")(lambda id: id)  # noqa: A006
    said = r"the loader 'one' has the key 'a:\{id\}', which is the same for the same arguments"
    with pytest.raises(ValueError, match=said):
        room.cache.cached("a:{slug}", name="two")(lambda slug: slug)
    room.cache.cached("a:{id}:{slug}", name="more")(lambda id, slug: id)  # noqa: A006
    room.cache.cached("b:{id}", name="other")(lambda id: id)  # noqa: A006


@pytest.mark.parametrize(
    ("forgotten", "call"),
    [
        ("a:{id}", lambda room: room.cache.invalidate("b:7", "a:{id}")),
        ("tag:{id}", lambda room: room.cache.invalidate_by_tag("tags", "tag:{id}", defer=True)),
        ("a:{id}", lambda room: room.cache.invalidate_by_pattern("a:{id}")),
        ("a:{id}", lambda room: room.tasks.invalidate_keys("a:{id}")),
        ("tag:{id}", lambda room: room.tasks.invalidate_tags("tag:{id}")),
        ("a:{id}", lambda room: room.tasks.invalidate_pattern("a:{id}")),
        ("tag:{id}", lambda room: AfterCommit(room).invalidate_by_tag(Session(), "tag:{id}")),
        ("a:{id}", lambda room: AfterCommit(room).invalidate(Session(), "a:{id}")),
        ("a:{id}", lambda room: room.cache.invalidate_many(["b:7", "a:{id}"])),
        ("a:{id}", lambda room: room.cache.set("a:{id}", 1)),
        ("tag:{id}", lambda room: room.cache.set("b:7", 1, tags=["tag:{id}"])),
        ("a:{id}", lambda room: room.cache.set_many({"a:{id}": 1})),
        ("tag:{id}", lambda room: room.cache.set_many({"b:7": 1}, tags="tag:{id}")),
        ("a:{id}", lambda room: room.cache.add("a:{id}", 1)),
        ("tag:{id}", lambda room: room.cache.add("b:7", 1, tags=["tag:{id}"])),
        ("a:{id}", lambda room: room.cache.get_or_set("a:{id}", lambda: 1)),
        ("tag:{id}", lambda room: room.cache.get_or_set("b:7", lambda: 1, tags=["tag:{id}"])),
        ("a:{id}", lambda room: room.cache.get_or_set_many(["a:{id}"], lambda keys: {})),
        ("a:{id}", lambda room: room.cache.incr("a:{id}")),
        ("a:{id}", lambda room: room.cache.touch("a:{id}")),
        ("page:{id}", lambda room: room.cache.invalidate_by_tag("page:{id}")),
        ("page:{id}", lambda room: room.cache.set("b:7", 1, tags=["page:{id}"])),
    ],
)
def test_a_template_is_no_key_and_no_tag(
    room: Stillroom, forgotten: str, call: Callable[[Stillroom], object]
) -> None:
    """A template of a loader or a page in the place of a key or a tag, whose f was forgotten, is refused.

    An invalidation would reach no entry, and a value would be everybody's.
    """
    room.cache.cached("a:{id}", tags=["tag:{id}", "tags"], name="one")(lambda id: id)  # noqa: A006
    Pages(room).page(tags=["page:{id}"], name="one")(lambda id: id)  # noqa: A006
    with pytest.raises(InvalidKey, match=re.escape(f"did you mean f{forgotten!r}?")):
        call(room)
    with pytest.raises(InvalidKey, match="a str, not list"):  # what is no text is told as such
        AfterCommit(room).invalidate(Session(), ["a:{id}"])  # type: ignore[arg-type]
    with pytest.raises(RedisUnavailable):  # it goes on to Redis, which is not there
        room.cache.invalidate_by_tag("tags", "tag:{ID}", "tag:7")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("brand:<brand>", "brand:{brand}"),
        ("brand:<string(length=2):brand>:x", "brand:{brand}:x"),
        ("{id}:%(brand)s", "{id}:{brand}"),
        ("brand:$brand", "brand:{brand}"),
        ("brand:{{ brand }}", "brand:{brand}"),
    ],
)
def test_a_parameter_of_another_language_is_refused(
    room: Stillroom, written: str, meant: str
) -> None:
    """A parameter written as paths, format strings or other templates write it is refused with what was meant.

    It would stand in the tags of all values as it is written, and no invalidation would reach one of them.
    """
    said = "did you mean '.*" + re.escape(f"{meant}'?")
    with pytest.raises(InvalidKey, match=said):
        room.cache.cached("a:{id}:{brand}", tags=[written], name="one")(lambda id, brand: id)  # noqa: A006
    with pytest.raises(InvalidKey, match=said):
        room.cache.cached(f"a:{written}", ignore=["id", "brand"], name="one")(lambda id, brand: id)  # noqa: A006
    with pytest.raises(InvalidKey, match=said):
        Pages(room).page(tags=[written], name="one")(lambda id, brand: id)  # noqa: A006
    with pytest.raises(InvalidKey, match=said):
        ModelTags("Product", [written], ["id", "brand"])


def test_signs_of_other_languages_may_stand_beside_parameters(room: Stillroom) -> None:
    """What means no parameter, or one that is in braces as well, is text as any other."""
    tags = ["<b>", "{id}$id", "$brands", "%(ID)s", "{{a}}", "100 %"]
    room.cache.cached("<id>:{id}", tags=tags, name="one")(lambda id: id)  # noqa: A006
    assert room.cache.loaders["one"].tag_templates == tags


@pytest.mark.parametrize(
    ("tags", "said"),
    [(["x" * 2_000], "1 to 1,024 bytes"), ([f"t{n}" for n in range(1_001)], "1,001 were given")],
)
def test_a_tag_that_no_entry_can_have_is_refused_where_it_is_written(
    room: Stillroom, tags: list[str], said: str
) -> None:
    """Constant tags that are too long, or too many, are refused at the loader: its values could never be kept."""
    with pytest.raises((InvalidKey, InvalidArgument), match=said):
        room.cache.cached("k", tags=tags, name="x")(lambda: 1)
    room.cache.cached("k", tags=["{{a}}", "x" * 1_000], name="x")(lambda: 1)


@pytest.mark.parametrize("name", ["with space", "tab\t", "x" * 201, "ü"])
def test_a_loaders_name_is_checked_when_it_is_given(room: Stillroom, name: str) -> None:
    """A loader's name is checked when it is given, because it travels in entries and messages."""
    with pytest.raises(ValueError, match="1 to 200 letters, digits"):
        room.cache.cached("k", name=name)(lambda: 1)
    with pytest.raises(ValueError, match=r"'<lambda>': .*; give it one by name="):
        room.cache.cached("k")(lambda: 1)


def test_a_lease_is_some_time(room: Stillroom) -> None:
    """A lease of zero is refused, because nothing would ever be stored."""
    with pytest.raises(ValueError, match=r"lease=0: a number of seconds from 0\.001"):
        room.cache.cached("k", lease=0)(lambda: 1)


def test_a_coroutine_function_belongs_to_the_other_room(room: Stillroom) -> None:
    """The sync room refuses a coroutine function and names the async room."""

    async def load() -> int:
        return 1

    with pytest.raises(TypeError, match="use AsyncStillroom"):
        room.cache.cached("k")(load)


@pytest.mark.parametrize("version", [1.5, True, [1], b"1", object()])
def test_a_version_is_a_text_or_a_number(room: Stillroom, version: Any) -> None:
    """A version that is another thing is refused: its text might be another one in each process."""
    with pytest.raises(InvalidArgument, match=r"version=.*: a text or a number"):
        room.cache.cached("k", version=version)(len)


def test_an_argument_that_is_no_key_is_named(room: Stillroom) -> None:
    """The error of an argument that can't stand in a key says which loader and which parameter it was given to."""

    @room.cache.cached("k:{a}:{b}")
    def load(a: int, b: Any) -> int:
        return a

    with pytest.raises(InvalidArgument, match=r"^load\(\): b: object has no text"):
        load.key(1, object())


def test_a_template_is_not_empty(room: Stillroom) -> None:
    """An empty key or tag is refused where it is written."""
    for key, tags in (("", []), ("k", [""])):
        with pytest.raises(InvalidKey, match="a template has at least one character"):
            room.cache.cached(key, name="k", tags=tags)(lambda: 1)


def test_only_plain_parameters(room: Stillroom) -> None:
    """A loader has plain parameters only, because a message carries arguments by name. The error says what else."""

    def several(*ids: int) -> int:
        return len(ids)

    def named(**names: int) -> int:
        return len(names)

    def placed(id: int, /) -> int:
        return id

    for load, instead in (
        (several, "take one list"),
        (named, "name each"),
        (placed, "leave out the /"),
    ):
        with pytest.raises(TypeError, match=f"plain named parameters only, .*; {instead}"):
            room.cache.cached("k")(load)


def test_a_type_that_cannot_be_found_is_named(room: Stillroom) -> None:
    """A class inside a function is named in the error when annotations that are text cannot find it."""

    class Local:
        pass

    def load() -> Local:
        return Local()

    with pytest.raises(TypeError, match="load: name 'Local' is not defined"):
        room.cache.cached("k")(load)


class Lazy:
    """Stands for `type Id = Unknown`, which Python 3.12 looks up when somebody asks for it."""

    @property
    def __value__(self) -> Any:
        raise NameError("name 'Unknown' is not defined")


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ("re.Produkt", "can't be read: AttributeError: module 're' has no attribute 'Produkt'"),
        ("'Product' | None", "can't be read: TypeError: unsupported operand"),
        ("list[int", "can't be read: SyntaxError"),
        (Lazy(), "name 'Unknown' is not defined"),
        ([int], r"is no type; write list\[int\]"),
    ],
)
def test_a_type_that_can_not_be_read_names_its_loader(
    room: Stillroom, annotation: Any, said: str
) -> None:
    """A type that can't be read is refused with the loader's name, and as no other error besides."""

    def load(id: Any) -> int:
        return 1

    load.__annotations__["id"] = annotation
    with pytest.raises(InvalidArgument, match=f"^load: .*{said}") as refused:
        room.cache.cached("k:{id}")(load)
    assert refused.value.__context__ is None or refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2, 3), {}), ((1,), {"id": 2}), ((1,), {"x": 2}), ((), {"id": 1, "x": 2})],
)
def test_a_wrong_call_is_the_same_type_error(room: Stillroom, args: Any, kwargs: Any) -> None:
    """A wrong call raises the TypeError that the function itself would raise."""

    @room.cache.cached("k:{id}", ignore=["brand"])
    def load(id: int, brand: str = "acme") -> int:
        return id

    with pytest.raises(TypeError):
        load(*args, **kwargs)


def test_arguments_from_a_message_are_checked(room: Stillroom) -> None:
    """Arguments from a message are checked against the signature's types, and unknown ones are refused."""

    @room.cache.cached("k:{id}:{brand}")
    def load(id: int, brand: str = "acme") -> int:
        return id

    loader = room.cache.loaders["load"]
    assert loader.validated({"id": "7", "brand": "b"}) == {"id": 7, "brand": "b"}
    for bad in ({"id": "x", "brand": "b"}, {"id": 1}, {"id": 1, "brand": "b", "extra": 1}):
        with pytest.raises(BadArguments):
            loader.validated(bad)
    with pytest.raises(UnknownLoader, match="no loader named 'lod'; registered: load"):
        room.cache.loaders["lod"]


def test_what_does_not_fit_a_loader_is_told_of_the_first_fields(room: Stillroom) -> None:
    """A message with thousands of odd arguments is refused in one short line, whatever their names hold."""

    @room.cache.cached("k:{id}")
    def load(id: int) -> int:
        return id

    odd = {f"{n}\n\x1b[31m{'x' * 500}": n for n in range(5_000)}
    with pytest.raises(BadArguments) as refused:
        room.cache.loaders["load"].validated({"id": 1, **odd})
    assert str(refused.value).isprintable()
    assert str(refused.value).endswith("; and 4,995 more")
    assert len(str(refused.value)) < 1_000


def test_a_type_is_looked_up_in_the_functions_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type named by text is that of the function's module, which may have the lines of another or be reloaded."""
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = "from __future__ import annotations\nclass Item: ...\ndef load() -> Item: ...\n"
    for name in ("some_items", "other_items"):
        (tmp_path / f"{name}.py").write_text(lines)
    some, other = map(importlib.import_module, ("some_items", "other_items"))
    assert some.load.__code__ == other.load.__code__
    assert result_of(some.load) is some.Item
    assert result_of(other.load) is other.Item
    before = some.Item
    importlib.reload(some)
    assert result_of(some.load) is some.Item is not before
