"""img2seq's networks against what is known: schedules, likelihoods, programs, quantiles, the published sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosmic_ray.ingest.cell_draws import CellDraws
from cosmic_ray.ingest.cell_noise import cell_keys
from cosmic_ray.models.img2seq import HIGHEST, LEVELS, Calibration, Img2SeqConfig, normalised
from cosmic_ray.models.img2seq_better import DIFFUSION
from cosmic_ray.models.img2seq_counts import nb_log_likelihood
from cosmic_ray.models.img2seq_paper import RESIDUAL_WEIGHT, STEPS, PublishedImg2Seq, abars, linear_betas
from cosmic_ray.models.vit import PRESETS, build_encoder

GENES, WIDTH = 6, 8
CONFIGS = {
    "better": Img2SeqConfig("better", GENES, WIDTH, hidden=16, depth=1, programs=3),
    "counts": Img2SeqConfig("better", GENES, WIDTH, "negative binomial", hidden=16, depth=1),
    "paper": Img2SeqConfig("paper", GENES, WIDTH, hidden=16, depth=0, programs=0, heads=2),
}


def stirred(name: str, seed: int = 0) -> torch.nn.Module:
    """A network with no weight at zero."""
    torch.manual_seed(seed)
    network = CONFIGS[name].build().eval()
    for tensor in network.parameters():
        tensor.data.add_(0.2 * torch.randn(tensor.shape))
    for key, tensor in network.named_buffers():
        if key != "loadings":
            tensor.copy_(0.5 + torch.rand(tensor.shape))
        else:
            tensor.copy_(torch.linalg.qr(torch.randn(tensor.shape)).Q)
    return network


def features_of(name: str, cells: int) -> torch.Tensor:
    shape = (cells, 5, WIDTH) if name == "paper" else (cells, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def draws_of(ids: list[str], samples: int = 2, seed: int = 1) -> list[CellDraws]:
    return [CellDraws(seed, cell_keys(ids), sample) for sample in range(samples)]


class TestSchedules:
    def test_better_reaches_noise(self) -> None:
        """Terminal SNR is about zero: what is diffused keeps less than a thousandth of itself, in its own spread."""
        last = DIFFUSION.logsnr(torch.ones(1))
        assert last.sigmoid().sqrt().item() < 1e-3
        assert DIFFUSION.logsnr(torch.zeros(1)).item() > 10

    def test_the_published_one_never_does(self) -> None:
        betas = np.linspace(5e-5, 5e-4, 10)
        np.testing.assert_allclose(linear_betas(), betas, rtol=1e-12)
        np.testing.assert_allclose(abars(), np.cumprod(1 - betas), rtol=1e-12)
        assert STEPS == 10 and abars()[-1].item() == pytest.approx(0.99725, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(-7, 8), st.floats(-4, 6)), min_size=1, max_size=8))
def test_nb_log_likelihood_is_that_of_scipy(given_values: list[tuple[int, float, float]]) -> None:
    counts, log_mean, log_dispersion = torch.tensor(given_values, dtype=torch.float64).T
    found = nb_log_likelihood(counts[None], log_mean[None], log_dispersion)[0]
    n, mean = log_dispersion.exp().numpy(), log_mean.exp().numpy()
    np.testing.assert_allclose(found, stats.nbinom.logpmf(counts.numpy(), n, n / (n + mean)), rtol=1e-6, atol=1e-8)


def test_counts_are_drawn_as_the_likelihood_says() -> None:
    mean, dispersion = torch.tensor([0.3, 4.0, 50.0]), torch.tensor([0.5, 2.0, 30.0])
    drawn = CellDraws(0, torch.arange(20_000)).negative_binomial("x", mean.expand(20_000, 3), dispersion).numpy()
    for gene, (mu, n) in enumerate(zip(mean.tolist(), dispersion.tolist(), strict=True)):
        theirs = stats.nbinom(n, n / (n + mu))
        values = np.arange(int(theirs.ppf(0.999)) + 1)
        found = (drawn[:, gene, None] <= values).mean(0)
        assert abs(found - theirs.cdf(values)).max() < 1.63 / 20_000**0.5


def test_normalised_is_scanpys_recipe() -> None:
    counts = torch.tensor([[1.0, 3, 0], [0, 0, 0], [10, 0, 10]])
    wanted = [np.log1p(np.array(row) / max(sum(row), 1) * 8) for row in counts.tolist()]
    np.testing.assert_allclose(normalised(counts, 8.0), wanted, rtol=1e-6)


class TestCalibration:
    def test_limits_are_order_statistics(self) -> None:
        scores = torch.stack([torch.randperm(99) + 1.0, -(torch.randperm(99) + 1.0)], 1)
        made = Calibration(2)
        made.fit(scores)
        lower, upper = made.interval(torch.full((1, 2), 1000.0), torch.full((1, 2), 2.0), 0.9)
        assert lower.tolist() == [[1010, 810]] and upper.tolist() == [[1190, 990]]

    @pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
    def test_it_covers_new_scores_of_any_distribution(self, level: float) -> None:
        generator = torch.Generator().manual_seed(0)
        for power in (1, 7):
            made = Calibration(400).double()
            scores = torch.randn(560, 400, generator=generator).double() ** power
            made.fit(scores[:60])
            lower, upper = made.interval(torch.full((400,), 1e7).double(), torch.ones(400).double(), level)
            new = scores[60:] + 1e7
            covered = ((new >= lower) & (new <= upper)).double().mean().item()
            assert level - 0.01 < covered < level + 0.04

    def test_few_cells_end_at_their_extremes(self) -> None:
        made = Calibration(1)
        made.fit(torch.tensor([[3.0], [1.0], [2.0]]))
        assert made.quantiles[0].item() == 1 and made.quantiles[-1].item() == 3
        assert (made.quantiles.diff(dim=0) >= 0).all() and len(LEVELS) == len(made.quantiles)

    @pytest.mark.parametrize("level", [0.0, 0.999, 1.0, -1.0])
    def test_levels_that_no_cells_can_tell(self, level: float) -> None:
        with pytest.raises(ValueError, match=f"at most {HIGHEST}"):
            Calibration(1).interval(torch.ones(1, 1), torch.ones(1, 1), level)

    def test_limits_are_not_negative(self) -> None:
        made = Calibration(1)
        made.fit(torch.randn(50, 1))
        assert made.interval(torch.zeros(1, 1), torch.ones(1, 1), 0.9)[0].item() == 0


@pytest.mark.parametrize("name", CONFIGS)
class TestPredictions:
    def test_a_cell_gets_the_same_in_any_batch(self, name: str) -> None:
        network, ids, features = stirred(name).double(), [f"cell-{i}" for i in range(7)], features_of(name, 7).double()
        whole = network.predict(features, draws_of(ids))
        order = [4, 0, 6]
        part = network.predict(features[order], draws_of([ids[i] for i in order]))
        for field in ("mean", "spread", "samples"):
            torch.testing.assert_close(getattr(part, field), getattr(whole, field)[order], rtol=1e-7, atol=1e-7)
        assert whole.samples.shape == (7, 2, GENES) and whole.mean.shape == whole.spread.shape == (7, GENES)
        assert not torch.allclose(whole.samples[:, 0], whole.samples[:, 1])
        assert not torch.allclose(network.predict(features, draws_of(ids, seed=2)).samples, whole.samples)

    def test_observed_cells_are_predicted_alike(self, name: str) -> None:
        """What calibration sees is what a prediction says."""
        network, ids, features = stirred(name).double(), [f"cell-{i}" for i in range(5)], features_of(name, 5).double()
        counts = torch.randint(0, 9, (5, GENES)).double()
        said = network.predict(features, draws_of(ids), library=counts.sum(1))
        observed = network.observe(features, counts, draws_of(ids)[0])
        torch.testing.assert_close(observed["mean"], said.mean)
        torch.testing.assert_close(network.spread(observed), said.spread)

    def test_rebuilt_from_its_config_and_weights(self, name: str) -> None:
        network = stirred(name)
        config = Img2SeqConfig(**CONFIGS[name].to_json())
        again = config.build()
        again.load_state_dict(network.state_dict())
        features = features_of(name, 3)
        first, second = (one.eval().predict(features, draws_of(["a", "b", "c"])) for one in (network, again))
        assert torch.equal(first.samples, second.samples) and torch.equal(
            first.interval(0.9)[1], second.interval(0.9)[1]
        )


class TestBetter:
    def test_programs_and_noise_make_up_a_residual(self) -> None:
        """What `observe` takes apart adds up again."""
        network = stirred("better").double()
        features, counts = features_of("better", 5).double(), torch.randint(1, 9, (5, GENES)).double()
        seen = network.observe(features, counts, draws_of([*"abcde"])[0])
        z = network.base(network.feature_scale(features))
        again = network.gene_mean + network.gene_scale * (z + network._genes(seen["programs"])) + seen["left"]
        torch.testing.assert_close(again, seen["truth"])
        assert (seen["left"] / network.gene_scale @ network.loadings).abs().max() < 1e-5

    def test_whitened_programs(self) -> None:
        """Calibrated on residuals of a known spread along the programs, samples and their spread have it."""
        network = stirred("better").double()
        count = 1500
        network.denoiser.last[-1].weight.data.zero_()  # v = 0: samples are the start's noise, of spread 1
        network.denoiser.last[-1].bias.data.zero_()
        features = torch.zeros(count, WIDTH, dtype=torch.float64)
        draws = [CellDraws(0, torch.arange(count))]
        truth = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        seen = network.observe(features, torch.ones(count, GENES).double(), draws[0])
        seen["programs"] = torch.randn(count, 3, dtype=torch.float64) * truth
        seen["left"] = torch.randn(count, GENES, dtype=torch.float64) * 0.3
        network.calibrate(seen)
        spread = network.spread(seen)
        covariance = network._genes(torch.diag(truth)).square().sum(0) * network.gene_scale**2
        torch.testing.assert_close(spread.square().mean(0), covariance + 0.09, rtol=0.2, atol=0)
        network.gene_mean.fill_(50.0)
        samples = network.predict(features, draws).samples[:, 0]
        torch.testing.assert_close(samples.var(0), covariance + 0.09, rtol=0.2, atol=0)

    def test_gene_noise_keeps_its_shape(self) -> None:
        """A gene that is mostly zero stays so."""
        network = stirred("better").double()
        left = torch.where(torch.rand(2000, GENES) < 0.9, -0.1, 0.9).double()
        draws = CellDraws(0, torch.arange(2000))
        seen = network.observe(features_of("better", 2000).double(), torch.ones(2000, GENES).double(), draws)
        network.calibrate({**seen, "left": left})
        torch.testing.assert_close(network.noise_quantiles.square().mean(0).sqrt(), left.std(0), rtol=0.02, atol=0)
        assert ((network.noise_quantiles < 0).double().mean(0) - 0.9).abs().max() < 0.03

    def test_too_many_programs(self) -> None:
        with pytest.raises(ValueError, match="programs must be between 1 and the 6 genes"):
            Img2SeqConfig("better", GENES, WIDTH, programs=7).build()


class TestPaper:
    def test_stage_one_is_the_fm_with_a_linear_layer(self) -> None:
        """With the FM's own block and norm, the features are its embedding."""
        preset = PRESETS["tiny"]
        encoder = build_encoder(preset, 1).eval()
        config = Img2SeqConfig("paper", GENES, preset.embed_dim, heads=preset.num_heads, hidden=16)
        base = PublishedImg2Seq(config).base
        base.begin(encoder.blocks[-1], encoder.norm)
        entering = []
        encoder.blocks[-1].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        images = torch.rand(2, 1, preset.img_size, preset.img_size)
        with torch.no_grad():
            embedding = encoder(images)
            torch.testing.assert_close(base(entering[0])[0], embedding)
        trained = {name for name, weight in base.named_parameters() if weight.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"block", "head"}

    def test_another_fm_is_refused(self) -> None:
        encoder = build_encoder(PRESETS["tiny"], 1)
        with pytest.raises(RuntimeError, match="size mismatch"):
            PublishedImg2Seq(CONFIGS["paper"]).base.begin(encoder.blocks[-1], encoder.norm)

    def test_sampling_by_hand(self) -> None:
        """Ancestral sampling, step for step, with a denoiser that says a tenth of what it is given."""
        network = stirred("paper").double()

        class Tenth(torch.nn.Module):
            def forward(self, given: torch.Tensor) -> torch.Tensor:
                return given[:, :GENES] / 10

        network.denoiser = Tenth()
        tokens, draws = features_of("paper", 3).double(), CellDraws(5, torch.arange(3))
        said = network.predict(tokens, [draws])

        def residual(purpose: str) -> torch.Tensor:
            betas = np.linspace(5e-5, 5e-4, 10)
            abar = np.cumprod(1 - betas)
            x = draws.normal(f"{purpose} start", GENES).double()
            for t in range(9, -1, -1):
                x = (x - betas[t] / (1 - abar[t]) ** 0.5 * x / 10) / (1 - betas[t]) ** 0.5
                if t:
                    spread = ((1 - abar[t - 1]) / (1 - abar[t]) * betas[t]) ** 0.5
                    x = x + spread * draws.normal(f"{purpose} step {t}", GENES).double()
            return x

        base = network.base(tokens)[1].detach()
        torch.testing.assert_close(said.samples[:, 0], base + RESIDUAL_WEIGHT * residual("residual"))
        mean = sum(residual(f"mean {index}") for index in range(7)) / 7
        torch.testing.assert_close(said.mean, base + RESIDUAL_WEIGHT * mean)

    def test_heads_have_to_divide_the_width(self) -> None:
        with pytest.raises(ValueError, match="3 heads do not divide"):
            Img2SeqConfig("paper", GENES, WIDTH, heads=3).build()

    def test_parameters_as_published(self) -> None:
        """A 3-layer MLP of 2048 on residual, feature, base and time."""
        config = Img2SeqConfig.of("large", "paper", 100, 32, heads=4)
        with torch.device("meta"):
            denoiser = config.build().denoiser
        wanted = (231 + 2 + 1) * 2048 + 2048 * 2049 + 100 * 2049
        assert sum(weight.numel() for weight in denoiser.parameters()) == wanted
