"""img2seq's objectives: losses by hand, any cut and any ranks, a toy whose posterior is known, what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from making_cell_stores import cells_of
from scipy import stats
from scipy.sparse import csr_matrix
from training_toys import Recorder, Samples, on_ranks, settings

from cosmic_ray.errors import JobError
from cosmic_ray.ingest import keyed
from cosmic_ray.ingest.cell_draws import CellDraws
from cosmic_ray.models.img2seq import Img2SeqConfig, normalised
from cosmic_ray.training.img2seq import NAME, CountsObjective, Img2SeqObjective
from cosmic_ray.training.img2seq_calibration import calibrate, correlations
from cosmic_ray.training.img2seq_paper import RegressionObjective, ResidualObjective
from cosmic_ray.training.img2seq_statistics import gene_programs, gene_scale, median_total, statistics
from cosmic_ray.training.loop import Loop
from cosmic_ray.training.objective import Share
from cosmic_ray.training.optim import Optim

GENES, WIDTH, TOKENS = 9, 4, 3
PAPER = Img2SeqConfig("paper", GENES, WIDTH, hidden=8, depth=0, programs=0, heads=2)
CONFIGS = {
    "better": (Img2SeqObjective, Img2SeqConfig("better", GENES, WIDTH, hidden=16, depth=1, programs=3)),
    "counts": (CountsObjective, Img2SeqConfig("better", GENES, WIDTH, "negative binomial", hidden=16, depth=1)),
    "regression": (RegressionObjective, PAPER),
    "residual": (ResidualObjective, PAPER),
}
STATISTICS = {
    "better": {
        "total": torch.tensor(40.0),
        "gene_mean": torch.linspace(0, 2, GENES),
        "gene_scale": torch.linspace(0.5, 1, GENES),
        "loadings": torch.linalg.qr(torch.randn(GENES, 3, generator=torch.Generator().manual_seed(0))).Q,
        "program_scale": torch.tensor([2.0, 1.0, 0.5]),
    },
    "counts": {"total": torch.tensor(40.0), "log_rate": torch.linspace(-3, -2, GENES)},
}


def objective(name: str, stir: bool = True) -> Any:
    """In float64, no weight at zero."""
    kind, config = CONFIGS[name]
    made = kind(config, STATISTICS.get(name, {"total": torch.tensor(40.0)}), seed=0)
    generator = torch.Generator().manual_seed(1)
    network = made.networks()[NAME].double()
    for parameter in network.parameters() if stir else ():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def share(positions: torch.Tensor, tokens: bool, step: int = 0) -> Share:
    features = keyed.normal(7, positions, "features", TOKENS * WIDTH).view(-1, TOKENS, WIDTH)
    counts = (features[:, 0, :1] * 3 + 6 * keyed.uniform(7, positions, "counts", GENES)).clamp(min=0).round()
    return Share(step, positions, {"features": features if tokens else features[:, 0], "counts": counts + 1})


class Cells(Samples):
    """The toys' samples, as features and counts."""

    tokens = False

    def _share(self, step: int, positions: torch.Tensor) -> Share:
        return Share(step, positions, share(positions, self.tokens).tensors, super()._share(step, positions).largest)


class Tokens(Cells):
    tokens = True


def paper(name: str) -> bool:
    return name in ("regression", "residual")


class TestLossByHand:
    def test_better(self) -> None:
        made, given_share = objective("better"), share(torch.arange(100, 105), False)
        found = made.losses(made.networks(), given_share, 3, NAME)
        network, positions = made.network, given_share.positions
        features, counts = (given_share.tensors[name].double() for name in ("features", "counts"))
        values = torch.log1p(counts / counts.sum(1, keepdim=True) * 40)
        z = (values - network.gene_mean) / network.gene_scale
        base = network.base(features)
        programs = (z - base) @ network.loadings / network.program_scale
        start = keyed.uniform(3, torch.zeros(1).long(), "time", 1)[0, 0].item()
        times = (positions.double() * (5**0.5 - 1) / 2 + start) % 1.0
        abar = torch.cos(times * torch.pi / 2) ** 2
        noise = keyed.normal(3, positions, "noise ", 3).double()
        x = abar.sqrt()[:, None] * programs + (1 - abar).sqrt()[:, None] * noise
        v = network.denoiser(x, torch.log(abar / (1 - abar)), features)
        wanted = abar.sqrt()[:, None] * noise - (1 - abar).sqrt()[:, None] * programs
        snr = abar / (1 - abar)
        program_error = ((v - wanted) ** 2).mean(1) * snr.clamp(max=5) / (snr + 1)
        base_error = ((base - z) ** 2).mean(1)
        assert found["loss"][1] == 5
        torch.testing.assert_close(found["base_error"][0], base_error.sum(), rtol=1e-9, atol=0)
        torch.testing.assert_close(found["program_error"][0], program_error.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found["loss"][0], (base_error + program_error).sum(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", ["better", "counts"])
    def test_training_alone_noises_features_by_position(self, name: str) -> None:
        kind, config = CONFIGS[name]
        seen: list[torch.Tensor] = []
        made = kind(config, STATISTICS[name], seed=0, feature_noise=0.5)
        made.network.feature_scale.std.copy_(torch.tensor([1.0, 2, 3, 4]))
        made.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        positions = torch.arange(2000)
        plain = share(positions, False).tensors["features"]
        made.losses(made.networks(), share(positions, False), 3, NAME)
        noise = seen.pop() - plain
        torch.testing.assert_close(noise.std(0), torch.tensor([0.5, 1, 1.5, 2]), rtol=0.1, atol=0)
        made.losses(made.networks(), share(positions, False).part(5, 9), 3, NAME)
        torch.testing.assert_close(seen.pop() - plain[5:9], noise[5:9])
        made.metrics(made.networks(), share(positions, False), 3)
        assert all(torch.equal(given, plain) for given in seen)

    def test_no_gradient_goes_from_the_residual_to_the_regression(self) -> None:
        made = objective("better")
        found = made.losses(made.networks(), share(torch.arange(5), False), 3, NAME)
        found["program_error"][0].backward()
        assert all(parameter.grad is None for parameter in made.network.base.parameters())
        assert all(parameter.grad is not None for parameter in made.network.denoiser.parameters())

    def test_counts(self) -> None:
        made, given_share = objective("counts"), share(torch.arange(4), False)
        total, count = made.losses(made.networks(), given_share, 3, NAME)["loss"]
        counts = given_share.tensors["counts"].double()
        rates, dispersion = made.network(given_share.tensors["features"])
        np.testing.assert_allclose(rates.detach().exp().sum(1), 1)
        mean, n = (rates.exp() * counts.sum(1, keepdim=True)).detach().numpy(), dispersion.detach().exp().numpy()
        assert count == 4
        assert total.item() == pytest.approx(-stats.nbinom.logpmf(counts.numpy(), n, n / (n + mean)).mean(1).sum())

    def test_paper(self) -> None:
        regression, residual = objective("regression"), objective("residual")
        residual.whole.load_state_dict(
            {**residual.whole.state_dict(), **{f"base.{k}": v for k, v in regression.whole.base.state_dict().items()}}
        )
        given_share = share(torch.arange(50, 56), True)
        counts, tokens = given_share.tensors["counts"].double(), given_share.tensors["features"].double()
        values = torch.log1p(counts / counts.sum(1, keepdim=True) * 40)
        features, base = residual.whole.base(tokens)
        total, count = regression.losses(regression.networks(), given_share, 3, NAME)["loss"]
        assert count == 6 and total.item() == pytest.approx(((base - values) ** 2).mean(1).sum().item())
        total, count = residual.losses(residual.networks(), given_share, 3, NAME)["loss"]
        noise = keyed.normal(3, given_share.positions, "noise", GENES).double()
        time = (keyed.uniform(3, given_share.positions, "time", 1)[:, 0] * 10).long()
        abar = torch.tensor(np.cumprod(1 - np.linspace(5e-5, 5e-4, 10)))[time][:, None]
        noisy = abar.sqrt() * (values - base) + (1 - abar).sqrt() * noise
        said = residual.whole.denoiser(torch.cat((noisy, features, base, (time[:, None] + 1) / 10), 1))
        assert count == 6 and total.item() == pytest.approx(((said - noise) ** 2).mean(1).sum().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_and_metrics_do_not_depend_on_how_a_batch_is_cut(name: str) -> None:
    made, whole = objective(name), share(torch.arange(40, 52), paper(name))
    network = made.networks()[NAME]

    def summed(cuts: list[int], of: str) -> tuple[dict[str, list[float]], torch.Tensor | None]:
        network.zero_grad()
        sums: dict[str, list[float]] = {}
        for start, stop in itertools.pairwise([0, *sorted(set(cuts)), len(whole)]):
            args = (NAME,) if of == "losses" else ()
            found = getattr(made, of)(made.networks(), whole.part(start, stop), 5, *args)
            if of == "losses":
                found["loss"][0].backward()
            for key, (total, count) in found.items():
                before = sums.get(key, [0.0, 0.0])
                sums[key] = [before[0] + total.item(), before[1] + count.item()]
        return sums, torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad]) if args else None

    wanted = {of: summed([], of) for of in ("losses", "metrics")}

    @examples(max_examples=5, deadline=None)
    @given(st.lists(st.integers(1, 11), max_size=5))
    def holds(cuts: list[int]) -> None:
        for of, (sums, gradient) in wanted.items():
            found, other = summed(cuts, of)
            assert found.keys() == sums.keys()
            for key, pair in sums.items():
                assert found[key] == pytest.approx(pair, rel=1e-10)
            if gradient is not None:
                torch.testing.assert_close(other, gradient, rtol=0, atol=1e-9)

    holds()


def weights_on_rank(rank: int, world: int, folder: str, name: str, strategy: str) -> dict[str, Any]:
    made = objective(name, stir=False)
    optim = {NAME: Optim(lr=0.003, lr_rule="fixed", clip=1.0)}
    changes = {"steps": 4, "optim": optim, "strategy": strategy, "checkpoint_every": 100, "micro_batch": 7}
    told = Recorder()
    loop = Loop(made, settings(folder, **changes), (Tokens if paper(name) else Cells)(rank, world), [told])
    loop.run()
    return {"weights": dict(loop.state.ema.averages), "val": told.metrics("val/loss")}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("better", "ddp"), *[pytest.param(n, s, marks=pytest.mark.exhaustive)
                          for n, s in (("counts", "ddp"), ("regression", "ddp"), ("residual", "ddp"),
                                       ("better", "fsdp2"), ("residual", "fsdp2"))]],
)  # fmt: skip
def test_ranks_train_the_same_weights(name: str, strategy: str, tmp_path: Any) -> None:
    alone = weights_on_rank(0, 1, str(tmp_path / "alone"), name, "ddp")
    both = on_ranks(2, weights_on_rank, str(tmp_path / "both"), name, strategy)
    assert both[0]["val"] == pytest.approx(alone["val"], rel=1e-9)
    if strategy == "ddp":
        for key, value in alone["weights"].items():
            torch.testing.assert_close(both[0]["weights"][key], value, rtol=0, atol=1e-9)


class Gaussian(Samples):
    """x = 4 + A f + B c + noise, with f seen: x given f is a Gaussian whose mean and covariance are known.

    The last gene fills every cell up to one total, so that normalisation gives x back.
    """

    total, seen = 1e4, 3
    a = 0.4 * torch.randn(seen, 7, generator=torch.Generator().manual_seed(0)).double()
    b = 0.5 * torch.linalg.qr(torch.randn(7, 2, generator=torch.Generator().manual_seed(1)).double()).Q.T
    noise = 0.15

    def _share(self, step: int, positions: torch.Tensor) -> Share:
        drawn = keyed.normal(1, positions, "toy", 3 + 2 + 7).double()
        values = 4 + drawn[:, :3] @ self.a + drawn[:, 3:5] @ self.b + self.noise * drawn[:, 5:]
        counts = torch.expm1(values)
        counts = torch.cat((counts, self.total - counts.sum(1, keepdim=True)), 1)
        return Share(step, positions, {"features": drawn[:, :3].float(), "counts": counts})

    @classmethod
    def mean(cls, features: torch.Tensor) -> torch.Tensor:
        return 4 + features.double() @ cls.a

    @classmethod
    def covariance(cls) -> torch.Tensor:
        return cls.b.T @ cls.b + cls.noise**2 * torch.eye(7)


def test_a_gaussian_posterior_is_found(tmp_path: Any) -> None:
    """Mean, covariance of the samples, and coverage of the intervals, on cells that neither training nor calibration
    saw."""
    data, config = Gaussian(batch=128), Img2SeqConfig("better", 8, 3, hidden=32, depth=1, programs=3)
    counts = data._share(0, torch.arange(5000, 7000)).tensors["counts"]
    values = normalised(counts, data.total)
    mean, scale = values.mean(0), (values.var(0) + values.var(0).median()).sqrt()
    features = data._share(0, torch.arange(5000, 7000)).tensors["features"].double().numpy()
    loadings, spreads = gene_programs(csr_matrix(values.numpy()), mean.numpy(), scale.numpy(), 3, features)
    found = {"total": torch.tensor(data.total), "gene_mean": mean, "gene_scale": scale}
    found |= {"loadings": torch.from_numpy(loadings), "program_scale": torch.from_numpy(spreads)}
    made = Img2SeqObjective(config, found, seed=0)
    optim = {NAME: Optim(lr=0.01, lr_rule="fixed", clip=1.0, weight_decay=0.01)}
    changes = {"steps": 500, "precision": "fp32", "eval_every": 1000, "checkpoint_every": 1000, "optim": optim}
    loop = Loop(made, settings(str(tmp_path), **changes, ema=0.98, global_batch=128), data)
    loop.run()
    network = made.network
    network.load_state_dict(
        {**network.state_dict(), **{k.split(".", 1)[1]: v for k, v in loop.state.ema.averages.items()}}
    )
    network.eval()
    stated = calibrate(network, [data._share(0, torch.arange(10**6, 10**6 + 400))], seed=0)
    new = data._share(0, torch.arange(2 * 10**6, 2 * 10**6 + 800))
    draws = [CellDraws(0, new.positions, sample) for sample in range(4)]
    said = network.predict(new.tensors["features"], draws)
    truth = normalised(new.tensors["counts"], data.total)[:, :7]
    expected = data.mean(new.tensors["features"])
    assert (said.mean[:, :7] - expected).square().mean().sqrt() < 0.1 * data.covariance().diagonal().mean().sqrt()
    residual = (said.samples[..., :7].double() - expected[:, None]).flatten(0, 1)
    torch.testing.assert_close(residual.T @ residual / len(residual), data.covariance(), rtol=0, atol=0.03)
    torch.testing.assert_close(
        said.spread[:, :7].square().mean(0).double(), data.covariance().diagonal(), rtol=0.15, atol=0
    )
    for level in (0.5, 0.9):
        lower, upper = said.interval(level)
        inside = ((truth >= lower[:, :7]) & (truth <= upper[:, :7])).double().mean().item()
        assert inside == pytest.approx(level, abs=0.03)
        assert stated.coverage[str(level)] == pytest.approx(level, abs=0.04)
        width = (upper - lower)[:, :7].double().mean(0)
        wanted = 2 * stats.norm.ppf(0.5 + level / 2) * data.covariance().diagonal().sqrt()
        torch.testing.assert_close(width, wanted, rtol=0.2, atol=0)
        assert (width / wanted).mean().item() == pytest.approx(1, abs=0.06)


class TestStatistics:
    @pytest.fixture
    def store(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        rng = np.random.default_rng(0)
        counts = rng.poisson(np.exp(rng.normal(0, 1, (60, 2)) @ rng.normal(0, 0.7, (2, 12)) + 1))
        counts[:, 11] = 0
        return cells_of(str(tmp_path_factory.mktemp("statistics")), csr_matrix(counts))

    def test_against_dense_arithmetic(self, store: Any) -> None:
        rows = np.arange(0, 60, 2)
        counts = store.counts().toarray()[rows].astype(float)
        total = np.median(counts.sum(1))
        assert median_total(store, rows) == total
        values = np.log1p(counts / counts.sum(1, keepdims=True) * total)
        mean, scale = gene_scale(store, rows, total)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-9)
        variance = values.var(0)
        np.testing.assert_allclose(scale, np.sqrt(variance + np.median(variance[variance > 0])), rtol=1e-9)
        features = np.random.default_rng(2).normal(size=(30, 3))
        loadings, spreads = gene_programs(csr_matrix(values), mean, scale, 2, features)
        z = (values - mean) / scale
        z = z - features @ np.linalg.solve(features.T @ features + 3 * np.eye(3), features.T @ z)
        _, singular, axes = np.linalg.svd(z, full_matrices=False)
        np.testing.assert_allclose(spreads, singular[:2] / 30**0.5, rtol=1e-6)
        np.testing.assert_allclose(abs((loadings * axes[:2].T).sum(0)), 1, rtol=1e-6)

    def test_they_are_of_the_named_rows_and_fit_the_network(self, store: Any) -> None:
        features = np.random.default_rng(1).normal(2, 3, (60, WIDTH)).astype(np.float32)
        features[:, 1] = 7
        rows = np.arange(10, 40)
        for counts in ("normalised", "negative binomial"):
            config = Img2SeqConfig("better", 12, WIDTH, counts, hidden=8, depth=1, programs=3)
            found = statistics(config, store, rows, features)
            buffers = dict(config.build().named_buffers())
            assert all(buffers[name].shape == value.shape for name, value in found.items())
            np.testing.assert_allclose(found["feature_scale.mean"], features[rows].mean(0), rtol=1e-5)
            assert found["feature_scale.std"][1] == 1
        np.testing.assert_allclose(found["log_rate"].exp().sum(), 1, rtol=1e-5)
        assert statistics(PAPER, store, rows, features).keys() == {"total"}


def test_correlations_are_numpys() -> None:
    first, second = torch.randn(2, 30, 4)
    second[:, 3] = 1.0
    found = correlations(first, second)
    for gene in range(3):
        assert found[gene].item() == pytest.approx(np.corrcoef(first[:, gene], second[:, gene])[0, 1], abs=1e-5)
    assert found[3].isnan()


class TestBadInput:
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"features": torch.zeros(3, WIDTH + 1)}, "features must be floating"),
            ({"features": torch.zeros(3, WIDTH).int()}, "features must be floating"),
            ({"counts": torch.zeros(3, GENES - 1)}, f"counts must be .N, {GENES}."),
        ],
    )
    def test_it_is_named(self, name: str, changes: dict[str, torch.Tensor], problem: str) -> None:
        made, whole = objective(name), share(torch.arange(3), paper(name))
        with pytest.raises(ValueError, match=problem):
            made.losses(made.networks(), Share(0, whole.positions, {**whole.tensors, **changes}), 3, NAME)

    def test_too_few_cells_to_calibrate_by(self) -> None:
        made = objective("better")
        with pytest.raises(JobError, match="19 cells in val"):
            calibrate(made.network, [share(torch.arange(19), False)], seed=0)


def held_out(name: str, cells: int) -> Iterator[Share]:
    yield share(torch.arange(cells), paper(name))


@pytest.mark.parametrize("name", ["better", "counts", "residual"])
def test_intervals_cover_whatever_the_network_is_worth(name: str) -> None:
    """An untrained network's intervals, on cells that it was not calibrated on."""
    made = objective(name)
    network = made.networks()[NAME]
    found = calibrate(network, held_out(name, 200), seed=0)
    assert found.cells == 200 and -1 <= found.correlation <= 1
    for level, covered in found.coverage.items():
        assert float(level) - 0.03 < covered < float(level) + 0.12  # counts are lumpy: intervals hold more than asked
