"""Encoders: sizes of the literature, MAE's conventions written out a second time, and rebuilding by plain timm."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from cosmic_ray.models import vit


def vit_parameters(dim: int, depth: int, patch: int, channels: int, tokens: int) -> int:
    """Parameters of a ViT without classifier, MLP ratio 4, biases everywhere, positions counted."""
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    mlp = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    block = attention + mlp + 2 * 2 * dim
    embedding = channels * patch * patch * dim + dim
    return embedding + dim + (tokens + 1) * dim + depth * block + 2 * dim


@pytest.mark.parametrize("name", vit.PRESETS)
def test_parameter_counts(name: str) -> None:
    preset = vit.PRESETS[name]
    with torch.device("meta"):
        encoder = timm.create_model(**vit.timm_arguments(preset, 3))
    expected = vit_parameters(preset.embed_dim, preset.depth, preset.patch_size, 3, preset.tokens)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_large_is_the_papers() -> None:
    """ViT-L/16 at 224: 24 blocks of 1024 with 16 heads, "307 M" with ImageNet's classifier and learnt positions."""
    large = vit.PRESETS["large"]
    assert (large.img_size, large.patch_size, large.embed_dim, large.depth, large.num_heads) == (224, 16, 1024, 24, 16)
    assert vit_parameters(1024, 24, 16, 3, 196) == 303_301_632


def test_positions_by_the_formula() -> None:
    """He et al. A.1: half the width for the column, half for the row; sin(p / 10000^(i / (d/4))), then cos."""
    dim, side = 16, 3
    positions = vit.sincos_positions(dim, side)[0]
    assert positions.shape == (10, dim) and positions.dtype == torch.float32
    assert (positions[0] == 0).all()
    for row in range(side):
        for column in range(side):
            rates = [10000 ** (-i / 4) for i in range(4)]
            expected = [f(p * rate) for p in (column, row) for f in (math.sin, math.cos) for rate in rates]
            torch.testing.assert_close(positions[1 + row * side + column], torch.tensor(expected))


def test_patchify_by_hand() -> None:
    """Raster order of patches; in a patch row, column, channel (the convention of facebookresearch/mae)."""
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = vit.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for n in range(2):
        for patch in range(6):
            top, left = patch // 3 * 2, patch % 3 * 2
            expected = [images[n, c, top + y, left + x].item() for y in range(2) for x in range(2) for c in range(3)]
            assert patches[n, patch].tolist() == expected


@pytest.mark.parametrize(("channels", "side", "patch"), [(1, 8, 4), (3, 12, 4), (5, 6, 2)])
def test_unpatchify_inverts(channels: int, side: int, patch: int) -> None:
    images = torch.rand(2, channels, side, side)
    assert torch.equal(vit.unpatchify(vit.patchify(images, patch), patch, channels), images)


def test_encoder_starts_as_mae() -> None:
    torch.manual_seed(0)
    preset = vit.PRESETS["tiny"]
    encoder = vit.build_encoder(preset, 1)
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed, vit.sincos_positions(64, 10))
    for layer, bound in (
        (encoder.blocks[0].attn.qkv, math.sqrt(6 / (64 + 192))),
        (encoder.patch_embed.proj, math.sqrt(6 / (64 + 64))),
    ):
        largest = layer.weight.abs().max()
        assert 0.98 * bound < largest <= bound
    assert (encoder.blocks[0].attn.qkv.bias == 0).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="tile"):
        vit.build_encoder(vit.ViTPreset("vit_tiny_patch16_224", 80, 9, 64, 1, 4), 1)
    with pytest.raises(ValueError, match="multiple of 4"):
        vit.sincos_positions(30, 4)
