"""What MLflow imports to load a registered model: `mlflow.pyfunc.load_model("models:/...").predict(crops)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class _Predictor:
    def __init__(self, folder: str):
        from cosmic_ray.registry.load import load_model

        self._model = load_model(folder)

    def predict(self, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """What the model's signature says; `params` are its parameters."""
        return self._model.predict(model_input, **(params or {}))


def _load_pyfunc(folder: str) -> _Predictor:
    """MLflow's entry point."""
    return _Predictor(folder)
