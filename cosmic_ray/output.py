"""A job's output folder: claimed by one run, filled in any order, and published by its manifest, which comes last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.errors import DataError, FencedError, JobError, NotFoundError
from cosmic_ray.lease import Lease

MANIFEST = "manifest.json"
_JOB = "job.json"


class Output:
    """A claimed output folder: data without a manifest does not exist; a killed run leaves data to resume from."""

    def __init__(self, uri: str, lease: Lease):
        self.uri = uri
        self._lease = lease

    @property
    def done(self) -> bool:
        """Whether the manifest is published."""
        return storage.exists(self.at(MANIFEST))

    def manifest(self) -> dict[str, Any]:
        """The published manifest.

        Raises:
            DataError: where there is none.
        """
        return read_manifest(self.uri)

    def at(self, *parts: str) -> str:
        """The URI of something inside."""
        return storage.join(self.uri, *parts)

    def inside(self, name: str) -> Output:
        """A folder inside, under this claim, that is published by a manifest of its own."""
        return Output(self.at(name), self._lease)

    def require(self) -> None:
        """Make sure that this run still holds the claim; asks storage only where that is long ago.

        Raises:
            FencedError: where another run has taken it over.
        """
        self._lease.require()

    def write(self, name: str, data: bytes) -> None:
        """Write one object whole, replacing an older one.

        Raises:
            FencedError: where another run has taken the claim over.
        """
        self.require()
        storage.write_bytes(self.at(name), data)

    def publish(self, manifest: dict[str, Any]) -> None:
        """Publish the folder: from here on it exists.

        Raises:
            FencedError: where another run has taken the claim over, or has published.
        """
        self._lease.require(now=True)
        try:
            storage.create_bytes(self.at(MANIFEST), encode(manifest))
        except FileExistsError:
            raise FencedError(f"{self.uri}: another run published its manifest first") from None


@contextmanager
def claim(job: Job) -> Iterator[Output]:
    """Claim `job.out` for this run, alone, until the block ends; a finished output is only looked at.

    The folder remembers which job it belongs to, so that running the same file again resumes it (or finds it done) and
    another job is refused.

    Raises:
        JobError: where the folder holds another job.
        FencedError: where a live run holds it.
    """
    uri = storage.absolute(job.out)
    lease = Lease(uri)
    if storage.exists(storage.join(uri, MANIFEST)):
        _require_same_job(uri, job)
        yield Output(uri, lease)
        return
    _require_same_job(uri, job)
    lease.acquire()
    try:
        _require_same_job(uri, job)
        storage.sweep(uri)
        record = {"fingerprint": job.fingerprint(), "job": job.resolved()}
        storage.write_bytes(storage.join(uri, _JOB), encode(record))
        yield Output(uri, lease)
    finally:
        lease.release()


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a published folder.

    Raises:
        DataError: where nothing is published at `uri`, or the manifest is not one JSON object.
    """
    at = storage.join(uri, MANIFEST)
    try:
        manifest = json.loads(manifest_bytes(uri))
    except ValueError as error:
        raise DataError(at, f"not valid JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise DataError(at, f"not a manifest but a JSON {type(manifest).__name__}")
    return manifest


def manifest_bytes(uri: str) -> bytes:
    """The stored bytes of the manifest of a published folder.

    Raises:
        NotFoundError: where nothing is published at `uri`.
    """
    try:
        return storage.read_bytes(storage.join(uri, MANIFEST))
    except NotFoundError:
        problem = f"nothing is published here: no {MANIFEST}"
        raise NotFoundError(uri, problem, "did the job that makes it end?") from None


def encode(value: dict[str, Any]) -> bytes:
    """JSON with sorted keys, so that equal content is equal bytes: one top-level key a line, each value compact."""
    lines = [f"{json.dumps(key)}: {canonical(value[key]).decode()}" for key in sorted(value)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def canonical(value: Any) -> bytes:
    """The one compact JSON text of a value; digests of JSON are taken of this.

    Raises:
        ValueError: for NaN and infinity, which JSON does not have.
    """
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def _require_same_job(uri: str, job: Job) -> None:
    try:
        record = storage.read_json(storage.join(uri, _JOB))
    except NotFoundError:
        return
    if record.get("fingerprint") == job.fingerprint():
        return
    then, now = record.get("job", {}), job.resolved()
    changed = sorted(key for key in {*then, *now} - {"out"} - job.incidental if then.get(key) != now.get(key))
    raise JobError(
        "out",
        job.out,
        f"holds another job: it differs in {', '.join(changed)}",
        "choose another out, or delete that folder",
    )
