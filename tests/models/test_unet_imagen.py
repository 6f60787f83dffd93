"""Imagen's U-Net: its size, its conditioning, and that it is the published library's, weight by weight."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cosmic_ray.models.diffusion import Diffusion, diffuse, limit, posterior, squared_error, to_x0
from cosmic_ray.models.sampling import sample
from cosmic_ray.models.unet_imagen import ImagenConfig, ImagenUNet

SMALL = ImagenConfig(image_size=16, condition_size=6, dim=8, token_dim=16, widths=(1, 2))


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` with every parameter drawn anew, those that begin at zero too; norms' gains stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
        gain = parameter.data.eq(1).all()
        parameter.data.copy_(1 + 0.1 * noise if gain else noise / math.sqrt(max(fan, 4)))
    return network


def inputs(n: int = 3, size: int = 32, condition: int = 64, channels: int = 3) -> tuple[torch.Tensor, ...]:
    """Noisy images, log-SNRs, latents, and the second sample's condition dropped."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, size, size, generator=generator)
    latents = torch.randn(n, condition, generator=generator)
    return x, torch.linspace(-8, 8, n), latents, torch.arange(n) == 1


def test_the_published_settings_have_the_published_size() -> None:
    assert sum(p.numel() for p in ImagenUNet().parameters()) == 11_565_780


FROZEN = torch.tensor(
    [
        [0.533516, 0.092065, -0.483313],
        [2.787097, 2.050098, 1.533395],
        [2.783794, 4.029747, -1.207022],
        [-4.649048, -1.560954, 0.384180],
    ]
)


def test_outputs_of_seeded_weights_stay() -> None:
    """Figures of a network that agreed with imagen-pytorch 2.1.0 (see the comparison below)."""
    network = filled(ImagenUNet()).eval()
    with torch.no_grad():
        out = network(*inputs())
    found = torch.stack((out.mean((1, 2, 3)), out.std((1, 2, 3)), out[:, 0, 3, 5], out[:, 2, 30, 17]))
    torch.testing.assert_close(found, FROZEN, atol=1e-4, rtol=1e-4)


def test_a_new_network_predicts_zero() -> None:
    assert not ImagenUNet(SMALL)(*inputs(size=16, condition=6)).any()


def test_a_dropped_condition_does_not_matter_and_a_given_one_does() -> None:
    network = filled(ImagenUNet(SMALL)).double().eval()
    x, logsnr, latents, drop = (t.double() if t.is_floating_point() else t for t in inputs(size=16, condition=6))
    one, other = network(x, logsnr, latents, drop), network(x, logsnr, latents + 1, drop)
    changed = (one - other).abs().amax((1, 2, 3))
    assert changed[1] == 0 and changed[0] > 1e-6 and changed[2] > 1e-6


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network = filled(ImagenUNet(SMALL)).double().eval()
    given = [t.double() if t.is_floating_point() else t for t in inputs(size=16, condition=6)]
    together = network(*given)
    for i in range(3):
        torch.testing.assert_close(network(*(t[i : i + 1] for t in given))[0], together[i], rtol=0, atol=1e-11)


def test_every_weight_learns() -> None:
    network = filled(ImagenUNet(SMALL))
    network(*inputs(size=16, condition=6)).square().sum().backward()
    unused = {"resampler.positions.weight"}  # 512 places for 256 tokens, as published
    for name, parameter in network.named_parameters():
        rows = parameter.grad[:256] if name in unused else parameter.grad
        assert rows.abs().sum() > 0, name


def test_blocks_hold_most_of_the_weights_once() -> None:
    network = ImagenUNet()
    inside = [p for block in network.blocks() for p in block.parameters()]
    assert len({id(p) for p in inside}) == len(inside)
    assert sum(p.numel() for p in inside) > 0.9 * sum(p.numel() for p in network.parameters())


def test_an_image_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="100 px"):
        ImagenUNet(ImagenConfig(image_size=100))


@pytest.fixture(scope="module")
def imagen() -> Any:
    """The published library with the published settings, and random weights. No T5 is loaded: a latent is given."""
    transformers = pytest.importorskip("transformers", reason="imagen-pytorch is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.T5Config, "from_pretrained", lambda *_, **__: SimpleNamespace(d_model=768))
        library = pytest.importorskip("imagen_pytorch", reason="imagen-pytorch is not installed")
        unet = library.Unet(
            dim=32,
            cond_dim=64,
            dim_mults=(1, 2, 4, 8),
            num_resnet_blocks=1,
            layer_attns=(False, False, False, True),
            layer_cross_attns=(False, False, False, True),
        )
        made = library.Imagen(
            unets=unet, image_sizes=32, timesteps=1000, cond_drop_prob=0.1, pred_objectives="x_start", text_embed_dim=64
        )
    filled(made.unets[0])
    return made.eval()


def copied(unet: nn.Module) -> ImagenUNet:
    """Ours with the library's weights: the same shapes in the same order."""
    ours = ImagenUNet().eval()
    theirs, mine = unet.state_dict(), ours.state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in mine.values()]
    ours.load_state_dict(dict(zip(mine, theirs.values(), strict=True)))
    return ours


@pytest.mark.exhaustive
class TestTheLibrary:
    """imagen-pytorch 2.1.0 itself; skipped where it is not installed (`pip install imagen-pytorch==2.1.0`)."""

    def test_parameters(self, imagen: Any) -> None:
        count = sum(p.numel() for p in imagen.parameters())
        assert count == sum(p.numel() for p in ImagenUNet().parameters()) == 11_565_780

    @pytest.mark.parametrize("dropped", [0.0, 1.0])
    @torch.no_grad()
    def test_outputs(self, imagen: Any, dropped: float) -> None:
        x, logsnr, latents, _ = inputs()
        mask = torch.ones(3, 1, dtype=torch.bool)
        theirs = imagen.unets[0](x, logsnr, text_embeds=latents[:, None], text_mask=mask, cond_drop_prob=dropped)
        ours = copied(imagen.unets[0])(x, logsnr, latents, torch.full((3,), dropped == 1))
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_schedule(self, imagen: Any) -> None:
        times = torch.cat((torch.linspace(0, 1, 1001), torch.rand(1000)))
        ours, theirs = Diffusion.imagen().logsnr(times), imagen.noise_schedulers[0].log_snr(times)
        # Near time 1 float32 itself is off: a time's last bit is worth 0.01 there, and the image is noise alike.
        steep = theirs < -15
        torch.testing.assert_close(ours[~steep], theirs[~steep], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours[times == 1], theirs[times == 1], rtol=0, atol=0.01)

    @pytest.mark.parametrize("dropped", [0.0, 1.0])
    @torch.no_grad()
    def test_loss(self, imagen: Any, dropped: float) -> None:
        generator = torch.Generator().manual_seed(5)
        images = torch.rand(3, 3, 32, 32, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        times, latents = torch.tensor([0.1, 0.5, 0.9]), inputs()[2]
        imagen.cond_drop_prob = dropped
        theirs = imagen.p_losses(
            imagen.unets[0], images, times, noise_scheduler=imagen.noise_schedulers[0], text_embeds=latents[:, None],
            text_mask=torch.ones(3, 1, dtype=torch.bool), noise=noise, pred_objective="x_start", min_snr_gamma=5,
        )  # fmt: skip
        diffusion, x0 = Diffusion.imagen(), images * 2 - 1
        logsnr = diffusion.logsnr(times)
        x = diffuse(x0, noise, logsnr)
        said = copied(imagen.unets[0])(x, logsnr, latents, torch.full((3,), dropped == 1))
        ours = (squared_error(said, x0) * diffusion.weight(logsnr)).mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_a_sampling_step(self, imagen: Any) -> None:
        """Prediction, dynamic thresholding and posterior, without the step's noise."""
        x, _, latents, _ = inputs()
        x = x * 2
        now, after = torch.full((3,), 0.5), torch.full((3,), 0.499)
        (mean, variance, _), x0 = imagen.p_mean_variance(
            imagen.unets[0], x, now, t_next=after, noise_scheduler=imagen.noise_schedulers[0],
            text_embeds=latents[:, None], text_mask=torch.ones(3, 1, dtype=torch.bool), pred_objective="x_start",
        )  # fmt: skip
        diffusion = Diffusion.imagen()
        logsnr, logsnr_next = diffusion.logsnr(now), diffusion.logsnr(after)
        said = copied(imagen.unets[0])(x, logsnr, latents, torch.zeros(3, dtype=torch.bool))
        found = limit(to_x0(said, x, logsnr, "x0"), diffusion.threshold)
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)
        ours = posterior(found, x, logsnr, logsnr_next)
        torch.testing.assert_close(ours[0], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[1], variance, rtol=1e-3, atol=1e-6)

    @torch.no_grad()
    def test_sampling(self, imagen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eight steps of the library's own loop against `ddpm-time`, on the same noise."""
        generator = torch.Generator().manual_seed(2)
        noise = [torch.randn(3, 3, 32, 32, generator=generator) for _ in range(9)]
        latents, scheduler = inputs()[2], imagen.noise_schedulers[0]
        with monkeypatch.context() as patch:
            fed = iter(noise)
            for name in ("randn", "randn_like"):
                patch.setattr(torch, name, lambda *_, **__: next(fed))
            patch.setattr(scheduler, "num_timesteps", 8)
            theirs = imagen.p_sample_loop(
                imagen.unets[0], (3, 3, 32, 32), noise_scheduler=scheduler, text_embeds=latents[:, None],
                text_mask=torch.ones(3, 1, dtype=torch.bool), pred_objective="x_start", use_tqdm=False,
            )  # fmt: skip
        ours = sample(
            copied(imagen.unets[0]), Diffusion.imagen(), latents, noise.__getitem__, sampler="ddpm-time", steps=8
        )
        assert ours.nfe == 8
        assert theirs.std() > 0.1
        torch.testing.assert_close((ours.images + 1) / 2, theirs, rtol=0, atol=1e-4)
