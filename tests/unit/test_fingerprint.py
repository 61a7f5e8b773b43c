"""The fingerprint tells two releases apart by the shape of their values and by nothing else."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter, create_model
from pydantic_core import core_schema
from typing_extensions import TypedDict

from stillroom.fingerprint import fingerprint


def of(type: Any, version: object = None) -> bytes:
    return fingerprint(type, TypeAdapter(type), version)


def model(**fields: Any) -> Any:
    """Make a release's model; all models have one name."""
    return create_model("Product", **fields)


def test_a_field_more_less_or_of_another_type_is_another_shape() -> None:
    """A field more, less or of another type changes the fingerprint, also deep inside and with a default."""
    shapes = [
        model(id=(int, ...)),
        model(id=(int, ...), price=(float, ...)),
        model(id=(int, ...), price=(float, 0.0)),
        model(id=(int, ...), price=(Decimal, ...)),
        model(id=(int, ...), title=(str, ...)),
        model(id=(int, ...), price=(float | None, ...)),
        model(id=(int, ...), parts=(list[model(id=(int, ...))], ...)),
        model(id=(int, ...), parts=(list[model(id=(str, ...))], ...)),
        list[model(id=(int, ...))],
        *(int, str, dict[str, int], dict[str, Any], TypedDict("Row", {"id": int})),
    ]
    prints = [of(shape) for shape in shapes]
    assert len(set(prints)) >= len(shapes) - 1, (
        "whether a field that is there has a default is no matter"
    )
    assert all(len(one) == 8 for one in prints)


def test_what_is_said_to_people_is_no_shape() -> None:
    """Docstrings and titles do not change the fingerprint."""

    class Product(BaseModel):
        """A product in its first wording."""

        id: int = Field(7, description="its number", title="No.", examples=[1])

    earlier = of(Product)

    class Product(BaseModel):  # type: ignore[no-redef]
        """A product in better words."""

        id: int = Field(8)

    assert of(Product) == earlier


def test_a_version_is_part_of_it() -> None:
    """A version changes the fingerprint, for a change that the schema does not show."""
    assert len({of(int), of(int, 0), of(int, 1), of(int, 2)}) == 4
    assert of(Any) == b""
    assert of(Any, "2026-11") != b""
    assert of(int, 1) == of(int, "1")


@dataclasses.dataclass
class Thing:
    tags: set[str]
    size: int = 3


def test_it_is_the_same_in_every_process() -> None:
    """The fingerprint is the same in every process, whatever the order of sets and the addresses of classes."""
    program = (
        "from pydantic import TypeAdapter; from stillroom.fingerprint import fingerprint\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\nclass Thing:\n    tags: set[str]\n    size: int = 3\n"
        "print(fingerprint(Thing, TypeAdapter(Thing)).decode())"
    )
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        )
        assert done.stdout.strip() == of(Thing)


class Odd:
    """A type of an app's own, such as the id of a document: it can be validated, and says no schema."""

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        return core_schema.no_info_plain_validator_function(lambda value: value)


def test_a_type_without_a_schema_has_a_fingerprint_all_the_same() -> None:
    """A type without a schema has a fingerprint of its version, if there is one."""
    assert of(Odd) != b""
    assert of(Odd, 1) != of(Odd, 2)


def test_a_part_without_a_schema_hides_no_other_part() -> None:
    """A field more or of another type changes the fingerprint also beside a field whose type has no schema."""
    shapes = [
        model(id=(Odd, ...)),
        model(id=(Odd, ...), price=(int, ...)),
        model(id=(Odd, ...), price=(int | None, ...)),
        model(id=(Odd | None, ...), price=(int, 0)),
        list[model(id=(Odd, ...), price=(str, ...))],
    ]
    assert len({of(shape) for shape in shapes}) == len(shapes)


def test_a_default_without_json_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """The fingerprint of a type with a default that has no JSON says nothing to anybody."""
    assert of(model(id=(Any, object()), price=(int, 0))) != of(model(id=(Any, object())))
    assert not recwarn
