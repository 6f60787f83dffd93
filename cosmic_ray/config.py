"""What all jobs share: the typed base, YAML, dotted overrides, errors that name the key and the nearest valid name."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cosmic_ray.errors import ABSENT, JobError, JobErrors


class UriMark:
    """Marks a type as `Uri`."""


Uri = Annotated[str, UriMark()]
"""Text that names a place: a path, `file://`, `s3://`, `models:/`, or a tracking server."""


class Config(BaseModel):
    """A frozen, closed set of typed keys. A string under a field is that key's help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Job(Config):
    """One job: a YAML file with `kind:`. Its schema lives beside its code; heavy imports stay inside `run`."""

    kind: ClassVar[str]

    out: Uri
    """Where the results go: a folder or `s3://bucket/prefix`. The same job run again resumes, or finds it done."""

    def check(self) -> None:
        """Look at the world before anything starts: inputs exist, resources suffice.

        Raises:
            JobError: naming the key, its value and the remedy.
        """

    def run(self) -> dict[str, Any]:
        """Do the work and return its results, JSON-serialisable, for `--json`."""
        raise TypeError(f"{type(self).__name__} does not say how it runs")

    def nested(self) -> Mapping[str, Job]:
        """The jobs inside this one, by the key where each stands."""
        return {}

    def untold_tracking(self) -> str | None:
        """The key that would say where MLflow is, where this job needs it and leaves that to the environment."""
        return None

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included; `kind` first."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def fingerprint(self) -> str:
        """Hex digest of what the job computes: every key but `out` and those of `incidental`."""
        kept = {key: value for key, value in self.resolved().items() if key != "out" and key not in self.incidental}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    incidental: ClassVar[frozenset[str]] = frozenset()
    """Top-level keys that change how, not what (parallelism, tracking): a resumed run may differ in them."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (`1e-4` is a float) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+([eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML with a safe loader.

    Raises:
        JobError: naming `name` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise JobError(name, ABSENT, f"not valid YAML: {error}") from None


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `tree` with each dotted `a.b.c=value` laid over it; values are read as YAML.

    Raises:
        JobError: for an override that is not `key=value` or that walks into a value that is no mapping.
    """
    result = _copied(tree)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise JobError(text, ABSENT, "an override is written key=value", "for example scaling.workers=2")
        *parents, leaf = path.split(".")
        node = result
        for depth, part in enumerate(parents):
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                where = ".".join(parents[: depth + 1])
                raise JobError(path, value, f"{where} is {child!r}, which has no keys of its own")
            node = child
        node[leaf] = parse_yaml(value, path)
    return result


def validate(model: type[Config], tree: Any, prefix: str = "") -> Any:
    """Make a `model` from plain data.

    Raises:
        JobError: one for each key that is unknown, missing, or ill-typed, with its path, value and nearest valid name.
    """
    if not isinstance(tree, dict):
        raise JobError(prefix or "job", tree, "expected a mapping of keys to values")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = [_job_error(model, tree, item, prefix) for item in error.errors(include_url=False)]
    raise found[0] if len(found) == 1 else JobErrors(found)


def _job_error(model: type[Config], tree: Any, item: dict[str, Any], prefix: str) -> JobError:
    path = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join([*([prefix] if prefix else []), *map(str, path)]) or "job"
    if item["type"] == "extra_forbidden":
        names = _names_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(sorted(names))}"
        return JobError(key, item["input"], "unknown key", remedy)
    if item["type"] == "missing":
        return JobError(key, ABSENT, "missing", "this key has no default")
    value = item.get("input", ABSENT)
    if item["type"] == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", item["msg"]), n=1)
        return JobError(key, value, item["msg"], f"did you mean {near[0]!r}?" if near else "")
    return JobError(key, value, item["msg"].removeprefix("Value error, "))


def _names_at(model: Any, path: list[Any]) -> list[str]:
    """The field names valid below `path`, walking through optional, union, list and mapping types."""
    nodes = [model]
    for part in path:
        nodes = [step for node in nodes for step in _children(node, part)]
    return [name for node in nodes if _is_config(node) for name in node.model_fields]


def _children(node: Any, part: Any) -> list[Any]:
    if _is_config(node):
        field = node.model_fields.get(part)
        return _unfold(field.annotation) if field else [node]
    return [node]


def _unfold(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, list, tuple, dict):
        return [leaf for argument in typing.get_args(annotation) for leaf in _unfold(argument)]
    return [annotation]


def _is_config(node: Any) -> bool:
    return isinstance(node, type) and issubclass(node, Config)


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
