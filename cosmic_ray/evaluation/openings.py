"""The test part is opened once: every evaluation of it leaves a record beside the split, before it looks at a cell."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.output import canonical

FOLDER = "opened"


def open_test(split_uri: str, job: Mapping[str, Any], fingerprint: str, hashes: Mapping[str, Any]) -> str:
    """Write `<split>/opened/<key>.json`, unless this evaluation of the same inputs did so before; return the key.

    The record stays when the evaluation is deleted. It lies with the split and not with the results, so that what was
    judged elsewhere counts too. (A copy of the split has the records up to its copying.)

    Raises:
        JobError: where nothing can be written there: an opening that nobody counts is none that can be defended.
    """
    key = hashlib.sha256(canonical({"fingerprint": fingerprint, "inputs": hashes})).hexdigest()[:16]
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"key": key, "opened": stamp, "inputs": hashes, "job": job}
    try:
        storage.create_bytes(storage.join(split_uri, FOLDER, f"{key}.json"), canonical(record))
    except FileExistsError:
        pass
    except DataError as error:
        remedy = "judge `part: val`, or copy the split to where you may write"
        raise JobError("split", split_uri, f"the opening of test cannot be recorded: {error.problem}", remedy) from None
    return key


def openings(split_uri: str) -> list[dict[str, Any]]:
    """All records of a split, the oldest first."""
    found = [storage.read_json(uri) for uri in storage.listing(storage.join(split_uri, FOLDER), "*.json")]
    return sorted(found, key=lambda record: (record["opened"], record["key"]))
