"""A small store with its split, and searches on it."""

from __future__ import annotations

import pytest
from training_jobs import Crops


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Crops:
    return Crops.make(str(tmp_path_factory.mktemp("tuning")))
