"""Tell the values of one release of an app from those of another, by the shape of their type. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

LENGTH = 8  # hexadecimal digits
# The parts of a schema for people, and those that are not in a stored value.
NOT_SHAPE = frozenset({"title", "description", "examples", "default", "deprecated"})


def fingerprint(type: Any, adapter: TypeAdapter[Any], version: object = None) -> bytes:
    """Return 8 digits that change with the fields and types of a value, and with `version`.

    Nothing where neither is known: of an untyped value every release makes the same of its JSON. Docstrings, titles
    and defaults are not part of a shape; nor is anything that differs from process to process.
    """
    if type is Any and version is None:
        return b""
    shape = json.dumps([_schema(adapter), "" if version is None else str(version)], sort_keys=True)
    return hashlib.sha256(shape.encode()).hexdigest()[:LENGTH].encode()


class _Schema(GenerateJsonSchema):
    """Describe what can be described of a type: a part of it may have validators and no schema."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Say nothing of a default that has no JSON. It is no part of a shape."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        """Return the schema of anything."""
        return {}


def _schema(adapter: TypeAdapter[Any]) -> Any:
    try:
        return _shape(adapter.json_schema(by_alias=True, schema_generator=_Schema))
    except Exception:  # the app describes it by itself, and fails
        return None


def _shape(schema: Any, *, is_names: bool = False) -> Any:
    """Return the schema without texts for people. A mapping of names to schemas keeps every name."""
    if isinstance(schema, dict):
        return {
            name: _shape(part, is_names=not is_names and name in ("properties", "$defs"))
            for name, part in schema.items()
            if is_names or name not in NOT_SHAPE
        }
    return [_shape(part) for part in schema] if isinstance(schema, list) else schema
