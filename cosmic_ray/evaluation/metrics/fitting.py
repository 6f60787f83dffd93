"""How a cell-type classifier is trained: `classifier.CellTypeClassifier.fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from cosmic_ray.errors import JobError
from cosmic_ray.evaluation.metrics import arrays, networks
from cosmic_ray.evaluation.metrics.accuracy import balanced_accuracy
from cosmic_ray.ingest.augment import flip

if TYPE_CHECKING:
    from cosmic_ray.evaluation.metrics.classifier import ClassifierConfig

Labelled = tuple[np.ndarray, np.ndarray]
"""Inputs (N, ...) and the numbers of their classes, int64 (N,)."""


def trained(
    config: ClassifierConfig, train: Labelled, val: Labelled, device: str
) -> tuple[ClassifierConfig, torch.nn.Module]:
    """The config told which epoch was kept, and the network of that epoch; global random states stay as they were.

    Raises:
        JobError: where training diverges.
    """
    settings = config.settings
    best, kept, chosen = (-1.0, 0.0), {}, 0
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(settings.seed)
        network = networks.build(config)
        if config.kind == "expression":
            _standardise(network, train[0])
        network.to(device)
        weights = _class_weights(config).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
        for epoch in range(settings.epochs):
            _one_epoch(network.train(), config, train, weights, optimiser, epoch)
            judged = _judged(network.eval(), config, val, weights)
            if judged > best:
                best, chosen = judged, epoch + 1
                kept = {name: values.clone() for name, values in network.state_dict().items()}
    network.load_state_dict(kept)
    told = config.model_copy(update={"epoch": chosen, "val_balanced_accuracy": best[0]})
    return told, network.eval().requires_grad_(False)


def _class_weights(config: ClassifierConfig) -> torch.Tensor:
    """Such that every class weighs the same in all, and train cells weigh 1 on average."""
    counts = torch.tensor([config.train_cells[name] for name in config.classes])
    return counts.sum() / (len(counts) * counts)


def _standardise(network: networks.ExpressionClassifier, expression: np.ndarray) -> None:
    """Set `centre` and `scale` from train; a gene that is constant there gets scale 0, for nothing is learnt of it."""
    centre, scale = np.zeros((2, expression.shape[1]))
    for genes in arrays.blocks(expression.shape[1], 8 * len(expression)):
        values = expression[:, genes].astype(np.float64)
        varies = np.ptp(values, axis=0) > 0
        centre[genes] = values.mean(0)
        scale[genes] = np.divide(1.0, values.std(0), out=np.zeros(len(varies)), where=varies)
    network.centre.copy_(torch.from_numpy(centre))
    network.scale.copy_(torch.from_numpy(scale))


def _one_epoch(
    network: torch.nn.Module,
    config: ClassifierConfig,
    train: Labelled,
    weights: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    epoch: int,
) -> None:
    inputs, truth = train
    settings, device = config.settings, weights.device
    for rows in torch.randperm(len(inputs)).split(settings.batch):
        seen = networks.tensor(inputs[rows.numpy()], config, device)
        if config.kind == "images":
            seen = flip(seen, settings.seed, (rows + epoch * len(inputs)).to(device))
        target = torch.from_numpy(truth[rows.numpy()]).to(device)
        loss = F.cross_entropy(network(seen), target, weights)
        if not loss.isfinite():
            raise JobError("lr", settings.lr, "the classifier's loss is not finite any more", "lower it")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _judged(
    network: torch.nn.Module, config: ClassifierConfig, val: Labelled, weights: torch.Tensor
) -> tuple[float, float]:
    """Balanced accuracy, and the loss with its sign turned: of both, higher is better."""
    logits = torch.cat(list(networks.logits(network, config, val[0])))
    loss = F.cross_entropy(logits, torch.from_numpy(val[1]).to(logits.device), weights)
    return balanced_accuracy(val[1], logits.argmax(1).cpu().numpy()), -float(loss)
