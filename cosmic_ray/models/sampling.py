"""Sampling from a diffusion model with the schedulers of diffusers, guided or not, from noise or from an image.

A scheduler is given exactly the noise levels of one run, as many as there are steps, in place of a thousand to choose
from: it rounds nothing, and the network is told the log-SNR that the scheduler itself holds. Networks say x0
(`Diffusion` converts and limits it); every scheduler takes it as such.

Noise is handed in by the caller as a function of the step, keyed by cell (models know nothing of keys): with the same
key and seed a cell gets the same image in any batch and order, under stochastic samplers too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from cosmic_ray.models.diffusion import Diffusion, diffuse, limit, to_x0

Sampler = Literal["ddpm", "ddpm-time", "ddim", "dpm++2m", "dpm++2m-sde", "unipc"]
"""Ancestral sampling (Ho et al. 2020), with 1000 steps the reference, in equal steps of log-SNR or, as imagen-pytorch
samples (`paper`), of time; DDIM (Song et al. 2021); DPM-Solver++ (2M), and its stochastic form (Lu et al. 2022); UniPC
(Zhao et al. 2023)."""

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`network(x, logsnr, condition, drop)`: see `models.unet` and `models.unet_imagen`."""

Noise = Callable[[int], torch.Tensor]
"""`noise(step)`: standard normal float32 (N, C, H, W), keyed by cell and step. Step 0 is where sampling starts; step
k is what a stochastic sampler adds after its k-th call of the network; nothing is added after the last."""

START = -15.0
"""The lowest log-SNR that sampling starts at: noise hides even the mean of a 256 x 256 image there, and below, float32
cannot tell a schedule's neighbouring steps apart."""
END = 10.0
"""The log-SNR of the last step, from which x0 is taken as it is: noise of one grey level of 255."""
STOCHASTIC = ("ddpm", "ddpm-time", "dpm++2m-sde")


class Sampled(NamedTuple):
    """What a run gives."""

    images: torch.Tensor
    """Float32 (N, C, H, W), in [-1, 1] where the diffusion is limited."""
    nfe: int
    """Network evaluations a sample: two a step under guidance, one where the scale is 0 or 1."""


@torch.inference_mode()
def sample(
    network: Network,
    diffusion: Diffusion,
    condition: torch.Tensor,
    noise: Noise,
    *,
    sampler: Sampler = "unipc",
    steps: int = 20,
    guidance: float = 1.0,
    start: torch.Tensor | None = None,
    strength: float = 1.0,
) -> Sampled:
    """Samples for `condition` (N, D), on its device.

    `guidance`: 1 is the conditional model, 0 the unconditional one; w > 1 goes beyond the conditional prediction by
    w - 1 times its difference from the unconditional one (Ho & Salimans 2022).

    `start`: images (N, C, H, W) in [-1, 1] to begin from in place of noise, noised up to time `strength` in (0, 1]
    (SDEdit; Meng et al. 2022): the steps before that are left out, and their evaluations with them.

    Raises ValueError for fewer than one step, a strength out of range or given without `start`, one so small that it
    leaves no step, and an unknown sampler.
    """
    logsnrs = levels(diffusion, sampler, steps)
    begin = _beginning(diffusion, logsnrs, strength, start)
    scheduler = _scheduler(diffusion, sampler, logsnrs)
    x = noise(0).to(condition.device)
    exact = torch.logit(scheduler.alphas_cumprod.double()).flip(0).to(x)  # after the scheduler's own rounding
    if start is not None:
        x = diffuse(start.to(x), x, exact[begin].expand(len(x)))
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    nfe = 0
    for step in range(begin, steps):
        x0, calls = _guided(network, diffusion, x, exact[step], condition, guidance)
        given = {"eta": 1.0} if sampler in ("ddpm", "ddpm-time") else {}
        if sampler in STOCHASTIC:
            last = step + 1 == steps
            given["variance_noise"] = torch.zeros_like(x) if last else noise(step + 1).to(x)
        x = scheduler.step(x0, scheduler.timesteps[step], x, return_dict=False, **given)[0]
        nfe += calls
    return Sampled(x if diffusion.threshold is None else x.clamp(-1, 1), nfe)


def _guided(
    network: Network,
    diffusion: Diffusion,
    x: torch.Tensor,
    logsnr: torch.Tensor,
    condition: torch.Tensor,
    guidance: float,
) -> tuple[torch.Tensor, int]:
    """The limited x0 at `x`, and the evaluations a sample that took; both halves of a guided step are one batch."""
    n = len(x)
    level = logsnr.expand(n)
    if guidance in (0.0, 1.0):
        drop = torch.full((n,), guidance == 0.0, device=x.device)
        said, calls = network(x, level, condition, drop), 1
    else:
        drop = torch.arange(2 * n, device=x.device) >= n
        both = network(x.repeat(2, 1, 1, 1), level.repeat(2), condition.repeat(2, 1), drop)
        conditional, unconditional = both.chunk(2)
        said, calls = unconditional + guidance * (conditional - unconditional), 2
    x0 = to_x0(said.to(x.dtype), x, level, diffusion.predicts)
    return (x0 if diffusion.threshold is None else limit(x0, diffusion.threshold)), calls


def levels(diffusion: Diffusion, sampler: Sampler, steps: int) -> torch.Tensor:
    """The log-SNRs of a run's steps, float64 (steps,), noisiest first.

    Equal steps of log-SNR from START to END (Lu et al. 2022, Sec. 3.3): in orthonormal components an image varies by
    as much as 30 in its mean and as little as 0.02 in its grain, each settles where noise is of its own size, and such
    steps serve all alike. In equal steps of time (`ddpm-time`), UniPC's 25 leave a component of 30 at 0.6 of its
    spread, and even 1000 ancestral ones leave one of 0.05 at 0.92 to 0.95.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if sampler == "ddpm-time":
        return diffusion.logsnr(torch.linspace(1, 1 / steps, steps, dtype=torch.float64))
    return torch.linspace(START, END, steps, dtype=torch.float64)


def _beginning(diffusion: Diffusion, logsnrs: torch.Tensor, strength: float, start: torch.Tensor | None) -> int:
    """The first step to take: the first that is no noisier than time `strength`."""
    if not 0 < strength <= 1 or (start is None and strength != 1):
        raise ValueError(f"strength must be in (0, 1], and 1 without an image to start from, not {strength}")
    if strength == 1:
        return 0
    begin = int((logsnrs < diffusion.logsnr(torch.tensor(strength, dtype=torch.float64)) - 1e-9).sum())
    if begin == len(logsnrs):
        raise ValueError(f"strength {strength} leaves none of {len(logsnrs)} steps")
    return begin


def _scheduler(diffusion: Diffusion, sampler: Sampler, logsnrs: torch.Tensor) -> Any:
    """The scheduler of diffusers whose training steps are this run's steps: timestep i is step `len - 1 - i`."""
    import diffusers

    abar = logsnrs.flip(0).sigmoid()
    betas = 1 - abar / torch.cat((abar.new_ones(1), abar[:-1]))
    shared = {"num_train_timesteps": len(abar), "trained_betas": betas.tolist(), "prediction_type": "sample"}
    if sampler in ("ddpm", "ddpm-time", "ddim"):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **shared)
        # Its own are multiplied up in float32, where the noisiest vanish.
        scheduler.alphas_cumprod = abar
        if sampler == "ddpm-time":  # which ends at time 0, not at no noise at all
            scheduler.final_alpha_cumprod = diffusion.logsnr(torch.zeros((), dtype=torch.float64)).sigmoid()
        return scheduler
    if sampler in ("dpm++2m", "dpm++2m-sde"):
        kind = "sde-dpmsolver++" if sampler == "dpm++2m-sde" else "dpmsolver++"
        return diffusers.DPMSolverMultistepScheduler(algorithm_type=kind, timestep_spacing="trailing", **shared)
    if sampler == "unipc":
        return diffusers.UniPCMultistepScheduler(timestep_spacing="trailing", **shared)
    raise ValueError(f"unknown sampler {sampler!r}")
