"""The masked autoencoder: masks exact, losses worked by hand, nothing leaks, sums add up, the export is the model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.models.mae import LEVEL_UNIT, SPREAD_FLOOR, MAEConfig, MAELoss, MaskedAutoencoder, export_encoder
from cosmic_ray.models.vit import PRESETS, ViTPreset, patchify

SMALL = ViTPreset("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)  # 64 patches
FOUR = ViTPreset("vit_tiny_patch16_224", img_size=4, patch_size=2, embed_dim=8, depth=1, num_heads=1)  # 4 patches
RECIPES = ("paper", "better")


def build(recipe: str, size: ViTPreset = SMALL, **changes: float) -> MaskedAutoencoder:
    torch.manual_seed(0)
    channels = 3 if recipe == "paper" else 1
    return MaskedAutoencoder(MAEConfig(size, recipe, channels, decoder_dim=32, decoder_heads=4, **changes))


def nuclei(recipe: str, n: int = 6, side: int = 32, seed: int = 1) -> torch.Tensor:
    """Float (N, C, side, side): textured discs of growing radius on exactly 0; the first image is empty."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side) - side / 2 + 0.5, torch.arange(side) - side / 2 + 0.5, indexing="ij")
    radii = torch.linspace(0, side / 2, n)[:, None, None]
    texture = 0.3 + 0.4 * torch.rand(n, side, side, generator=generator)
    images = torch.where((y**2 + x**2).sqrt() < radii, texture, 0.0)[:, None]
    return images.expand(-1, 3, -1, -1) if recipe == "paper" else images


def noise_for(images: torch.Tensor, tokens: int = 64, seed: int = 2) -> torch.Tensor:
    return torch.rand(len(images), tokens, generator=torch.Generator().manual_seed(seed))


class TestMasking:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_every_patch_is_visible_or_masked_once(self, recipe: str) -> None:
        model, images = build(recipe), nuclei(recipe)
        visible, masked = model.split(patchify(images, 4), noise_for(images))
        assert visible.shape == (6, 16) and masked.shape == (6, 48)
        assert torch.equal(torch.cat((visible, masked), 1).sort(1).values, torch.arange(64).expand(6, -1))

    def test_paper_shows_the_lowest_noise(self) -> None:
        model, images = build("paper"), nuclei("paper")
        noise = noise_for(images)
        visible, _ = model.split(patchify(images, 4), noise)
        for row, chosen in zip(noise.tolist(), visible.tolist(), strict=True):
            assert set(chosen) == set(sorted(range(64), key=row.__getitem__)[:16])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.booleans(), min_size=64, max_size=64), st.integers(0, 2**31), st.sampled_from([2, 1000]))
    def test_better_shows_each_kind_by_its_share(self, kinds: list[bool], seed: int, levels: int) -> None:
        """Against the rule written in plain Python, with coarse noise (many ties) too."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(levels, (1, 64), generator=generator) / levels
        patches = torch.tensor(kinds)[None, :, None] * torch.ones(1, 64, 16)
        visible, masked = build("better").split(patches, noise)
        order = sorted(range(64), key=lambda patch: (noise[0, patch].item(), patch))
        foreground = [patch for patch in order if kinds[patch]]
        background = [patch for patch in order if not kinds[patch]]
        shown = math.floor(len(foreground) * 16 / 64 + 0.5)
        assert set(visible[0].tolist()) == {*foreground[:shown], *background[: 16 - shown]}
        assert len({*visible[0].tolist(), *masked[0].tolist()}) == 64

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_ties_fall_to_the_earlier_patch(self, recipe: str) -> None:
        model = build(recipe)
        visible, _ = model.split(torch.zeros(1, 64, 16 * model.config.channels), torch.full((1, 64), 0.5))
        assert visible[0].tolist() == list(range(16))

    def test_visible_counts(self) -> None:
        assert MAEConfig.of("large", "paper").visible == 49  # of 196, mask ratio 0.75
        assert MAEConfig(PRESETS["large"], mask_ratio=0.9).visible == 20
        for ratio in (0.0, 1.0):
            with pytest.raises(ValueError, match="mask_ratio"):
                build("better", mask_ratio=ratio)


class TableMAE(MaskedAutoencoder):
    """Predicts what a table (N, L, outputs) says of each patch."""

    table: torch.Tensor

    def _predict(self, tokens: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        return torch.stack([row[index] for row, index in zip(self.table, masked, strict=True)])


def table_model(recipe: str, table: torch.Tensor) -> TableMAE:
    model = TableMAE(MAEConfig(FOUR, recipe, channels=1, mask_ratio=0.5, decoder_dim=8, decoder_heads=1))
    model.table = table.requires_grad_()
    return model


class TestLossByHand:
    """Four patches of 2 x 2 pixels; noise hides the last two. One channel throughout."""

    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4]])

    def image(self, *patches: list[float]) -> torch.Tensor:
        grid = torch.tensor(patches).reshape(1, 2, 2, 2, 2)
        return grid.permute(0, 1, 3, 2, 4).reshape(1, 1, 4, 4)

    def test_paper(self) -> None:
        image = self.image([1, 1, 1, 1], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.9], [0, 0, 0, 0])
        table = torch.full((1, 4, 4), 0.1)
        model = table_model("paper", table)
        result = model(image, self.noise)
        # (3 * 0.4^2 + 0.8^2) / 4 = 0.28, and 4 * 0.1^2 / 4 = 0.01
        torch.testing.assert_close(result, MAELoss(*(torch.tensor([v]) for v in (0.29, 2.0, 0.28, 1.0))))
        result.loss.sum().backward()
        assert (table.grad[0, :2] == 0).all() and (table.grad[0, 2:] != 0).all()  # visible patches teach nothing

    def test_better(self) -> None:
        """Of two foreground and two background patches one of each is shown: masked are patch 1 and patch 3."""
        image = self.image([0.5, 0.5, 0.5, 0.5], [0.2, 0.4, 0.2, 0.4], [0, 0, 0, 0], [0, 0, 0, 0])
        table = torch.zeros(1, 4, 6)  # pattern of 4, level, spread
        table[0, 1] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
        table[0, 3] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5, 0.2])
        result = table_model("better", table)(image, self.noise)
        scale = math.sqrt(0.1**2 + SPREAD_FLOOR**2)  # patch 1: mean 0.3, standard deviation 0.1
        first = (0.1 / scale) ** 2 + (1 - 0.3 / LEVEL_UNIT) ** 2 + (2 - math.log(scale / SPREAD_FLOOR)) ** 2
        second = 0.1**2 + 0.5**2 + 0.2**2  # patch 3 is flat: pattern, level and spread are 0
        pixels = ((0.2 - 1 * LEVEL_UNIT) ** 2 + (0.4 - 1 * LEVEL_UNIT) ** 2) / 2  # pattern 0: only the level speaks
        expected = (first + 0.02 * second, 1.02, pixels, 1.0)
        torch.testing.assert_close(result, MAELoss(*(torch.tensor([v]) for v in expected)))

    def test_perfect_predictions_cost_nothing_and_reconstruct(self) -> None:
        image = self.image([0.5, 0.5, 0.5, 0.5], [0.2, 0.4, 0.1, 0.4], [0, 0, 0, 0], [0, 0, 0, 0])
        target = torch.tensor([0.2, 0.4, 0.1, 0.4])
        mean, scale = target.mean(), (target.var(correction=0) + SPREAD_FLOOR**2).sqrt()
        table = torch.zeros(1, 4, 6)
        table[0, 1] = torch.cat(((target - mean) / scale, mean[None] / LEVEL_UNIT, (scale / SPREAD_FLOOR).log()[None]))
        model = table_model("better", table)
        result = model(image, self.noise)
        assert result.loss.item() < 1e-10 and result.pixel_error.item() < 1e-10
        filled, hidden = model.reconstruct(image, self.noise)
        torch.testing.assert_close(filled, image)
        assert hidden.tolist() == [[False, True, False, True]]


class TestEncoder:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_visible_tokens_go_through_timms_own_blocks(self, recipe: str) -> None:
        """timm's convolution on the whole image, then its blocks on the subset alone, gives the same tokens."""
        model, images = build(recipe), nuclei(recipe)
        patches = patchify(images, 4)
        visible, _ = model.split(patches, noise_for(images))
        chosen = torch.stack([rows[index] for rows, index in zip(patches, visible, strict=True)])
        ours = model._encode(chosen, visible)
        encoder = model.encoder
        every = encoder._pos_embed(encoder.patch_embed(images))
        subset = torch.stack([torch.cat((row[:1], row[1:][i])) for row, i in zip(every, visible, strict=True)])
        for block in encoder.blocks:
            subset = block(subset)
        torch.testing.assert_close(ours, encoder.norm(subset), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_all_tokens_visible_is_inference(self, recipe: str) -> None:
        """Training's path over every patch, in any order, pools to the embedding: no gap but the number of tokens."""
        model, images = build(recipe), nuclei(recipe)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).expand(6, -1)
        tokens = model._encode(patchify(images, 4)[:, order[0]], order)
        torch.testing.assert_close(tokens[:, 1:].mean(1), model.embed(images), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_export_rebuilds_the_embedding_in_plain_timm(self, recipe: str) -> None:
        model, images = build(recipe).eval(), nuclei(recipe)
        with torch.no_grad():
            for parameter in model.parameters():  # away from zero biases and unit norms
                parameter.add_(0.05 * torch.randn_like(parameter))
        arguments, weights = export_encoder(model)
        plain = timm.create_model(**arguments).eval()
        plain.load_state_dict(weights, strict=True)
        embedding = model.embed(images)
        assert embedding.shape == (6, 32) and embedding.dtype == torch.float32
        assert torch.equal(plain(images), embedding)
        tokens = plain.forward_features(images)
        torch.testing.assert_close(tokens[:, 1:].mean(1), embedding)  # the class token is not in the mean
        assert all(value.dtype == torch.float32 and value.is_contiguous() for value in weights.values())

    def test_better_starts_with_tokens_as_long_as_their_positions(self) -> None:
        """For patches of contrast 0.1 around 0; at MAE's initialisation (`paper`) they are several times shorter."""
        ratios = {}
        for recipe in RECIPES:
            torch.manual_seed(0)
            model = MaskedAutoencoder(MAEConfig.of("tiny", recipe, channels=1))
            images = 0.1 * torch.randn(4, 1, 80, 80)
            length = model.encoder.patch_embed(images).detach().norm(dim=-1).mean()
            ratios[recipe] = float(length / model.encoder.pos_embed[:, 1:].norm(dim=-1).mean())
        assert 0.9 < ratios["better"] < 1.1
        assert ratios["paper"] < 0.3

    def test_paper_sizes(self) -> None:
        """App. A: ViT-L/16 at 224 on three channels; decoder 512 x 1 block, 16 heads, MLP ratio 4."""
        config = MAEConfig.of("large", "paper")
        with torch.device("meta"):
            model = MaskedAutoencoder(config)
        encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        block = 4 * 512**2 + 4 * 512 + 8 * 512**2 + 5 * 512 + 4 * 512
        assert encoder == 303_301_632
        assert total - encoder == (1024 * 512 + 512) + 512 + block + 2 * 512 + (512 * 768 + 768)
        assert (config.channels, config.decoder_depth, config.decoder_heads, config.mask_ratio) == (3, 1, 16, 0.75)
        assert model.decoder[0].attn.num_heads == 16


class TestNumbers:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_masked_pixels_do_not_leak(self, recipe: str) -> None:
        model, images = build(recipe), nuclei(recipe)
        noise = noise_for(images)
        before, hidden = model.reconstruct(images, noise)
        hidden_pixels = hidden.reshape(6, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        changed = torch.where(hidden_pixels, images * 0.5, images)  # the foreground stays where it is
        after, hidden_after = model.reconstruct(changed, noise)
        assert torch.equal(before, after) and torch.equal(hidden, hidden_after)
        assert torch.equal(torch.where(hidden_pixels, 0, before), torch.where(hidden_pixels, 0, images))

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_sums_do_not_depend_on_how_a_batch_is_cut(self, recipe: str) -> None:
        model, images = build(recipe).double(), nuclei(recipe).double()
        noise = noise_for(images)
        whole = model(images, noise)
        parts = [model(images[i], noise[i]) for i in (slice(0, 1), slice(1, 4), slice(4, 6))]
        for field, value in whole._asdict().items():
            assert value.dtype == torch.float64
            joined = torch.cat([getattr(part, field) for part in parts])
            torch.testing.assert_close(joined, value, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("value", [0.0, 1 / 255, 1.0])
    def test_constant_crops_give_finite_losses_and_gradients(self, recipe: str, value: float) -> None:
        model = build(recipe)
        images = torch.full((2, model.config.channels, 32, 32), value)
        result = model(images, noise_for(images))
        (result.loss.sum() / result.count.sum()).backward()
        assert all(torch.isfinite(field).all() for field in result)
        assert (result.count > 0).all()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)

    def test_wild_predictions_reconstruct_to_finite_pixels(self) -> None:
        model, images = build("better"), nuclei("better")
        with torch.no_grad():
            model.head.bias.fill_(1000.0)
        filled, _ = model.reconstruct(images, noise_for(images))
        assert torch.isfinite(model(images, noise_for(images)).pixel_error).all()
        assert filled.min() >= 0 and filled.max() <= 1

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_bf16_autocast(self, recipe: str) -> None:
        model, images = build(recipe), nuclei(recipe)
        exact = model(images, noise_for(images))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, noise_for(images))
            assert model.embed(images).dtype == torch.float32
        assert rounded.loss.dtype == torch.float32
        torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.03, atol=0.01)
        torch.testing.assert_close(rounded.count, exact.count)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_one_graph(self, recipe: str) -> None:
        """Nothing in a step depends on data in Python: torch.compile captures it whole."""
        model, images = build(recipe), nuclei(recipe)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        result = compiled(images, noise_for(images))
        torch.testing.assert_close(result.loss, model(images, noise_for(images)).loss)
        result.loss.sum().backward()

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_compiled_equals_eager(self, recipe: str) -> None:
        model, images = build(recipe), nuclei(recipe)
        result = torch.compile(model, fullgraph=True)(images, noise_for(images))
        torch.testing.assert_close(result.loss, model(images, noise_for(images)).loss, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_learns(self, recipe: str) -> None:
        """Sixty steps on a handful of nuclei: the loss halves.

        (It cannot vanish: the discs' texture is white noise, whose normalised pattern costs about 1 a patch.)
        """
        model, images = build(recipe), nuclei(recipe, n=16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        errors = []
        for step in range(60):
            result = model(images, noise_for(images, seed=step))
            optimizer.zero_grad()
            (result.loss.sum() / result.count.sum()).backward()
            optimizer.step()
            errors.append((result.loss.sum() / result.count.sum()).item())
        assert sum(errors[-5:]) < 0.5 * sum(errors[:5])
