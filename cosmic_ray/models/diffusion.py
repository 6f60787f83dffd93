"""Gaussian diffusion in continuous time: noise schedules, what a network may predict, weights of the loss.

A clean sample x0 is mixed with noise by x = alpha * x0 + sigma * noise, alpha**2 + sigma**2 = 1 (Song et al. 2021,
"variance preserving"). Everything is a function of the log-SNR, log(alpha**2 / sigma**2): alpha**2 = sigmoid(logsnr),
sigma**2 = sigmoid(-logsnr) (Kingma et al. 2021, Variational Diffusion Models, Eq. 4). All functions are pure and keep
the dtype of what they are given; `logsnr` is (N,) beside tensors of (N, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

Predicts = Literal["noise", "x0", "v"]
"""What a network's output stands for: the noise (Ho et al. 2020), the clean sample, or v (Salimans & Ho 2022)."""


def alpha_sigma(logsnr: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the clean sample and of the noise: (N,), or (N, 1, ...) to multiply `like`."""
    if like is not None:
        logsnr = logsnr.reshape(-1, *[1] * (like.ndim - 1))
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def diffuse(x0: torch.Tensor, noise: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
    """alpha * x0 + sigma * noise."""
    alpha, sigma = alpha_sigma(logsnr, x0)
    return alpha * x0 + sigma * noise


def target(x0: torch.Tensor, noise: torch.Tensor, logsnr: torch.Tensor, predicts: Predicts) -> torch.Tensor:
    """What a perfect network would say; v = alpha * noise - sigma * x0 (Salimans & Ho 2022, Sec. 4)."""
    if predicts == "noise":
        return noise
    if predicts == "x0":
        return x0
    alpha, sigma = alpha_sigma(logsnr, x0)
    return alpha * noise - sigma * x0


def to_x0(prediction: torch.Tensor, x: torch.Tensor, logsnr: torch.Tensor, predicts: Predicts) -> torch.Tensor:
    """The clean sample that a prediction at `x` amounts to: linear in the prediction."""
    alpha, sigma = alpha_sigma(logsnr, x)
    if predicts == "noise":
        return (x - sigma * prediction) / alpha
    return prediction if predicts == "x0" else alpha * x - sigma * prediction


def to_noise(prediction: torch.Tensor, x: torch.Tensor, logsnr: torch.Tensor, predicts: Predicts) -> torch.Tensor:
    """The noise that a prediction at `x` amounts to: linear in the prediction."""
    alpha, sigma = alpha_sigma(logsnr, x)
    if predicts == "x0":
        return (x - alpha * prediction) / sigma
    return prediction if predicts == "noise" else sigma * x + alpha * prediction


def min_snr_weight(logsnr: torch.Tensor, predicts: Predicts, gamma: float = 5.0) -> torch.Tensor:
    """Weight of the squared error of the prediction (Hang et al. 2023, Eq. 8; imagen-pytorch likewise).

    Whatever is predicted, the squared error of x0 then weighs min(SNR, gamma): x0 min(SNR, gamma), noise
    min(SNR, gamma) / SNR, v min(SNR, gamma) / (SNR + 1).
    """
    if predicts == "noise":
        return (gamma * (-logsnr).exp()).clamp(max=1)
    clipped = logsnr.exp().clamp(max=gamma)
    return clipped if predicts == "x0" else clipped * (-logsnr).sigmoid()


def posterior(
    x0: torch.Tensor, x: torch.Tensor, logsnr: torch.Tensor, logsnr_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and variance (N, 1, ...), of the less noisy sample given `x` and x0: q(x_next | x, x0), a Gaussian.

    Ho et al. (2020), Eq. 7, for any two log-SNRs (`logsnr_next` > `logsnr`): with
    r = SNR / SNR_next, the mean is alpha_next * (r * x / alpha + (1 - r) * x0) and the variance
    sigma_next**2 * (1 - r) (Kingma et al. 2021, Eq. 32-33).
    """
    alpha, _ = alpha_sigma(logsnr, x)
    alpha_next, sigma_next = alpha_sigma(logsnr_next, x)
    ratio = (logsnr - logsnr_next).reshape(alpha.shape)
    kept, replaced = ratio.exp(), -torch.expm1(ratio)
    return alpha_next * (kept * x / alpha + replaced * x0), sigma_next**2 * replaced


def limit(x0: torch.Tensor, quantile: float) -> torch.Tensor:
    """Dynamic thresholding to [-1, 1] (Saharia et al. 2022, Sec. 2.3): for each sample, s is the quantile of |x0|, 1 at
    least; clamp to [-s, s] and divide by s. At quantile 0, s is always 1: plain clamping wherever |x0| reaches it."""
    if not quantile:
        return x0.clamp(-1, 1)
    flat = x0.flatten(1).abs()
    s = torch.quantile(flat, quantile, dim=1).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


@dataclass(frozen=True)
class Diffusion:
    """One model's diffusion: the schedule of its log-SNR, what its network predicts, how its loss is weighted."""

    predicts: Predicts = "v"
    shift: float = 0.0
    """Added to the cosine schedule's log-SNR; 2 * log(64 / size) keeps the noise at which an image of `size` pixels
    vanishes at that of one of 64, whose pixels average less of it away (Hoogeboom et al. 2023, simple diffusion,
    Eq. 4)."""
    offset: float = 0.0
    """`s` of Nichol & Dhariwal (2021), Eq. 17: a bit of noise at time 0."""
    lowest: float = -15.0
    highest: float = 15.0
    """The log-SNR's bounds. At -15 noise hides the mean of a 256 x 256 image (alpha times its 256 pixels a side is
    0.14 of the mean noise's spread)."""
    gamma: float = 5.0
    """Where min-SNR weighting cuts off."""
    threshold: float | None = 0.0
    """While sampling, x0 is kept in [-1, 1]: by clamping (0), by dynamic thresholding at this quantile, or not at all
    (None, for data without bounds)."""

    def logsnr(self, time: torch.Tensor) -> torch.Tensor:
        """The log-SNR at times in [0, 1], clean at 0: -2 log tan(pi/2 * (t + s) / (1 + s)) + shift, within the bounds.

        The cosine schedule (Nichol & Dhariwal 2021, Eq. 17), in float64 inside, for its ends are steep; at least
        float32 out.
        """
        angle = (time.double() + self.offset) / (1 + self.offset) * (math.pi / 2)
        found = (self.shift - 2 * torch.log(torch.tan(angle).abs())).clamp(self.lowest, self.highest)
        return found.to(torch.promote_types(time.dtype, torch.float32))

    def density(self, logsnr: torch.Tensor) -> torch.Tensor:
        """Probability density of the log-SNR where times are uniform (without offset and bounds).

        |dt / dlogsnr| of the cosine schedule: 1 / (2 pi cosh((logsnr - shift) / 2)).
        """
        return 1 / (2 * math.pi * torch.cosh((logsnr - self.shift) / 2))

    def weight(self, logsnr: torch.Tensor) -> torch.Tensor:
        """The weight of the prediction's squared error in the loss."""
        return min_snr_weight(logsnr, self.predicts, self.gamma)

    @classmethod
    def imagen(cls) -> Diffusion:
        """As COSMIC trained imagen-pytorch 2.1.0 (App. A).

        The lowest log-SNR is that library's at time 1, where float32 makes -4.371139e-08 of a cosine that should be 0.
        """
        return cls("x0", offset=0.008, lowest=2 * math.log(4.371139e-08), threshold=0.95)

    @classmethod
    def better(cls, image_size: int) -> Diffusion:
        """v-prediction, which is well-conditioned at every noise level, and the schedule shifted for the image size."""
        return cls("v", shift=2 * math.log(64 / image_size))


def squared_error(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(N, ...) twice to (N,): each sample's mean squared error, at least in float32."""
    at_least = torch.promote_types(prediction.dtype, torch.float32)
    return functional.mse_loss(prediction.to(at_least), wanted.to(at_least), reduction="none").flatten(1).mean(1)
