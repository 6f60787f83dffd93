"""AdamW with its parameter groups, and one update: scale, clip, step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from cosmic_ray.training.parallel import local, norm
from cosmic_ray.training.settings import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(network: nn.Module, settings: Optim) -> list[dict]:
    """AdamW's parameter groups: those that decay and those that do not. Frozen parameters are in neither."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.decay == "all":
        return [{"params": trained, "weight_decay": settings.weight_decay}]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    kept = [parameter for parameter in trained if parameter.ndim < 2]
    found = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in found if group["params"]]


def adamw(network: nn.Module, settings: Optim, rate: float) -> torch.optim.AdamW:
    """The optimiser with all of its state made, so that a checkpoint has a place to go before the first step."""
    optimizer = torch.optim.AdamW(
        groups(network, settings), lr=rate, betas=settings.betas, eps=settings.eps, fused=True
    )
    for parameter in trained_by(optimizer):
        device = parameter.device
        optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            optimizer.state[parameter][moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return optimizer


def trained_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter that `optimizer` moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def finish_gradient(parameters: Iterable[nn.Parameter], count: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Turn the gradient of a sum into that of the mean, clip it, and return its norm before clipping (a scalar).

    Gradients are those of the loss's sum over the whole global batch; `count` is its all-reduced count. Dividing here,
    after the backward pass, needs no count before the last micro-batch of the last rank is known, and costs nothing:
    it is one factor with the clipping's. Nothing waits for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = torch.where(count > 0, 1.0 / count, 0.0)
    total = norm(gradients) * scale
    if clip is not None:
        scale = scale * torch.clamp(clip / (total + 1e-6), max=1.0)
    parts = [local(gradient) for gradient in gradients]
    torch._foreach_mul_(parts, scale.to(parts[0].dtype))
    return total
