"""URIs to bytes: local paths, `file://` and `s3://` by the same calls; every write is whole or not at all.

Endpoint, region and credentials of S3 come from the usual AWS variables, files and instance roles. A public bucket is
read without credentials as `s3://anonymous@bucket/prefix`, so that one job can read there and write to its own bucket.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from cosmic_ray.errors import DataError, JobError, NotFoundError

ANONYMOUS = "s3://anonymous@"
RETRY_DEADLINE_S = 120.0
T = TypeVar("T")


def is_local(uri: str) -> bool:
    """Whether `uri` lies on this machine's file systems (a shared mount counts: only its user can know)."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI."""
    return Path(uri.removeprefix("file://"))


def absolute(uri: str) -> str:
    """`uri` with a relative local path made absolute, so that it means the same in every process."""
    return str(local_path(uri).expanduser().absolute()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...` with single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path inside it.

    Raises:
        JobError: for a scheme that is neither a path, `file://` nor `s3://`.
    """
    if is_local(uri):
        return _local_filesystem(), str(local_path(uri).expanduser().absolute())
    scheme, _, rest = uri.partition("://")
    if scheme != "s3":
        raise JobError("uri", uri, f"unknown scheme {scheme!r}", "use a path, file:// or s3://")
    return _s3_filesystem(uri.startswith(ANONYMOUS), os.getpid()), rest.removeprefix("anonymous@")


@functools.cache
def _local_filesystem() -> Any:
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem()


@functools.cache
def _s3_filesystem(anonymous: bool, pid: int) -> Any:
    """One per process: a forked child must not share its parent's event loop and connections."""
    import s3fs

    config = {"retries": {"max_attempts": 5, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 30}
    return s3fs.S3FileSystem(anon=anonymous, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)


def read_bytes(uri: str) -> bytes:
    """The whole of one object.

    Raises:
        DataError: where it is missing or access is refused.
    """
    fs, path = filesystem(uri)
    return _retried(uri, lambda: fs.cat_file(path))


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes of one object from byte `start`.

    Raises:
        DataError: where it is missing, access is refused, or it ends before `start + length`.
    """
    fs, path = filesystem(uri)
    data = _retried(uri, lambda: fs.cat_file(path, start=start, end=start + length))
    if len(data) != length:
        raise DataError(uri, f"ends early: {len(data)} of {length} bytes at offset {start}", "the object is truncated")
    return data


def read_json(uri: str) -> Any:
    """One JSON object.

    Raises:
        DataError: where it is missing or not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(uri, f"not valid JSON: {error}") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Write one object, replacing what is there; a reader sees the old bytes or the new, never a part."""
    fs, path = filesystem(uri)
    if is_local(uri):
        _replace_local(Path(path), data)
    else:
        _retried(uri, lambda: fs.pipe_file(path, data))


def create_bytes(uri: str, data: bytes) -> None:
    """Write one object only where none is: a hard link on disk, a conditional put on S3.

    Raises:
        FileExistsError: where there is one already.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        _create_local(Path(path), data)
    else:
        _retried(uri, lambda: fs.pipe_file(path, data, mode="create"))


def exists(uri: str) -> bool:
    """Whether an object or a folder is there now."""
    fs, path = filesystem(uri)
    return bool(_retried(uri, lambda: fs.exists(path)))


def size(uri: str) -> int:
    """Bytes of one object.

    Raises:
        DataError: where it is missing.
    """
    fs, path = filesystem(uri)
    return int(_retried(uri, lambda: fs.size(path)))


def listing(uri: str, pattern: str = "**") -> list[str]:
    """URIs of the objects below the folder `uri` whose path matches `pattern` (`*.json`, `**/*.tif`), sorted.

    A missing folder is an empty one.
    """
    fs, path = filesystem(uri)
    found = _retried(uri, lambda: fs.glob(join(path, pattern), detail=True))
    files = [key for key, about in found.items() if about["type"] == "file"]
    prefix = "" if is_local(uri) else ANONYMOUS if uri.startswith(ANONYMOUS) else "s3://"
    return sorted(prefix + key for key in files if not name(key).startswith(".part-"))


def delete(uri: str) -> None:
    """Remove an object or a whole folder; a missing one is no error."""
    fs, path = filesystem(uri)

    def remove() -> None:
        try:
            fs.rm(path, recursive=True)
        except FileNotFoundError:
            return

    _retried(uri, remove)


def open_read(uri: str) -> IO[bytes]:
    """A seekable file-like object for readers that fetch ranges (Parquet).

    Raises:
        DataError: where it is missing.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        return _retried(uri, lambda: open(path, "rb"))
    return _retried(uri, lambda: fs.open(path, "rb", cache_type="none"))


def _replace_local(path: Path, data: bytes) -> None:
    part = _write_part(path, data)
    try:
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _create_local(path: Path, data: bytes) -> None:
    part = _write_part(path, data)
    try:
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write_part(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                str(path), f"no room left for {len(data):,} bytes", "free disk space and run again"
            ) from error
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _sync_folder(folder: Path) -> None:
    """Without it a crash of the machine may forget the new name although the bytes are safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retried(uri: str, call: Callable[[], T]) -> T:
    """Call until it answers or the deadline passes, backing off with jitter; turn final errors into `DataError`."""
    deadline = time.monotonic() + RETRY_DEADLINE_S
    pause = 0.2
    while True:
        try:
            return call()
        except FileExistsError:
            raise
        except FileNotFoundError:
            raise NotFoundError(uri, "not found") from None
        except PermissionError as error:
            raise DataError(uri, f"access refused: {error}", "check the credentials and the bucket's policy") from None
        except Exception as error:
            if is_local(uri) or not _transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise DataError(uri, f"no answer for {RETRY_DEADLINE_S:.0f} s: {error}", "is the server up?") from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 10.0)


def _transient(error: BaseException) -> bool:
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError

    if isinstance(error, NoCredentialsError | ParamValidationError):
        return False
    return isinstance(error, OSError | BotoCoreError | TimeoutError)
