"""Cell-type accuracy: a classifier fitted on REAL train cells, chosen on val, that judges generated ones (App. C)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from cosmic_ray import storage
from cosmic_ray.config import Config, validate
from cosmic_ray.errors import CosmicError, DamagedError, DataError
from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.accuracy import Scores, class_numbers, classification_scores
from cosmic_ray.output import encode

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "cosmic-ray/cell-type-classifier", 1
WEIGHTS, CONFIG = "classifier.safetensors", "classifier.json"


class ClassifierSettings(Config):
    """How a cell-type classifier is trained: AdamW on a class-weighted cross-entropy, images flipped at random."""

    epochs: int = Field(default=30, ge=1)
    """Passes over the train cells; the one with the highest balanced accuracy on val is kept (ties: lowest loss)."""

    batch: int = Field(default=64, ge=2)
    """Cells a step."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate, constant."""

    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""

    size: int = Field(default=128, ge=16)
    """Images are resized to this side in pixels; transcriptomes take no notice."""

    seed: int = Field(default=0, ge=0)
    """Of initial weights, order, flips and dropout."""


class ClassifierConfig(Config):
    """`classifier.json`."""

    format: Literal["cosmic-ray/cell-type-classifier"] = FORMAT
    """Names this format."""

    version: Literal[1] = VERSION
    """Version of this format."""

    kind: Literal["images", "expression"]
    """What it looks at."""

    shape: tuple[int, ...]
    """Of one input: (C, H, H) or (G,)."""

    genes: tuple[str, ...] | None
    """Names of the G inputs, where they were given."""

    classes: tuple[str, ...]
    """The cell types it knows, sorted."""

    settings: ClassifierSettings
    """How it was trained."""

    train_cells: dict[str, int]
    """Train cells of each class; the loss weighs a class by 1 / (classes x its share of train cells)."""

    epoch: int
    """The one that was kept, from 1."""

    val_balanced_accuracy: float
    """What it was kept for: optimistic, for it was chosen by this."""

    lineage: dict[str, Any]
    """What it was fitted on, as the caller told it: store, split, parts."""

    weights_sha256: str = ""
    """Of the bytes of `classifier.safetensors`."""


class CellTypeClassifier:
    """Fit / predict / save / load; see `fit`."""

    def __init__(self, config: ClassifierConfig, network: torch.nn.Module):
        self.config, self.network = config, network

    @classmethod
    def fit(
        cls,
        train: np.ndarray,
        train_labels: np.ndarray,
        val: np.ndarray,
        val_labels: np.ndarray,
        settings: ClassifierSettings | None = None,
        *,
        genes: Sequence[str] | None = None,
        lineage: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> CellTypeClassifier:
        """Train on real train cells, keep the epoch that is best on val.

        On the CPU the same seed, data and number of threads give the same weights, bit for bit.

        Args:
            train: images, uint8 (N, C, H, H): the paper's CNN; or normalised expression, real numbers (N, G): its MLP.
            train_labels: cell types (N,), two at least.
            val: as `train`, other cells.
            val_labels: cell types, all of which occur in train.
            settings: see there.
            genes: names of the G columns; then later input must name its genes too, in any order.
            lineage: kept with the classifier: what it was fitted on.
            device: where torch trains and predicts.

        Raises:
            ValueError: for wrong dtypes or shapes, NaN, missing labels, a single class, labels that train lacks.
            JobError: where training diverges.
        """
        from cosmic_ray.evaluation.metrics import fitting

        settings = settings or ClassifierSettings()
        kind = "images" if np.ndim(train) == 4 else "expression"
        shape = _checked(train, kind, "train")
        if _checked(val, kind, "val") != shape:
            raise ValueError(f"val: cells of shape {val.shape[1:]}, but those of train have {shape}")
        names = arrays.names_of(train_labels, "train_labels", len(train))
        classes, counts = np.unique(names, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"train_labels: only {str(classes[0])!r}; two cell types are needed at least")
        if genes is not None:
            _columns(genes, genes, shape)
        config = ClassifierConfig(
            kind=kind,
            shape=shape,
            genes=None if genes is None else tuple(genes),
            classes=tuple(classes.tolist()),
            settings=settings,
            train_cells=dict(zip(classes.tolist(), counts.tolist(), strict=True)),
            epoch=0,
            val_balanced_accuracy=0.0,
            lineage=dict(lineage or {}),
        )
        truth = class_numbers(names, config.classes, "train_labels", len(train))
        val_truth = class_numbers(val_labels, config.classes, "val_labels", len(val))
        return cls(*fitting.trained(config, (train, truth), (val, val_truth), device))

    def probabilities(self, inputs: np.ndarray, genes: Sequence[str] | None = None) -> np.ndarray:
        """float32 (N, classes), rows adding up to 1, columns as `config.classes`.

        Args:
            inputs: as in `fit`: the same dtype, channels and size, or the same genes.
            genes: names of the columns of `inputs`, in any order, more than needed if need be: required where the
                classifier knows names.

        Raises:
            ValueError: for another dtype or shape, NaN, or genes that are missing: they are named.
        """
        from cosmic_ray.evaluation.metrics import networks

        shape = _checked(inputs, self.config.kind, "inputs")
        columns = self._order(genes, shape)
        if columns is None and shape != self.config.shape:
            raise ValueError(f"inputs: cells of shape {shape}, but the classifier takes {self.config.shape}")
        logits = networks.logits(self.network, self.config, inputs, columns)
        return np.concatenate([part.softmax(1).cpu().numpy() for part in logits])

    def predict(self, inputs: np.ndarray, genes: Sequence[str] | None = None) -> np.ndarray:
        """The likeliest cell type of each input, str (N,); arguments and errors as in `probabilities`."""
        return np.asarray(self.config.classes)[self.probabilities(inputs, genes).argmax(1)]

    def score(
        self, inputs: np.ndarray, labels: np.ndarray, genes: Sequence[str] | None = None, confidence: float = 0.95
    ) -> Scores:
        """Accuracy with its Wilson interval, balanced accuracy and confusion matrix of labelled cells.

        Raises:
            ValueError: as `probabilities`, and for labels that the classifier does not know: they are named.
        """
        class_numbers(labels, self.config.classes, "labels", len(inputs))
        return classification_scores(labels, self.predict(inputs, genes), self.config.classes, confidence)

    def save(self, uri: str) -> None:
        """Write `classifier.safetensors` and, last, `classifier.json` to a folder or `s3://bucket/prefix`."""
        from safetensors.torch import save

        weights = save({name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()})
        config = self.config.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
        storage.delete(storage.join(uri, CONFIG))
        storage.write_bytes(storage.join(uri, WEIGHTS), weights)
        storage.write_bytes(storage.join(uri, CONFIG), encode(config.model_dump(mode="json")))

    @classmethod
    def load(cls, uri: str, device: str = "cpu") -> CellTypeClassifier:
        """Read what `save` wrote.

        Raises:
            NotFoundError: where nothing is saved.
            DataError: for another format, an unknown version, or weights that are not the ones that were written.
        """
        from safetensors.torch import load

        from cosmic_ray.evaluation.metrics import networks

        where = storage.join(uri, CONFIG)
        tree = storage.read_json(where)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise DataError(where, f"not a {FORMAT} file")
        if tree.get("version") != VERSION:
            raise DataError(where, f"format version {tree.get('version')!r}; this code reads {VERSION}")
        try:
            config = validate(ClassifierConfig, tree)
        except CosmicError as error:
            raise DataError(where, str(error)) from None
        weights = storage.read_bytes(storage.join(uri, WEIGHTS))
        if hashlib.sha256(weights).hexdigest() != config.weights_sha256:
            raise DamagedError(storage.join(uri, WEIGHTS), "not the weights that were written", "copy the folder again")
        network = networks.build(config)
        try:
            network.load_state_dict(load(weights))
        except RuntimeError as error:
            raise DamagedError(where, f"the weights do not fit it: {error}", "copy the folder again") from None
        return cls(config, network.to(device).eval().requires_grad_(False))

    def _order(self, genes: Sequence[str] | None, shape: tuple[int, ...]) -> np.ndarray | None:
        if self.config.genes is None:
            if genes is not None:
                raise ValueError(
                    "genes: named, but the classifier was fitted without names: it cannot tell their order"
                )
            return None
        if genes is None:
            raise ValueError("genes: not named, but the classifier was fitted on named genes")
        return _columns(genes, self.config.genes, shape)


def _checked(inputs: np.ndarray, kind: str, name: str) -> tuple[int, ...]:
    """The shape of one input, once the inputs are known to be good."""
    if kind == "expression":
        return arrays.matrix(inputs, name).shape[1:]
    if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[2] != inputs.shape[3] or not len(inputs):
        raise ValueError(f"{name}: {inputs.dtype} {inputs.shape}, but images must be uint8 (N >= 1, C, H, H)")
    return inputs.shape[1:]


def _columns(given: Sequence[str], wanted: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Where the wanted genes stand among the given ones, which name the columns of inputs of `shape`."""
    place = {gene: column for column, gene in enumerate(given)}
    if len(given) != shape[0] or len(place) != len(given):
        raise ValueError(f"genes: {len(place)} different names in {len(given)} for inputs of shape {shape}")
    missing = [gene for gene in wanted if gene not in place]
    if missing:
        raise ValueError(f"genes: {len(missing)} of {len(wanted)} are missing: {', '.join(missing[:10])}")
    return np.array([place[gene] for gene in wanted])
