"""Diffusion: known answers of the schedules, conversions there and back, the DDPM posterior, the weights' table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmic_ray.models.diffusion import (
    Diffusion,
    alpha_sigma,
    diffuse,
    limit,
    min_snr_weight,
    posterior,
    squared_error,
    target,
    to_noise,
    to_x0,
)

PREDICTS = ("noise", "x0", "v")
LOGSNRS = torch.linspace(-12, 12, 25, dtype=torch.float64)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A clean sample and noise for every log-SNR of LOGSNRS: (25, 1, 4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(25, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))


class TestMixing:
    def test_squares_of_the_factors_add_up_to_one_and_their_ratio_is_the_snr(self) -> None:
        alpha, sigma = alpha_sigma(LOGSNRS)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(25, dtype=torch.float64))
        torch.testing.assert_close(2 * (alpha / sigma).log(), LOGSNRS)

    def test_by_hand(self) -> None:
        """SNR 9: alpha**2 = 0.9."""
        mixed = diffuse(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([math.log(9)]))
        assert mixed.item() == pytest.approx(2 * math.sqrt(0.9) + math.sqrt(0.1), abs=1e-6)

    @pytest.mark.parametrize("predicts", PREDICTS)
    def test_a_perfect_prediction_gives_back_clean_sample_and_noise(self, predicts: str) -> None:
        x0, noise = drawn()
        x = diffuse(x0, noise, LOGSNRS)
        said = target(x0, noise, LOGSNRS, predicts)
        torch.testing.assert_close(to_x0(said, x, LOGSNRS, predicts), x0, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_noise(said, x, LOGSNRS, predicts), noise, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("predicts", PREDICTS)
    def test_any_prediction_is_one_of_x0_and_noise_that_mix_to_x(self, predicts: str) -> None:
        x, said = drawn(1)
        mixed = diffuse(to_x0(said, x, LOGSNRS, predicts), to_noise(said, x, LOGSNRS, predicts), LOGSNRS)
        torch.testing.assert_close(mixed, x)

    def test_v_is_the_preconditioning_of_edm_for_data_of_spread_one(self) -> None:
        """Karras et al. (2022), Table 1, with sigma_data = 1 and their x = x / alpha: c_skip and c_out."""
        x, said = drawn(2)
        alpha, sigma = alpha_sigma(LOGSNRS, x)
        s = sigma / alpha
        edm = x / alpha / (s**2 + 1) - s / (s**2 + 1).sqrt() * said
        torch.testing.assert_close(to_x0(said, x, LOGSNRS, "v"), edm)


class TestSchedule:
    def test_known_times(self) -> None:
        """Half-way, signal and noise are equal; at a third, tan(pi/6)**-2 = 3."""
        times = torch.tensor([0.5, 1 / 3, 2 / 3], dtype=torch.float64)
        found = Diffusion().logsnr(times)
        torch.testing.assert_close(found, torch.tensor([0, math.log(3), -math.log(3)], dtype=torch.float64))

    def test_imagen_is_nichol_and_dhariwal(self) -> None:
        """abar = cos**2 of their Eq. 17, but for the division by its value at 0."""
        times = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        abar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(Diffusion.imagen().logsnr(times).sigmoid(), abar)

    def test_ends_are_finite(self) -> None:
        for diffusion in (Diffusion(), Diffusion.imagen(), Diffusion.better(256)):
            ends = diffusion.logsnr(torch.tensor([0.0, 1.0]))
            clean = diffusion.highest if not diffusion.offset else -2 * math.log(math.tan(math.pi / 2 * 0.008 / 1.008))
            assert ends.tolist() == pytest.approx([clean, diffusion.lowest])
            assert ends.dtype == torch.float32

    def test_a_larger_image_is_noisier_by_its_pixels(self) -> None:
        """Averaged over 4 x 4 pixels, an image of 256 has the SNR that one of 64 has: 16 times its own."""
        times = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        difference = Diffusion.better(64).logsnr(times) - Diffusion.better(256).logsnr(times)
        torch.testing.assert_close(difference, torch.full((9,), math.log(16), dtype=torch.float64))

    @pytest.mark.parametrize("size", [64, 256])
    def test_density_is_that_of_uniform_times(self, size: int) -> None:
        diffusion = Diffusion.better(size)
        found = diffusion.logsnr((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
        for low, high in ((-8, -4), (-4, 0), (0, 2), (2, 8)):
            share = ((found >= low) & (found < high)).double().mean().item()
            points = torch.linspace(low, high, 2001, dtype=torch.float64)
            assert share == pytest.approx(torch.trapezoid(diffusion.density(points), points).item(), abs=2e-5)


class TestWeights:
    @pytest.mark.parametrize(
        ("predicts", "snr", "weight"),
        [("x0", 1, 1), ("x0", 5, 5), ("x0", 100, 5), ("noise", 1, 1), ("noise", 5, 1), ("noise", 100, 0.05),
         ("v", 1, 0.5), ("v", 4, 0.8), ("v", 9, 0.5), ("v", 99, 0.05)],
    )  # fmt: skip
    def test_table(self, predicts: str, snr: float, weight: float) -> None:
        assert min_snr_weight(torch.tensor([math.log(snr)]), predicts).item() == pytest.approx(weight, rel=1e-5)

    def test_every_prediction_weighs_the_error_of_x0_alike(self) -> None:
        (x0, noise), (wrong, _) = drawn(3), drawn(4)
        x = diffuse(x0, noise, LOGSNRS)
        error = squared_error(wrong, x0) * min_snr_weight(LOGSNRS, "x0")
        for predicts in ("noise", "v"):
            as_noise = to_noise(wrong, x, LOGSNRS, "x0")
            alpha, sigma = alpha_sigma(LOGSNRS, x)
            said = as_noise if predicts == "noise" else alpha * as_noise - sigma * wrong
            wanted = target(x0, noise, LOGSNRS, predicts)
            torch.testing.assert_close(squared_error(said, wanted) * min_snr_weight(LOGSNRS, predicts), error)

    def test_ends_are_finite(self) -> None:
        for predicts in PREDICTS:
            assert min_snr_weight(torch.tensor([-40.0, 40.0]), predicts).isfinite().all()


class TestPosterior:
    def test_ddpm(self) -> None:
        """Ho et al. (2020), Eq. 6-7, with the betas of two neighbouring steps."""
        abar, abar_next = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
        beta = 1 - abar / abar_next
        x0, x = (torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        mean = abar_next.sqrt() * beta / (1 - abar) * x0 + (1 - beta).sqrt() * (1 - abar_next) / (1 - abar) * x
        variance = (1 - abar_next) / (1 - abar) * beta
        found = posterior(x0, x, abar.logit(), abar_next.logit())
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1].flatten(), variance)

    @given(st.floats(-10, 9.9), st.floats(0.01, 10))
    def test_a_step_keeps_the_marginal(self, logsnr: float, gain: float) -> None:
        """Over noise, q(x_next | x, x0) has mean alpha_next * x0 and variance sigma_next**2."""
        now, after = (torch.tensor([value], dtype=torch.float64) for value in (logsnr, logsnr + gain))
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(now), alpha_sigma(after)
        one = torch.ones(1, 1, dtype=torch.float64)
        mean, variance = posterior(one, alpha[:, None], now, after)
        torch.testing.assert_close(mean[0], alpha_next)
        slope = (posterior(one, alpha[:, None] + 1, now, after)[0] - mean)[0]
        torch.testing.assert_close(slope**2 * sigma**2 + variance[0], sigma_next**2)


class TestLimit:
    def test_dynamic(self) -> None:
        """Quantile 0.5 of |x0| = 1..5 is 3: clamp to [-3, 3], divide by 3; the other sample is left alone."""
        x0 = torch.tensor([[1.0, -2, 3, -4, 5], [0.1, 0.2, -0.3, 0.4, 0.5]])
        found = limit(x0, 0.5)
        torch.testing.assert_close(found[0], torch.tensor([1 / 3, -2 / 3, 1, -1, 1]))
        assert torch.equal(found[1], x0[1])

    def test_static(self) -> None:
        assert limit(torch.tensor([[-2.0, 0.5, 3]]), 0).tolist() == [[-1, 0.5, 1]]
