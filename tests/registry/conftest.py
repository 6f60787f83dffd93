"""Real MLflow stores, and an exported model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_encoder import export


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of one embedded MLflow store for the session (making one takes seconds); MLFLOW_TRACKING_URI points there."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """An exported model folder with an untrained encoder of one channel."""
    folder = str(tmp_path / "run" / "model")
    export(folder)
    return folder
