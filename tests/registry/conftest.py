"""An exported model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_encoder import export


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """An exported model folder with an untrained encoder of one channel."""
    folder = str(tmp_path / "run" / "model")
    export(folder)
    return folder
