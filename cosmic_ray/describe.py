"""What a kind of job takes: every key with its type, default and meaning."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from cosmic_ray.config import Config, Job, UriMark


@dataclass(frozen=True)
class Key:
    """One key of a job file."""

    path: str
    type: str
    default: str
    meaning: str


def keys(model: type[Config], prefix: str = "") -> list[Key]:
    """The keys of `model` in order, nested ones with dotted paths: `NAME` is a mapping's key, `[]` a list's item."""
    found = []
    for name, field in _fields(model).items():
        path = f"{prefix}{name}"
        found.append(
            Key(
                path,
                type_name(field.rebuild_annotation()),
                _default(field),
                " ".join((field.description or "").split()),
            )
        )
        for inside, nested in _configs(field.annotation):
            found += keys(nested, f"{path}{inside}.")
    return found


def _fields(model: type[Config]) -> dict[str, FieldInfo]:
    """The fields of `model`: of a job, `out`, then its kind's own, then those that it shares with other kinds."""
    owner = {name: base for base in model.__mro__ for name in vars(base).get("__annotations__", ())}
    shared = [base for base in model.__mro__ if base in (Config, Job)] + list(model.__mro__)
    return dict(sorted(model.model_fields.items(), key=lambda item: shared.index(owner[item[0]])))


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
        return "URI" if any(isinstance(mark, UriMark) for mark in arguments[1:]) else type_name(arguments[0])
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
    """The default as it would stand in a job file."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Config):
        return ""
    text = yaml.safe_dump(to_jsonable_python(value, exclude_none=True), default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _configs(annotation: Any) -> list[tuple[str, type[Config]]]:
    """The sets of keys inside a type, each with what its path has between the type's own and theirs."""
    if isinstance(annotation, type):
        return [("", annotation)] if issubclass(annotation, Config) else []
    inside = {dict: ".NAME", list: "[]", tuple: "[]"}.get(typing.get_origin(annotation), "")
    found = [nested for argument in typing.get_args(annotation) for nested in _configs(argument)]
    return [(inside + deeper, config) for deeper, config in found]
