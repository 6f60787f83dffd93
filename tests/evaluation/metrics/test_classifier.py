"""The cell-type classifiers: known Bayes rates, what they refuse, and that they come back as they were saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from cosmic_ray import storage
from cosmic_ray.errors import DamagedError, DataError, JobError, NotFoundError
from cosmic_ray.evaluation.metrics.classifier import CONFIG, WEIGHTS, CellTypeClassifier, ClassifierSettings
from cosmic_ray.evaluation.metrics.networks import ExpressionClassifier, ImageClassifier

QUICK = ClassifierSettings(epochs=6, batch=32, size=32, lr=3e-3)
Cells = tuple[np.ndarray, np.ndarray]


def discs(seed: int, count: int, sides: tuple[int, ...] = (5, 9, 12)) -> Cells:
    """Uint8 (count, 1, 32, 32): noisy discs, off centre, whose radius is their type."""
    random = np.random.default_rng(seed)
    labels = random.integers(len(sides), size=count)
    y, x = np.mgrid[:32, :32][:, None] - 16 - random.integers(-3, 4, (2, count, 1, 1))
    inside = x**2 + y**2 <= np.asarray(sides)[labels][:, None, None] ** 2
    crops = inside * random.integers(80, 200, (count, 32, 32))
    return crops[:, None].astype(np.uint8), np.array(["small", "middle", "large"])[labels]


def clouds(seed: int, count: int, distance: float = 2.0, rare: float = 0.5) -> Cells:
    """Float32 (count, 12): two Gaussians `distance` apart along a random direction fixed for all seeds."""
    random = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=12)
    is_b = random.random(count) < rare
    cells = random.normal(size=(count, 12)) + np.outer(is_b, direction * distance / np.linalg.norm(direction))
    return cells.astype(np.float32), np.where(is_b, "b", "a")


@pytest.fixture(scope="module")
def of_images() -> CellTypeClassifier:
    return CellTypeClassifier.fit(*discs(0, 240), *discs(1, 60), QUICK, lineage={"store": "abc"})


@pytest.fixture(scope="module")
def of_expression() -> CellTypeClassifier:
    return CellTypeClassifier.fit(*clouds(0, 1500), *clouds(1, 300), QUICK, genes=[f"g{i}" for i in range(12)])


def test_the_networks_are_the_paper_s():
    def kinds(network: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]

    assert kinds(ImageClassifier(1, 4)) == ["Conv2d"] * 4 + ["Linear"] * 2
    assert kinds(ExpressionClassifier(100, 4)) == ["Linear"] * 2


def test_images_of_separate_types_are_told_apart(of_images):
    found = of_images.score(*discs(2, 150))
    assert found.accuracy.mean > 0.95 and found.accuracy.low > 0.9
    assert found.classes == ("large", "middle", "small")
    assert found.confusion.sum() == 150


def test_expression_comes_near_the_bayes_rate(of_expression):
    cells, labels = clouds(2, 4000)
    found = of_expression.score(cells, labels, [f"g{i}" for i in range(12)])
    assert found.accuracy.mean == pytest.approx(norm.cdf(1.0), abs=0.025)


def test_generated_images_without_the_type_score_at_chance(of_images):
    crops, labels = discs(3, 150)
    found = of_images.score(np.random.default_rng(0).permutation(crops), labels)
    assert found.balanced_accuracy == pytest.approx(1 / 3, abs=0.15)


def test_weights_make_a_rare_class_count(of_expression):
    fitted = CellTypeClassifier.fit(*clouds(4, 2000, rare=0.05), *clouds(5, 600, rare=0.05), QUICK)
    found = fitted.score(*clouds(6, 4000, rare=0.5))
    # Unweighted, the best cut would lie log(19) / 2 beyond the middle, and "b" would be found in a third of cases.
    assert abs(found.recall[0] - found.recall[1]) < 0.2
    assert found.recall.min() > 0.7
    assert fitted.config.train_cells["b"] < 150


def test_the_seed_decides_and_global_randomness_is_left_alone():
    train, val = clouds(0, 200), clouds(1, 50)
    settings = ClassifierSettings(epochs=2, batch=32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = CellTypeClassifier.fit(*train, *val, settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = CellTypeClassifier.fit(*train, *val, settings).network.state_dict()
    other = CellTypeClassifier.fit(*train, *val, settings.model_copy(update={"seed": 1})).network.state_dict()
    state = first.network.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["layers.0.weight"], other["layers.0.weight"])


def test_images_too_are_deterministic():
    settings = ClassifierSettings(epochs=1, batch=32, size=32)
    states = [CellTypeClassifier.fit(*discs(0, 64), *discs(1, 20), settings).network.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_epoch_that_is_kept_is_the_best_on_val():
    train, val = clouds(0, 60, 1.0), clouds(1, 80, 1.0)

    def fitted(epochs: int) -> CellTypeClassifier:
        return CellTypeClassifier.fit(*train, *val, ClassifierSettings(epochs=epochs, batch=16, lr=0.02))

    runs = [fitted(epochs) for epochs in range(1, 8)]
    on_val = [run.score(*val).balanced_accuracy for run in runs]
    assert on_val == pytest.approx([run.config.val_balanced_accuracy for run in runs])
    assert on_val == sorted(on_val), "more epochs to choose from are never worse on val"
    assert runs[-1].config.epoch == runs[runs[-1].config.epoch - 1].config.epoch


def test_what_is_saved_comes_back(of_images, of_expression, home):
    for fitted, cells in ((of_images, discs(7, 20)[0]), (of_expression, clouds(7, 20)[0])):
        genes = fitted.config.genes
        fitted.save(home)  # the second replaces the first
        assert storage.listing(home) == [storage.join(home, CONFIG), storage.join(home, WEIGHTS)]
        loaded = CellTypeClassifier.load(home)
        assert (loaded.probabilities(cells, genes) == fitted.probabilities(cells, genes)).all()
        assert fitted.probabilities(cells, genes).sum(1) == pytest.approx(1.0, abs=1e-5)
        assert loaded.config.lineage == fitted.config.lineage and loaded.config.classes == fitted.config.classes


def test_damaged_foreign_and_missing_folders_are_refused(of_images, tmp_path):
    with pytest.raises(NotFoundError):
        CellTypeClassifier.load(str(tmp_path))
    of_images.save(str(tmp_path))
    kept = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(DamagedError, match="not the weights"):
        CellTypeClassifier.load(str(tmp_path))
    foreign = {"version 2": {"version": 2}, "not a": {"format": "x"}, "kind": {"kind": "x"}}
    for message, change in (foreign | {"do not fit": {"classes": ["large", "small"]}}).items():
        rewrite(tmp_path / CONFIG, change)
        with pytest.raises(DataError, match=message):
            CellTypeClassifier.load(str(tmp_path))
        of_images.save(str(tmp_path))


def rewrite(path: Path, change: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_genes_may_be_reordered_but_not_missing(of_expression):
    cells, _ = clouds(8, 30)
    names = np.array([f"g{i}" for i in range(12)])
    order = np.random.default_rng(0).permutation(13)
    more, more_names = np.hstack([cells, np.ones((30, 1), np.float32)])[:, order], np.append(names, "extra")[order]
    expected = of_expression.probabilities(cells, names)
    assert (of_expression.probabilities(more, more_names) == expected).all()
    with pytest.raises(ValueError, match="2 of 12 are missing: g10, g11"):
        of_expression.predict(cells[:, :10], names[:10])
    with pytest.raises(ValueError, match="not named"):
        of_expression.predict(cells)
    with pytest.raises(ValueError, match="11 different names in 12"):
        of_expression.predict(cells, [*names[:11], "g0"])


def test_a_gene_that_is_constant_in_train_says_nothing():
    (train, labels), val = clouds(0, 200), clouds(1, 50)
    train = train.astype(np.float64)
    train[:, 3] = 0.1  # their mean is not quite 0.1
    fitted = CellTypeClassifier.fit(train, labels, *val, ClassifierSettings(epochs=1))
    cells, _ = clouds(2, 40)
    moved = cells.copy()
    moved[:, 3] += 50.0
    assert (fitted.probabilities(cells) == fitted.probabilities(moved)).all()


def test_labels_that_train_does_not_know_are_refused(of_images):
    crops, labels = discs(9, 10)
    labels = labels.astype(object)
    labels[3] = "B cell"
    with pytest.raises(ValueError, match="labels: 'B cell' not among the classes large, middle, small"):
        of_images.score(crops, labels)
    with pytest.raises(ValueError, match="val_labels: 'B cell'"):
        CellTypeClassifier.fit(*discs(0, 30), crops, labels, QUICK)
    with pytest.raises(ValueError, match="only 'a'"):
        CellTypeClassifier.fit(crops, np.full(10, "a"), crops, np.full(10, "a"), QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda crops: crops / 255, "must be uint8"),
        (lambda crops: crops[:, :, :20], "must be uint8 .* H, H"),
        (lambda crops: crops.repeat(2, 1), r"cells of shape \(2, 32, 32\)"),
        (lambda crops: crops[:, :, :16, :16], r"takes \(1, 32, 32\)"),
        (lambda crops: crops[:0], "N >= 1"),
    ],
)
def test_wrong_images_are_refused(change, message, of_images):
    with pytest.raises(ValueError, match=message):
        of_images.predict(change(discs(0, 4)[0]))


def test_nan_and_a_wrong_width_are_refused():
    train, val = clouds(0, 60), clouds(1, 20)
    fitted = CellTypeClassifier.fit(*train, *val, ClassifierSettings(epochs=1))
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(np.full((2, 12), np.nan))
    with pytest.raises(ValueError, match="without names"):
        fitted.predict(val[0], [f"g{i}" for i in range(12)])
    with pytest.raises(ValueError, match=r"takes \(12,\)"):
        fitted.predict(np.zeros((2, 11)))
    with pytest.raises(ValueError, match=r"val: cells of shape \(11,\)"):
        CellTypeClassifier.fit(*train, val[0][:, :11], val[1])


def test_divergence_names_the_learning_rate():
    with pytest.raises(JobError, match="lr"):
        CellTypeClassifier.fit(*clouds(0, 200), *clouds(1, 20), ClassifierSettings(lr=1e30, epochs=3))
