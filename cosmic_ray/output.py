"""A job's output folder: claimed by one run, filled in any order, and published by its manifest, which comes last."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from cosmic_ray import storage
from cosmic_ray.config import Job
from cosmic_ray.errors import DataError, FencedError, JobError, NotFoundError

MANIFEST = "manifest.json"
_JOB, _LEASE = "job.json", "_lease.json"
_BEAT_S, _SILENT_S = 5.0, 20.0


class Output:
    """A claimed output folder: data without a manifest does not exist; a killed run leaves data to resume from."""

    def __init__(self, uri: str, lease: _Lease):
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

    def write(self, name: str, data: bytes) -> None:
        """Write one object whole, replacing an older one."""
        self._lease.require()
        storage.write_bytes(self.at(name), data)

    def publish(self, manifest: dict[str, Any]) -> None:
        """Publish the folder: from here on it exists.

        Raises:
            FencedError: where the claim was lost or another run has published.
        """
        self._lease.require()
        try:
            storage.create_bytes(self.at(MANIFEST), encode(manifest))
        except FileExistsError:
            raise FencedError(f"{self.uri}: another run published its manifest first") from None


@contextmanager
def claim(job: Job) -> Iterator[Output]:
    """Claim `job.out` for this run, alone, until the block ends.

    The folder remembers which job it belongs to, so that running the same file again resumes it (or finds it done) and
    another job is refused.

    Raises:
        JobError: where the folder holds another job.
        FencedError: where a live run holds it.
    """
    uri = storage.absolute(job.out)
    _require_same_job(uri, job)
    lease = _Lease(storage.join(uri, _LEASE))
    lease.acquire()
    try:
        record = {"fingerprint": job.fingerprint(), "job": job.resolved()}
        storage.write_bytes(storage.join(uri, _JOB), encode(record))
        yield Output(uri, lease)
    finally:
        lease.release()


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a published folder.

    Raises:
        DataError: where nothing is published at `uri`.
    """
    try:
        return storage.read_json(storage.join(uri, MANIFEST))
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
    if record["fingerprint"] == job.fingerprint():
        return
    then, now = record["job"], job.resolved()
    changed = sorted(key for key in {*then, *now} - {"out"} - job.incidental if then.get(key) != now.get(key))
    raise JobError(
        "out",
        job.out,
        f"holds another job: it differs in {', '.join(changed)}",
        "choose another out, or delete that folder",
    )


class _Lease:
    """A claim that beats: a dead owner's is taken over, a live one's refuses."""

    def __init__(self, uri: str):
        self._uri = uri
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self) -> None:
        while True:
            try:
                storage.create_bytes(self._uri, self._record(0))
                break
            except FileExistsError:
                self._evict_if_dead()
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            storage.delete(self._uri)

    def require(self) -> None:
        """Raise `FencedError` where the claim was lost."""
        if self._lost:
            raise FencedError(f"{self._uri}: this run's claim was taken over by another run")

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(_BEAT_S):
            count += 1
            try:
                if storage.read_json(self._uri)["token"] != self._token:
                    self._lost = True
                    return
                storage.write_bytes(self._uri, self._record(count))
            except NotFoundError:
                self._lost = True
                return
            except (OSError, DataError):
                continue

    def _record(self, beat: int) -> bytes:
        me = psutil.Process()
        return encode(
            {"token": self._token, "host": socket.gethostname(), "pid": me.pid, "born": me.create_time(), "beat": beat}
        )

    def _evict_if_dead(self) -> None:
        """Remove a dead owner's lease; on another host, dead means silent for `_SILENT_S` by this clock."""
        held = self._read()
        if held is None:
            return
        if held["host"] == socket.gethostname():
            alive = _alive(held["pid"], held["born"])
        else:
            time.sleep(_SILENT_S)
            alive = self._read() != held
        if alive:
            raise FencedError(
                f"{self._uri.rsplit('/', 1)[0]}: process {held['pid']} on {held['host']} is writing here; "
                "wait for it to end, or choose another out"
            )
        if self._read() == held:
            storage.delete(self._uri)

    def _read(self) -> dict[str, Any] | None:
        try:
            return storage.read_json(self._uri)
        except NotFoundError:
            return None


def _alive(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
