"""What a kind of job takes: every key with its type, default and meaning."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cosmic_ray.config import Config, Job


@dataclass(frozen=True)
class Key:
    """One key of a job file."""

    path: str
    type: str
    default: str
    meaning: str


def keys(model: type[Config], prefix: str = "") -> list[Key]:
    """The keys of `model` in their order, nested ones with dotted paths."""
    found = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        found.append(
            Key(path, type_name(field.annotation), _default(field), " ".join((field.description or "").split()))
        )
        for nested in _configs(field.annotation):
            found += keys(nested, f"{path}.")
    return found


def schema(job: type[Job]) -> dict[str, Any]:
    """The JSON Schema of a job file of this kind, `kind` included."""
    schema = job.model_json_schema()
    schema["properties"] = {"kind": {"const": job.kind}, **schema["properties"]}
    schema["required"] = ["kind", *schema.get("required", [])]
    return schema


def type_name(annotation: Any) -> str:
    """A short name for a type, as a user would write it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (list, tuple):
        inner = ", ".join(type_name(argument) for argument in arguments if argument is not Ellipsis)
        return f"list of {inner}"
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "keys below"
    return {"str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Config):
        return ""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _configs(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for argument in typing.get_args(annotation) for found in _configs(argument)]
