"""Flips, scale and resize: exact where they can be, keyed by position, and refusing what would distort a nucleus."""

from __future__ import annotations

import pytest
import torch
from skimage.transform import resize

from cosmic_ray.ingest import augment, keyed


def crops(n: int = 8, channels: int = 1, side: int = 32) -> torch.Tensor:
    values = keyed.bits(1, torch.arange(n), "crops", channels * side * side) % 256
    return values.to(torch.uint8).reshape(n, channels, side, side)


def test_flips_follow_the_keyed_bits() -> None:
    images, positions = crops(64), torch.arange(900, 964)
    flipped = augment.flip(images, 5, positions)
    seen = set()
    for image, result, (horizontal, vertical) in zip(
        images, flipped, (keyed.bits(5, positions, "flip", 2) >= 2**31).tolist(), strict=True
    ):
        expected = image.flip([axis for axis, on in ((-1, horizontal), (-2, vertical)) if on])
        assert torch.equal(result, expected)
        seen.add((horizontal, vertical))
    assert len(seen) == 4
    assert flipped.dtype == torch.uint8


def test_a_crop_does_not_depend_on_its_batch() -> None:
    images, positions = crops(16), torch.arange(16) * 3
    whole = augment.augment(images, 5, positions, 48)
    parts = [augment.augment(images[i], 5, positions[i], 48) for i in (slice(0, 5), slice(5, 16))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("size", [20, 32, 47])
def test_flipping_first_is_flipping_last(size: int) -> None:
    images, positions = crops(16), torch.arange(16)
    first = augment.augment(images, 5, positions, size)
    last = augment.flip(augment.prepare(images, size), 5, positions)
    torch.testing.assert_close(first, last, rtol=0, atol=1e-5)


def test_same_size_is_exactly_a_division() -> None:
    images = crops()
    assert torch.equal(augment.prepare(images, 32), images.float() / 255)


def test_resize_known_answer() -> None:
    """2 -> 4, half-pixel centres: output centres lie at -0.25, 0.25, 0.75, 1.25 input pixels, clamped at the border."""
    image = torch.tensor([[[[0, 255], [0, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(1, 1, 4, 4)
    assert torch.equal(augment.prepare(image, 4), expected)


def test_resize_agrees_with_scikit_image() -> None:
    images = crops(2, side=32)
    for size in (40, 224):
        ours = augment.prepare(images, size)[0, 0].numpy()
        theirs = resize(images[0, 0].numpy() / 255.0, (size, size), order=1, mode="edge", anti_aliasing=False)
        assert abs(ours - theirs).max() < 1e-5


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard averages to grey away from the border; plain bilinear sampling at 1/4 would alias."""
    board = ((torch.arange(64)[:, None] // 2 + torch.arange(64) // 2) % 2 * 255).to(torch.uint8)
    small = augment.prepare(board[None, None], 16)
    assert (small[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05


def test_background_stays_exactly_zero() -> None:
    image = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    image[..., 50:70, 50:70] = 200
    resized = augment.prepare(image, 224)
    assert (resized[..., :80, :] == 0).all() and resized.max() > 0.7


def test_channels_by_recipe() -> None:
    grey = crops(3)
    paper = augment.prepare(grey, 48, "paper")
    better = augment.prepare(grey, 48, "better")
    assert paper.shape == (3, 3, 48, 48) and better.shape == (3, 1, 48, 48)
    for channel in range(3):
        assert torch.equal(paper[:, channel], better[:, 0])
    assert augment.prepare(crops(2, channels=5), 48).shape == (2, 5, 48, 48)


def test_compiled_agrees_with_eager() -> None:
    images, positions = crops(4), torch.arange(4)
    compiled = torch.compile(augment.augment, fullgraph=True)
    torch.testing.assert_close(
        compiled(images, 5, positions, 48, "paper"),
        augment.augment(images, 5, positions, 48, "paper"),
        rtol=0,
        atol=1e-6,
    )


def test_refusals() -> None:
    with pytest.raises(TypeError, match="uint8"):
        augment.prepare(crops().float(), 32)
    with pytest.raises(ValueError, match="H, H"):
        augment.prepare(crops()[..., :20], 32)
    with pytest.raises(ValueError, match="grey"):
        augment.prepare(crops(channels=5), 32, "paper")
