"""Samplers against closed forms: where the data are Gaussian, or a mixture, the best network is known.

Every sampler has to give back the data's mean, spread and weights. Noise is keyed, so a cell's sample is its own.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from cosmic_ray.ingest.cell_noise import cell_keys, cell_noise
from cosmic_ray.models.diffusion import Diffusion, alpha_sigma, posterior
from cosmic_ray.models.sampling import END, START, Sampler, levels, sample

SAMPLERS = get_args(Sampler)
FREE = Diffusion(threshold=None)
N = 3000
KEYS = torch.arange(N)


class Best:
    """The posterior mean of x0 for a mixture of Gaussians, told as v; components: (weight, mean, std), each (K, W)."""

    def __init__(self, weights: list[float], means: list[list[float]], stds: list[list[float]]):
        self.log_weights = torch.tensor(weights).log()
        self.means, self.stds = torch.tensor(means), torch.tensor(stds)
        self.seen: list[tuple[int, float, list[bool]]] = []

    def __call__(
        self, x: torch.Tensor, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """A condition (N, 1) moves every mean; a dropped one does not."""
        self.seen.append((len(x), logsnr[0].item(), drop.tolist()))
        alpha, sigma = alpha_sigma(logsnr.double(), x)
        x, moved = x.double(), torch.where(drop, 0, condition[:, 0]).double()[:, None, None]
        means = self.means + moved  # (N, K, W)
        a, s, y = alpha[:, 0], sigma[:, 0], x[:, 0]  # (N, 1, 1) twice, (N, 1, W)
        variance = (a * self.stds) ** 2 + s**2
        off = y - a * means
        share = (self.log_weights - 0.5 * (off**2 / variance + variance.log()).sum(-1)).softmax(-1)
        x0 = ((means + a * self.stds**2 / variance * off) * share[..., None]).sum(1)[:, None, None]
        return ((alpha * x - x0) / sigma).float()


def run(best: Best, sampler: str = "unipc", keys: torch.Tensor = KEYS, seed: int = 0, **given: object) -> torch.Tensor:
    shape = (1, 1, best.means.shape[1])
    given = {"steps": 1000 if sampler.startswith("ddpm") else 25, "condition": torch.zeros(len(keys), 1)} | given
    condition = given.pop("condition")
    return sample(best, FREE, condition, cell_noise(seed, keys, shape), sampler=sampler, **given).images[:, 0, 0]


def gaussian() -> Best:
    """One Gaussian whose components are spread as an image's are: its mean by much, its grain by little."""
    return Best([1.0], [[-0.5, -0.5, 0.2, 0.0, 3.0]], [[0.05, 0.1, 0.3, 1.0, 10.0]])


class TestKnownAnswers:
    @pytest.mark.parametrize(
        ("sampler", "spread"),
        [("ddpm", 0.06), ("ddpm-time", 0.09), ("dpm++2m", 0.025), ("dpm++2m-sde", 0.06), ("unipc", 0.02)],
    )
    def test_a_gaussian(self, sampler: str, spread: float) -> None:
        """A deterministic sampler is a function of its first noise: relative to that, there is no chance."""
        best = gaussian()
        found = run(best, sampler)
        means, stds = torch.zeros(5), torch.ones(5)
        if sampler in ("dpm++2m", "unipc"):
            first = cell_noise(0, KEYS, (5,))(0)
            means, stds = first.mean(0), first.std(0)
        torch.testing.assert_close((found.mean(0) - best.means[0]) / best.stds[0], means, rtol=0, atol=0.06)
        torch.testing.assert_close(found.std(0) / best.stds[0] / stds, torch.ones(5), rtol=0, atol=spread)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_weights_of_a_mixture(self, sampler: str) -> None:
        best = Best([0.3, 0.7], [[-0.6], [0.5]], [[0.1], [0.05]])
        found = run(best, sampler, steps=250 if sampler.startswith("ddpm") else 40)[:, 0]
        left = found < 0
        assert left.float().mean().item() == pytest.approx(0.3, abs=0.03)
        bias = 0.03 if sampler == "ddim" else 0.01  # of first order only
        assert found[left].mean().item() == pytest.approx(-0.6, abs=bias)
        assert found[~left].mean().item() == pytest.approx(0.5, abs=bias)

    def test_ddim_converges(self) -> None:
        """First order: half the step, half the error."""
        best = gaussian()
        exact = run(best, "unipc", steps=100).std(0)
        errors = [(run(best, "ddim", steps=n).std(0) / exact - 1).abs()[2:] for n in (40, 80)]
        assert torch.all(errors[0] > 1.6 * errors[1])
        assert torch.all(errors[1] < 0.06)

    def test_ddpm_is_the_posterior(self) -> None:
        """Two steps by hand, with the noise that was handed in."""
        best, keys = gaussian(), torch.arange(4)
        noise, condition = cell_noise(0, keys, (1, 1, 5)), torch.zeros(4, 1)
        logsnrs = levels(FREE, "ddpm-time", 2).float()
        x = noise(0)
        for step, logsnr in enumerate(logsnrs):
            alpha, sigma = alpha_sigma(logsnr.expand(4), x)
            x0 = alpha * x - sigma * best(x, logsnr.expand(4), condition, torch.zeros(4, dtype=torch.bool))
            if step == 0:
                mean, variance = posterior(x0, x, logsnr.expand(4), logsnrs[1].expand(4))
                x = mean + variance.sqrt() * noise(1)
        end = torch.full((4,), FREE.highest)  # the schedule's own, where nothing is added
        x0, _ = posterior(x0, x, logsnrs[1].expand(4), end)
        torch.testing.assert_close(run(best, "ddpm-time", keys, steps=2), x0[:, 0, 0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("sampler", ["dpm++2m", "unipc"])
    def test_guidance_moves_where_it_should(self, sampler: str) -> None:
        """Gaussians of one spread whose mean the condition moves by 0.4: x0 at scale w is that of mean w * 0.4."""
        best = Best([1.0], [[0.0]], [[0.3]])
        condition = torch.full((N, 1), 0.4)
        means = [run(best, sampler, condition=condition, guidance=w).mean().item() for w in (0.0, 1.0, 2.5)]
        assert means == pytest.approx([0.0, 0.4, 1.0], abs=0.02)


class TestEvaluations:
    def test_they_are_counted_and_batched(self) -> None:
        condition, noise = torch.zeros(6, 1), cell_noise(0, torch.arange(6), (1, 1, 1))
        for guidance, nfe, size, dropped in ((1.0, 7, 6, 0), (0.0, 7, 6, 6), (3.0, 14, 12, 6)):
            best = Best([1.0], [[0.0]], [[0.3]])
            assert sample(best, FREE, condition, noise, steps=7, guidance=guidance).nfe == nfe
            assert [(n, sum(drop)) for n, _, drop in best.seen] == [(size, dropped)] * 7

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_network_is_told_the_scheduler_s_own_levels(self, sampler: str) -> None:
        best = gaussian()
        run(best, sampler, torch.arange(2), steps=12)
        told = torch.tensor([logsnr for _, logsnr, _ in best.seen])
        torch.testing.assert_close(told, levels(FREE, sampler, 12).float(), rtol=0, atol=2e-3)
        assert told[0] == pytest.approx(START, abs=1e-2)
        if sampler != "ddpm-time":
            assert told[-1] == pytest.approx(END, abs=1e-2)


class TestKeys:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_cell_has_one_sample_in_any_batch_and_order(self, sampler: str) -> None:
        best = gaussian()
        keys = cell_keys([f"cell-{i}" for i in range(12)])
        together = run(best, sampler, keys, steps=10)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
        parts = torch.cat([run(best, sampler, part, steps=10) for part in keys[order].split([1, 4, 7])])
        torch.testing.assert_close(parts, together[order], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_another_seed_gives_another(self, sampler: str) -> None:
        best, keys = gaussian(), torch.arange(4)
        one, other = (run(best, sampler, keys, seed, steps=10) for seed in (0, 1))
        assert (one - other).abs().amin() > 0

    def test_noise_of_steps_is_independent(self) -> None:
        noise = cell_noise(0, torch.arange(4000), (1,))
        drawn = torch.cat([noise(step) for step in range(4)], 1)
        torch.testing.assert_close(drawn.T.cov(), torch.eye(4), rtol=0, atol=0.08)

    def test_ids_keep_their_keys(self) -> None:
        """A change here changes every image ever generated."""
        assert cell_keys(["a", "cell-1"]).tolist() == [3405396810240292928, -736636050133881177]


class TestFromAnImage:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_lower_the_strength_the_more_stays(self, sampler: str) -> None:
        """A mixture's sample keeps its side at a low strength and forgets it at 1."""
        best = Best([0.5, 0.5], [[-0.6], [0.6]], [[0.05], [0.05]])
        start = torch.where(KEYS[:500] % 2 == 0, -0.6, 0.6).reshape(-1, 1, 1, 1)
        kept = {}
        for strength in (0.1, 0.5, 1.0):
            found = run(best, sampler, KEYS[:500], start=start, strength=strength, steps=40)
            kept[strength] = (found[:, 0].sign() == start.flatten().sign()).float().mean().item()
        assert kept[0.1] == 1
        assert kept[0.5] < 1
        assert kept[1.0] == pytest.approx(0.5, abs=0.08)

    def test_steps_before_the_strength_are_not_taken(self) -> None:
        best = gaussian()
        noise = cell_noise(0, torch.arange(2), (1, 1, 5))
        found = sample(best, FREE, torch.zeros(2, 1), noise, steps=51, start=torch.zeros(2, 1, 1, 5), strength=0.5)
        assert found.nfe == len(best.seen) == 21  # log-SNRs 0 to 10 of -15 to 10, in halves
        assert best.seen[0][1] == pytest.approx(0, abs=1e-2)

    @pytest.mark.parametrize(
        "given",
        [{"strength": 0.5}, {"strength": 0.0, "start": True}, {"strength": 1.5, "start": True}, {"steps": 0},
         {"strength": 0.001, "start": True}, {"sampler": "euler"}],
    )  # fmt: skip
    def test_what_makes_no_sense_is_refused(self, given: dict) -> None:
        if given.get("start"):
            given = given | {"start": torch.zeros(2, 1, 1, 5)}
        with pytest.raises(ValueError, match=r"strength|steps|sampler"):
            sample(gaussian(), FREE, torch.zeros(2, 1), cell_noise(0, torch.arange(2), (1, 1, 5)), **given)


def test_images_stay_in_range_where_the_diffusion_says_so() -> None:
    best = Best([1.0], [[0.9, -0.9, 0.0]], [[0.5, 0.5, 0.5]])
    noise = cell_noise(0, torch.arange(50), (1, 1, 3))
    for threshold in (0.0, 0.95):
        found = sample(best, Diffusion(threshold=threshold), torch.zeros(50, 1), noise).images
        assert found.abs().max() <= 1 + 1e-5
    assert sample(best, FREE, torch.zeros(50, 1), noise).images.abs().max() > 1.2
