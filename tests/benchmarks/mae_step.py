"""Images per second of a training step of the masked autoencoder, and its share of the measured matmul rate.

    python tests/benchmarks/mae_step.py --reference ~/mae                # CUDA where there is one, else CPU
    python tests/benchmarks/mae_step.py --device cpu --batch 2

Needs torch and timm only; no Ray, no data. A step is forward, backward and AdamW on images that already lie on the
device as float32. In one process, in turns: a dense product, our step (`paper` eager and compiled, `better` compiled),
the step of facebookresearch/mae (`--reference`: a checkout of that repository; without it the row is skipped) and
timm's plain ViT on all tokens. All share one set of parameters and moments, so that ViT-L fits in 8 GB.

Precision: bf16 autocast on CUDA (the reference: float16 with a gradient scaler, as published), float32 on the CPU.
Clock: wall time on CUDA; CPU time of the process on the CPU, so that a busy machine disturbs the figures less.
FLOPs of an image, forward: for each block on n tokens of width d 24 n d^2 + 4 n^2 d, and 2 x inputs x outputs x tokens
for patch embedding, decoder embedding and head; a training step is three times that. Only tokens that have to be
computed count: 1/4 of the patches in the encoder, the masked ones in the head, whatever an implementation does.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosmic_ray.ingest import keyed
from cosmic_ray.models.mae import MAEConfig, MaskedAutoencoder
from cosmic_ray.models.vit import timm_arguments

Step = Callable[[], None]


def block_flops(tokens: int, width: int) -> int:
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def mae_flops(config: MAEConfig) -> int:
    """FLOPs of one image's training step."""
    size, dim, seen = config.encoder, config.decoder_dim, config.visible
    pixels = size.patch_size**2 * config.channels
    encoder = 2 * seen * pixels * size.embed_dim + size.depth * block_flops(seen + 1, size.embed_dim)
    decoder = 2 * (seen + 1) * size.embed_dim * dim + config.decoder_depth * block_flops(size.tokens + 1, dim)
    return 3 * (encoder + decoder + 2 * (size.tokens - seen) * dim * pixels)


def vit_flops(config: MAEConfig) -> int:
    """The same for the encoder alone on all tokens."""
    size = config.encoder
    pixels = size.patch_size**2 * config.channels
    return 3 * (2 * size.tokens * pixels * size.embed_dim + size.depth * block_flops(size.tokens + 1, size.embed_dim))


class Pool:
    """Parameters and moments by shape, handed to one model after the other: for timing their values do not matter."""

    def __init__(self, device: torch.device):
        self._device, self._slots = device, {}

    def take(self, role: str, shape: torch.Size, index: int) -> torch.Tensor:
        key = (role, tuple(shape), index)
        if key not in self._slots:
            fill = (
                torch.randn(shape, device=self._device) * 0.02
                if role == "weight"
                else torch.zeros(shape, device=self._device)
            )
            self._slots[key] = fill
        return self._slots[key]

    def fill(self, model: nn.Module) -> nn.Module:
        """Move a model made on the meta device onto pooled tensors."""
        used: dict[torch.Size, int] = defaultdict(int)
        for module in model.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    tensor = self.take("weight", value.shape, used[value.shape])
                    module._parameters[name] = nn.Parameter(tensor, value.requires_grad)
                    used[value.shape] += 1
            for name, value in list(module._buffers.items()):
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype, device=self._device)
        return model.train()

    def adamw(self, model: nn.Module, fused: bool) -> torch.optim.AdamW:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = [[p for p in parameters if (p.ndim > 1) == flag] for flag in (True, False)]
        groups = [{"params": decayed[0], "weight_decay": 0.05}, {"params": decayed[1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True if fused else None)
        used: dict[torch.Size, int] = defaultdict(int)
        for p in parameters:
            moments = {name: self.take(name, p.shape, used[p.shape]) for name in ("exp_avg", "exp_avg_sq")}
            where = self._device if fused else "cpu"
            optimizer.state[p] = {"step": torch.zeros((), device=where), **moments}
            used[p.shape] += 1
        return optimizer


def our_step(pool: Pool, config: MAEConfig, batch: int, compiled: bool) -> Step:
    """As the trainer's: keyed masks, sums, bf16, fused AdamW; nothing waits for the device. Compiled block by block."""
    with torch.device("meta"):
        model = MaskedAutoencoder(config)
    pool.fill(model)
    if compiled:
        for block in [*model.encoder.blocks, *model.decoder]:
            block.compile()
    optimizer, device = pool.adamw(model, fused=True), pool._device
    images = torch.rand(batch, config.channels, config.encoder.img_size, config.encoder.img_size, device=device)
    positions = torch.arange(batch, device=device)

    def step() -> None:
        noise = keyed.uniform(0, positions, "mask", config.encoder.tokens)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            result = model(images, noise)
        (result.loss.sum() / result.count.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(pool: Pool, config: MAEConfig, batch: int) -> Step:
    """timm's ViT on every token, with a mean-squared loss on its embedding."""
    with torch.device("meta"):
        model = timm.create_model(**timm_arguments(config.encoder, config.channels))
    pool.fill(model)
    optimizer, device = pool.adamw(model, fused=True), pool._device
    images = torch.rand(batch, config.channels, config.encoder.img_size, config.encoder.img_size, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reference_model(path: Path, config: MAEConfig, fused_attention: bool) -> nn.Module:
    """facebookresearch/mae's network with COSMIC's decoder, under the installed numpy and timm (it pins timm 0.3.2)."""
    import numpy as np
    import timm.models.vision_transformer as vision_transformer

    block = vision_transformer.Block
    sys.path.insert(0, str(path))
    np.float = float  # gone from numpy since; read when the positions are made
    vision_transformer.Block = lambda *arguments, qk_scale=None, **named: block(*arguments, **named)
    timm.layers.set_fused_attn(fused_attention)
    try:
        from models_mae import MaskedAutoencoderViT

        size = config.encoder
        with torch.device("meta"):
            return MaskedAutoencoderViT(
                size.img_size, size.patch_size, config.channels, size.embed_dim, size.depth, size.num_heads,
                config.decoder_dim, config.decoder_depth, config.decoder_heads,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )  # fmt: skip
    finally:
        timm.layers.set_fused_attn(True)
        vision_transformer.Block = block
        del np.float
        sys.path.remove(str(path))


def reference_step(pool: Pool, path: Path, config: MAEConfig, batch: int, fused_attention: bool) -> Step:
    """Its loop as published: float16 and a scaler on CUDA, the loss read and the gradients' norm taken every step."""
    model = pool.fill(reference_model(path, config, fused_attention))
    optimizer, device = pool.adamw(model, fused=False), pool._device
    cuda = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    images = torch.rand(batch, config.channels, config.encoder.img_size, config.encoder.img_size, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.float16, enabled=cuda):
            loss, _, _ = model(images, mask_ratio=config.mask_ratio)
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the reference's loss is not finite")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.norm(torch.stack([torch.norm(gradient) for gradient in gradients]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()

    return step


def seconds(work: Step, device: torch.device, times: int) -> float:
    """Seconds of one call, over `times` calls in a row: wall time on CUDA, CPU time on the CPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _wait(device)
    start = clock()
    for _ in range(times):
        work()
    _wait(device)
    return (clock() - start) / times


def product(device: torch.device) -> tuple[Step, int, str]:
    """A dense square product, its FLOPs and its name."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right), 2 * side**3, f"dense product {side}, {str(dtype).removeprefix('torch.')}"


def variants(arguments: argparse.Namespace, pool: Pool) -> dict[str, tuple[Step, int]]:
    """What is timed: by name, the step and the FLOPs of one image."""
    paper, better = (MAEConfig.of(arguments.preset, recipe) for recipe in ("paper", "better"))
    batch = arguments.batch
    found = {
        "ours, paper, eager": (our_step(pool, paper, batch, False), mae_flops(paper)),
        "ours, paper, compiled": (our_step(pool, paper, batch, True), mae_flops(paper)),
        "ours, better, compiled": (our_step(pool, better, batch, True), mae_flops(better)),
    }
    if arguments.reference:
        for fused, name in ((False, "attention written out, as in its timm 0.3.2"), (True, "fused attention")):
            step = reference_step(pool, arguments.reference, paper, batch, fused)
            found[f"facebookresearch/mae, {name}"] = step, mae_flops(paper)
    else:
        print("facebookresearch/mae: skipped, for want of --reference (a checkout of it)")
    found["timm's plain ViT, all tokens"] = plain_step(pool, paper, batch), vit_flops(paper)
    return found


def report(rates: dict[str, list[float]], flops: dict[str, int], dense: list[float], title: str, per: str) -> None:
    """A Markdown table: medians, the range over the rounds, and the share of the dense product's median rate."""
    ceiling = statistics.median(dense)
    spread = f"{min(dense) / 1e9:.4g} .. {max(dense) / 1e9:.4g}"
    print(f"\n{title}: {ceiling / 1e9:.4g} GFLOP per {per} ({spread})\n")
    print(f"| step | images per {per} | range | GFLOP an image | share of matmul rate |\n|---|---|---|---|---|")
    for name, values in rates.items():
        middle = statistics.median(values)
        cells = (
            name,
            f"{middle:.3g}",
            f"{min(values):.3g} .. {max(values):.3g}",
            f"{flops[name] / 1e9:.3g}",
            f"{middle * flops[name] / ceiling:.0%}",
        )
        print(f"| {' | '.join(cells)} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="large", help="see cosmic_ray.models.vit.PRESETS")
    parser.add_argument("--batch", type=int, help="images a step; default 256 on CUDA, 2 on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="each measures every variant once; medians are over them")
    parser.add_argument("--steps", type=int, help="steps a measurement; default 20 on CUDA, 1 on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--reference", type=Path, help="a checkout of facebookresearch/mae")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.batch = arguments.batch or (256 if cuda else 2)
    arguments.steps = arguments.steps or (20 if cuda else 1)
    return arguments


def main() -> None:
    arguments = parse()
    device, steps = torch.device(arguments.device), arguments.steps
    cuda = device.type == "cuda"
    torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {arguments.threads} threads"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    print(f"{where}; {versions}; {'bf16 autocast' if cuda else 'float32'}")
    print(f"{arguments.preset}, batch {arguments.batch}, {arguments.rounds} rounds of {steps} steps, in turns")
    multiply, dense_flops, title = product(device)
    found = variants(arguments, Pool(device))
    for step, _ in found.values():
        seconds(step, device, 3 if cuda else 1)  # compile, allocate
    dense: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        dense.append(dense_flops / seconds(multiply, device, 20 if cuda else 3))
        for name, (step, _) in found.items():
            rates[name].append(arguments.batch / seconds(step, device, steps))
    flops = {name: count for name, (_, count) in found.items()}
    report(rates, flops, dense, title, "second" if cuda else "CPU-second")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
