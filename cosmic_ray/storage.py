"""URIs to bytes: local paths, `file://` and `s3://` by the same calls; every write is whole or not at all.

Endpoint, region and credentials of S3 come from the usual AWS variables, files and instance roles. A public bucket is
read without credentials as `s3://anonymous@bucket/prefix`, so that one job can read there and write to its own bucket.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cosmic_ray import s3
from cosmic_ray.errors import DamagedError, DataError, JobError, NotFoundError

_PART = ".part-"
_STALE_S = 24 * 3600.0
_PIECE = 64 * 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_local(uri: str) -> bool:
    """Whether `uri` lies on this machine's file systems (a shared mount counts: only its user can know).

    Raises:
        JobError: for a scheme that is neither a path, `file://` nor `s3://`.
    """
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in ("file", "s3"):
        raise JobError("uri", uri, f"unknown scheme {scheme!r}", "use a path, file:// or s3://")
    return scheme != "s3" or not separator


def local_path(uri: str) -> Path:
    """The path of a local URI, made absolute."""
    return Path(uri.removeprefix("file://")).expanduser().absolute()


def absolute(uri: str) -> str:
    """`uri` with a relative local path made absolute, so that it means the same in every process."""
    return str(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...` with single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def read_bytes(uri: str) -> bytes:
    """The whole of one object.

    Raises:
        NotFoundError: where it is missing.
        DataError: where access is refused or storage does not answer.
    """
    if not is_local(uri):
        return s3.get(uri)
    with _local_errors(uri):
        return local_path(uri).read_bytes()


def read_range(uri: str, start: int, length: int, room: memoryview | None = None) -> bytes | memoryview:
    """`length` bytes of one object from byte `start`.

    `room`: at least so many writable bytes, which may be used for them: fresh memory for each read of megabytes costs
    several times what the reading does.

    Raises:
        DamagedError: where it ends before `start + length`.
    """
    if not length:
        return b""
    if not is_local(uri):
        data = s3.get_range(uri, start, length)
    else:
        with _local_errors(uri), open(local_path(uri), "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(length) if room is None else room[: file.readinto(room[:length])]
    if len(data) != length:
        problem = f"ends early: {len(data)} of {length} bytes at offset {start}"
        raise DamagedError(uri, problem, "the object is truncated")
    return data


def read_json(uri: str) -> Any:
    """One JSON object.

    Raises:
        DataError: as `read_bytes`, and where it is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(uri, f"not valid JSON: {error}") from None


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write one object, replacing what is there; a reader sees the old bytes or the new, never a part.

    Raises:
        DataError: where there is no room, access is refused or storage does not answer; what was there stays.
    """
    if not is_local(uri):
        return s3.put(uri, data)
    path = local_path(uri)
    with _local_errors(uri), _part(path, data) as part:
        os.replace(part, path)
    _sync_folder(path.parent)


def create_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write one object only where none is: a hard link on disk, a conditional put on S3.

    Raises:
        FileExistsError: where there is one already.
        DataError: as `write_bytes`.
    """
    if not is_local(uri):
        return s3.put(uri, data, create=True)
    path = local_path(uri)
    with _local_errors(uri), _part(path, data) as part:
        created = _linked(part, path)
    if not created:
        raise FileExistsError(uri)
    _sync_folder(path.parent)


def exists(uri: str) -> bool:
    """Whether an object or a folder is there now."""
    if is_local(uri):
        with _local_errors(uri):
            return local_path(uri).exists()
    key = s3.locate(uri).key
    return bool(key and s3.exists(uri)) or any(s3.keys(uri, f"{key}/" if key else "", limit=1))


def size(uri: str) -> int:
    """Bytes of one object.

    Raises:
        NotFoundError: where it is missing.
    """
    if not is_local(uri):
        return s3.size(uri)
    with _local_errors(uri):
        return local_path(uri).stat().st_size


def listing(uri: str, pattern: str = "**") -> list[str]:
    """URIs of the objects below the folder `uri` whose path matches `pattern`, sorted; a missing folder is empty.

    In a pattern `*` and `?` stop at slashes, `**/` stands for any number of folders, none included: `*.json`,
    `**/*.tif`, `plate-?/[A-H]*.png`. What an interrupted write left behind is not listed.
    """
    deep = "/" in pattern or "**" in pattern
    if is_local(uri):
        root = str(local_path(uri))
        paths = _walk(root, deep)
    else:
        place = s3.locate(uri)
        root = (s3.ANONYMOUS if place.anonymous else s3.SCHEME) + join(place.bucket, place.key).rstrip("/")
        prefix = place.key + "/" if place.key else ""
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        paths = (key[len(prefix) :] for key in s3.keys(uri, prefix + fixed, deep))
    matches = _glob(pattern).fullmatch
    return sorted(join(root, path) for path in paths if matches(path) and not name(path).startswith(_PART))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The path of an object on this machine; from afar it is copied to the temporary disk (TMPDIR) for the block."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder, name(uri)), size(uri)
        with open(path, "wb") as file:
            for start in range(0, whole, _PIECE):
                file.write(read_range(uri, start, min(_PIECE, whole - start)))
        yield path


def delete(uri: str) -> None:
    """Remove an object or a whole folder; a missing one is no error.

    Raises:
        DataError: where access is refused, or `uri` is a whole bucket.
    """
    if not is_local(uri):
        key = s3.locate(uri).key
        if not key:
            raise DataError(uri, "a whole bucket is not deleted", "name a prefix in it")
        return s3.delete(uri, [key, *s3.keys(uri, key + "/")])
    path = local_path(uri)
    with _local_errors(uri):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sweep(uri: str) -> None:
    """Remove what writes that were killed on this machine left below the local folder `uri`, and other such files of
    more than a day. (On S3 nothing is left but unfinished multipart uploads: a lifecycle rule of the bucket ends them.)
    """
    if not is_local(uri):
        return
    for path in local_path(uri).rglob(f"{_PART}*"):
        host, pid, _ = path.name.removeprefix(_PART).rsplit("-", 2)
        with _local_errors(uri), suppress(FileNotFoundError):  # its writer has just given it its name
            dead = host == socket.gethostname() and not psutil.pid_exists(int(pid))
            if dead or time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink(missing_ok=True)


def _walk(root: str, deep: bool) -> Iterator[str]:
    """Paths of files below `root`, relative to it; linked folders are entered, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or not deep:
            folders.clear()
        if real in seen:
            continue
        seen.add(real)
        yield from (os.path.relpath(os.path.join(folder, file), root) for file in files)


def _glob(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def regex(part: str) -> str:
        if part in wild:
            return wild[part]
        is_set = part.startswith("[") and part.endswith("]")
        return part.replace("[!", "[^", 1) if is_set else re.escape(part)

    return re.compile("".join(map(regex, parts)), re.DOTALL)


@contextmanager
def _part(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """`data` in a file beside `path`, on disk to stay, for the block to give it its name; gone after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{_PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _linked(part: Path, path: Path) -> bool:
    """Give `part` the name `path` as well; False where that is taken."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Without it a crash of the machine may forget the new name although the bytes are safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(uri, "not found") from None
    except PermissionError as error:
        raise DataError(uri, f"access refused: {error.strerror}", "check who may read and write there") from None
    except OSError as error:
        remedy = "free disk space and run again" if error.errno in _FULL else ""
        raise DataError(uri, f"the file system refused: {error.strerror}", remedy) from None
