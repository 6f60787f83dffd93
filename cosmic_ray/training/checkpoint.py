"""Checkpoints on disk or S3: published whole, verified when read, and no pickle anywhere.

    <checkpoints>/step-00000050/weights.safetensors     every network's weights, `network.parameter`
                                ema.safetensors         their averages, where there are any
                                optimizer.safetensors   AdamW's state, `network.parameter/exp_avg`...
                                state.json              step, cursor, job
                                manifest.json           sizes and digests; last: without it there is no checkpoint

The format does not know how many workers wrote it or how they shared the tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from cosmic_ray import storage
from cosmic_ray.errors import DataError, FencedError, NotFoundError
from cosmic_ray.output import MANIFEST, encode, read_manifest

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "cosmic-ray/checkpoint", 1
WEIGHTS, EMA, OPTIMIZER, STATE = "weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
_SPARE_BYTES = 64 * 2**20

Tensors = Mapping[str, "torch.Tensor"]


def within(out: str) -> str:
    """The folder of all checkpoints of the run at `out`."""
    return storage.join(out, "checkpoints")


def folder(checkpoints: str, step: int) -> str:
    """The URI of the checkpoint after `step` steps."""
    return storage.join(checkpoints, f"step-{step:08}")


def publish(
    checkpoints: str, step: int, files: Mapping[str, Callable[[], Tensors]], state: Mapping[str, Any], nbytes: int
) -> str:
    """Write the checkpoint after `step` steps; return its URI.

    Args:
        checkpoints: the folder of all checkpoints.
        files: name -> what makes its tensors (on the CPU), called one after another so that only one is in memory.
        state: what `state.json` holds.
        nbytes: about what all files take, to refuse before the disk is full.

    Raises:
        DataError: where there is no room; the checkpoints before it are untouched.
        FencedError: where this checkpoint is there already.
    """
    from safetensors.torch import save

    where = folder(checkpoints, step)
    require_room(where, nbytes)
    entries = {}
    for name, tensors in files.items():
        entries[name] = _write(storage.join(where, name), save({k: t.contiguous() for k, t in tensors().items()}))
    entries[STATE] = _write(storage.join(where, STATE), encode(state))
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": entries}
    try:
        storage.create_bytes(storage.join(where, MANIFEST), encode(manifest))
    except FileExistsError:
        raise FencedError(f"{where}: another run published this checkpoint first") from None
    return where


def newest(checkpoints: str) -> str | None:
    """The URI of the newest whole checkpoint; None where there is none."""
    steps = _published(checkpoints)
    return folder(checkpoints, steps[-1]) if steps else None


def retain(checkpoints: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed publications left behind."""
    published = _published(checkpoints)
    kept = set(published[-keep:])
    for step in published:
        if step not in kept:
            storage.delete(storage.join(folder(checkpoints, step), MANIFEST))
    for step in _present(checkpoints) - kept:
        storage.delete(folder(checkpoints, step))


def read_state(uri: str) -> dict[str, Any]:
    """`state.json` of the checkpoint at `uri`.

    Raises:
        DataError: where it is missing, of an unknown version, or not what was written.
    """
    return json.loads(_read(uri, STATE))


def read_tensors(uri: str, name: str) -> dict[str, torch.Tensor]:
    """One file of the checkpoint at `uri`, on the CPU, after its digest was verified.

    Raises:
        NotFoundError: where the checkpoint has no such file.
        DataError: where it is not what was written.
    """
    from safetensors.torch import load

    return load(_read(uri, name))


def names(uri: str) -> list[str]:
    """The files of the checkpoint at `uri`."""
    return sorted(_manifest(uri)["files"])


def digest(uri: str) -> str:
    """Hex digest of the weights of the checkpoint at `uri`: equal weights, equal digests."""
    return _manifest(uri)["files"][WEIGHTS]["xxh3_128"]


def require_room(uri: str, nbytes: int) -> None:
    """Raise DataError where the disk that `uri` lies on has no room for `nbytes` and a little more."""
    if not storage.is_local(uri):
        return
    path = storage.local_path(uri)
    while not path.exists():
        path = path.parent
    free = room(path)
    if free < nbytes + _SPARE_BYTES:
        problem = f"{free / 1e6:,.0f} MB are free here and a checkpoint takes about {nbytes / 1e6:,.0f} MB"
        raise DataError(uri, problem, "free disk space and run the same file again; older checkpoints are whole")


def room(path: Path) -> int:
    """Free bytes on the disk that holds `path`."""
    return shutil.disk_usage(path).free


def _write(uri: str, data: bytes) -> dict[str, Any]:
    storage.write_bytes(uri, data)
    return {"nbytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def _manifest(uri: str) -> dict[str, Any]:
    manifest = read_manifest(uri)
    if manifest.get("format") != FORMAT:
        raise DataError(uri, f"not a checkpoint: its format is {manifest.get('format')!r}")
    if manifest.get("version") != VERSION:
        problem = f"checkpoint version {manifest.get('version')!r}; this code reads {VERSION}"
        raise DataError(uri, problem, "update cosmic-ray")
    return manifest


def _read(uri: str, name: str) -> bytes:
    entry = _manifest(uri)["files"].get(name)
    where = storage.join(uri, name)
    if entry is None:
        raise NotFoundError(where, "this checkpoint has no such file")
    data = storage.read_bytes(where)
    if len(data) != entry["nbytes"] or xxhash.xxh3_128_hexdigest(data) != entry["xxh3_128"]:
        problem = f"not what was written: {len(data):,} of {entry['nbytes']:,} bytes, or another digest"
        raise DataError(where, problem, "delete this checkpoint's folder to go on from the one before it")
    return data


def _published(checkpoints: str) -> list[int]:
    return sorted(_steps(storage.listing(checkpoints, f"step-*/{MANIFEST}")))


def _present(checkpoints: str) -> set[int]:
    return _steps(storage.listing(checkpoints, "step-*/*"))


def _steps(uris: list[str]) -> set[int]:
    found = (re.search(r"/step-(\d+)/[^/]+$", uri) for uri in uris)
    return {int(match[1]) for match in found if match}
