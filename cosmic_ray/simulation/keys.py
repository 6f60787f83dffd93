"""Randomness by key: what is drawn for a plate, field or purpose depends on its name alone."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def keyed(seed: int, *parts: str | int) -> np.random.Generator:
    """A counter-based generator for (seed, *parts): the same key gives the same numbers in any order and process."""
    digest = hashlib.blake2b(json.dumps([seed, *parts]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))
