"""The network of `recipe: better`: sizes, conditioning, independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosmic_ray.models.unet import PRESETS, UNet, UNetConfig

SMALL = UNetConfig(image_size=16, widths=(8, 32), depths=(1, 1), attention_from=1, condition_size=6)


def filled(network: nn.Module) -> nn.Module:
    """`network` with the layers that begin at zero drawn anew."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def inputs(n: int = 3, size: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, size, size, generator=generator, dtype=torch.float64)
    latents = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.linspace(-8, 8, n, dtype=torch.float64), latents, torch.arange(n) == 1


@pytest.mark.parametrize("preset", ["tiny", pytest.param("small", marks=pytest.mark.exhaustive),
                                    pytest.param("base", marks=pytest.mark.exhaustive),
                                    pytest.param("large", marks=pytest.mark.exhaustive)])  # fmt: skip
def test_presets_take_their_images(preset: str) -> None:
    config = UNetConfig.of(preset, condition_size=6)
    network = UNet(config)
    x, logsnr, latents, drop = (t.float() if t.is_floating_point() else t for t in inputs(2, config.image_size))
    with torch.no_grad():
        assert network(x, logsnr, latents, drop).shape == x.shape


def test_every_preset_is_there() -> None:
    assert {name: config.image_size for name, config in PRESETS.items()} == {
        "tiny": 64, "small": 128, "base": 128, "large": 256
    }  # fmt: skip


def test_a_new_network_predicts_zero() -> None:
    assert not UNet(SMALL).double()(*inputs()).any()


def test_log_snr_and_condition_matter_and_a_dropped_condition_does_not() -> None:
    network = filled(UNet(SMALL))
    x, logsnr, latents, drop = inputs()
    out = network(x, logsnr, latents, drop)
    changed = (network(x, logsnr, latents + 1, drop) - out).abs().amax((1, 2, 3))
    assert changed[1] == 0 and changed[0] > 1e-4 and changed[2] > 1e-4
    assert torch.all((network(x, logsnr + 0.5, latents, drop) - out).abs().amax((1, 2, 3)) > 1e-4)
    assert torch.all((network(x, logsnr, latents, ~drop) - out).abs().amax((1, 2, 3)) > 1e-4)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network = filled(UNet(SMALL))
    together = network(*inputs())
    for i in range(3):
        torch.testing.assert_close(network(*(t[i : i + 1] for t in inputs()))[0], together[i], rtol=0, atol=1e-12)


def test_conditions_of_any_scale_arrive_alike() -> None:
    network = filled(UNet(SMALL))
    x, logsnr, latents, drop = inputs()
    expected = network(x, logsnr, latents, drop)
    mean, std = torch.linspace(-50, 50, 6).double(), torch.linspace(0.1, 20, 6).double()
    network.standardise(mean, std)
    torch.testing.assert_close(network(x, logsnr, latents * std + mean, drop), expected)


def test_a_constant_condition_is_no_division_by_zero() -> None:
    network = filled(UNet(SMALL))
    network.standardise(torch.zeros(6), torch.zeros(6))
    assert network(*inputs()).isfinite().all()


def test_statistics_are_saved_with_the_weights() -> None:
    network = UNet(SMALL)
    network.standardise(torch.arange(6.0), torch.arange(6.0) + 1)
    other = UNet(SMALL)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.condition_mean, torch.arange(6.0))
    assert torch.equal(other.condition_std, torch.arange(6.0) + 1)


def test_every_weight_learns() -> None:
    network = filled(UNet(SMALL))
    network(*inputs()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_nothing_depends_on_the_batch_or_on_chance() -> None:
    for config in PRESETS.values():
        with torch.device("meta"):
            network = UNet(config)
        forbidden = (nn.modules.batchnorm._BatchNorm, nn.Dropout)
        assert not any(isinstance(module, forbidden) for module in network.modules())


def test_blocks_hold_most_of_the_weights_once() -> None:
    with torch.device("meta"):
        network = UNet(PRESETS["tiny"])
    inside = [p for block in network.blocks() for p in block.parameters()]
    assert len({id(p) for p in inside}) == len(inside)
    assert sum(p.numel() for p in inside) > 0.9 * sum(p.numel() for p in network.parameters())


def test_an_image_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="100 px"):
        UNet(UNetConfig.of("tiny", image_size=100))
