"""Fit the nucleus network on fields with hand-made masks and on drawn patches, and store it in whole numbers.

    python -m cosmic_ray.imaging.fit.train --data DATA --sets dsb2018_train_fluo --steps 1600 \\
        --source "Data Science Bowl 2018 (BBBC038), CC0" --out FILE

That is how the shipped network was fitted: on one core, in about a quarter of an hour. To judge one, fit on one set and
segment the other: `tests/benchmarks/segmentation.py --weights`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

from cosmic_ray.imaging.fit.patches import MaskedField, PatchSource, read_set
from cosmic_ray.imaging.nucleus_net import LAYERS, UNIT

WIDTHS = (24, 32, 48)
BATCH, POOL, FRESH = 16, 256, 5
PEAK_RATE, WEIGHT_DECAY = 4e-3, 1e-2


class NucleusNet(nn.Module):
    """The float twin of `nucleus_net.predict`: the same layers, with batch normalisation that `quantise` folds away."""

    def __init__(self):
        super().__init__()
        a, b, c = WIDTHS
        shapes = {"e1.0": (4, a), "e1.1": (a, a), "e2.0": (a, b), "e2.1": (b, b), "e3.0": (b, c), "e3.1": (c, c)}
        shapes |= {"e3.2": (c, c), "u2": (c, b), "d2.0": (2 * b, b), "d2.1": (b, b), "u1": (b, a), "d1.0": (2 * a, a)}
        shapes |= {"d1.1": (a, a)}
        self.convolutions, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for name, (inputs, outputs) in shapes.items():
            size = 1 if name.startswith("u") else 3
            self.convolutions[_key(name)] = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
            self.norms[_key(name)] = nn.BatchNorm2d(outputs)
        self.convolutions["out"] = nn.Conv2d(a, 4, 1)

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.convolutions[_key(name)](x)
        return x if name == "out" else functional.relu(self.norms[_key(name)](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) in 0..1 -> (N, H, W), the signed distance of `patches.target`."""
        fine = self._block("e1", functional.pixel_unshuffle(x, 2))
        middle = self._block("e2", functional.max_pool2d(fine, 2))
        coarse = self._block("e3", functional.max_pool2d(middle, 2), 3)
        middle = self._block("d2", torch.cat([self._raised("u2", coarse), middle], 1))
        fine = self._block("d1", torch.cat([self._raised("u1", middle), fine], 1))
        return functional.pixel_shuffle(self.layer("out", fine), 2)[:, 0]

    def _block(self, name: str, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        for index in range(depth):
            x = self.layer(f"{name}.{index}", x)
        return x

    def _raised(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(self.layer(name, x), scale_factor=2, mode="nearest")


def _key(name: str) -> str:
    return name.replace(".", "_")


def fit(fields: list[MaskedField], simulated_share: float, steps: int, seed: int = 1) -> NucleusNet:
    """Train on batches from a pool that is renewed as it is used; every patch is seen about three times, turned."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    source = PatchSource(fields, simulated_share, rng)
    pool = [source.draw() for _ in range(POOL)]
    net = NucleusNet().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    shown = 0.0
    for step in range(steps):
        done = step / steps
        rate = PEAK_RATE * min(1, done / 0.04 + 0.02) * (0.5 * (1 + math.cos(math.pi * done)) + 0.005)
        for group in optimiser.param_groups:
            group["lr"] = rate
        for _ in range(FRESH):
            pool[rng.integers(POOL)] = source.draw()
        image, target, weight = _batch(pool, rng)
        loss = (weight * functional.smooth_l1_loss(net(image), target, beta=0.2, reduction="none")).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        shown += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {shown / 100:.4f}", flush=True)
            shown = 0.0
    return quantisable(net, pool)


def quantisable(net: NucleusNet, pool: list) -> NucleusNet:
    """Freeze the batch statistics and remember, per channel, the level that 99.99 % of the activations stay below."""
    net.eval()
    images = torch.from_numpy(np.stack([patch[0] for patch in pool[:64]]).astype(np.float32) / 255)[:, None]
    levels: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs, output):
            active = functional.relu(output).transpose(0, 1).flatten(1)
            levels[name] = torch.quantile(active[:, ::7], 0.9999, dim=1).clamp_min(1e-3)

        return hook

    handles = [norm.register_forward_hook(watch(name)) for name, norm in net.norms.items()]
    with torch.inference_mode():
        net(images)
    for handle in handles:
        handle.remove()
    net.levels = levels
    return net


def _batch(pool: list, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    turned = []
    for index in rng.choice(POOL, BATCH, replace=False):
        turns, flip = int(rng.integers(4)), rng.random() < 0.5
        turned.append([np.rot90(plane[::-1] if flip else plane, turns) for plane in pool[index]])
    image, target, weight = (np.stack(planes).astype(np.float32) for planes in zip(*turned, strict=True))
    return torch.from_numpy(image / 255)[:, None], torch.from_numpy(target), torch.from_numpy(weight)


def quantise(net: NucleusNet) -> dict[str, np.ndarray]:
    """The tensors of `nucleus_net.load_layers`: batch norm folded in, weights int8, one power of two a channel.

    With x = X * in and y = Y * out for the whole numbers X and Y, a layer y = w x + b becomes
    Y = (w in / out) X + b / out; the weights are scaled up by the power of two that brings the largest to 64..127.
    """
    unit = {"e1.0": torch.full((4,), 1 / 255.0)}
    for name in LAYERS[:-1]:
        unit[name + ">"] = net.levels[_key(name)] / 255
    unit |= {"e1.1": unit["e1.0>"], "e2.0": unit["e1.1>"], "e2.1": unit["e2.0>"], "e3.0": unit["e2.1>"]}
    unit |= {"e3.1": unit["e3.0>"], "e3.2": unit["e3.1>"], "u2": unit["e3.2>"], "d2.1": unit["d2.0>"]}
    unit |= {"d2.0": torch.cat([unit["u2>"], unit["e2.1>"]]), "u1": unit["d2.1>"], "d1.1": unit["d1.0>"]}
    unit |= {"d1.0": torch.cat([unit["u1>"], unit["e1.1>"]]), "out": unit["d1.1>"]}
    stored = {}
    for name in LAYERS:
        weight, bias = _folded(net, name)
        out = unit.get(name + ">", torch.full((len(bias),), 1 / UNIT))
        scaled = weight * unit[name][None, :, None, None] / out[:, None, None, None]
        shift = torch.floor(torch.log2(127 / scaled.abs().amax((1, 2, 3)).clamp_min(1e-6))).clamp(0, 20)
        power = 2.0**shift
        stored[f"{name}.weight"] = torch.round(scaled * power[:, None, None, None]).clamp(-127, 127).to(torch.int8)
        stored[f"{name}.bias"] = torch.round((bias / out + 0.5) * power).to(torch.int32)
        stored[f"{name}.shift"] = shift.to(torch.int8)
    return {name: tensor.contiguous().numpy() for name, tensor in stored.items()}


def _folded(net: NucleusNet, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    convolution = net.convolutions[_key(name)]
    if name == "out":
        return convolution.weight.detach(), convolution.bias.detach()
    norm = net.norms[_key(name)]
    gain = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    return convolution.weight.detach() * gain[:, None, None, None], (norm.bias - norm.running_mean * gain).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds images/<set>")
    parser.add_argument("--sets", nargs="*", default=[], help="sets with masks to fit on; none: drawn patches alone")
    parser.add_argument("--simulated-share", type=float, default=0.35, help="share of the patches that are drawn")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--source", default="", help="where the sets come from and their licence; kept in the file")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fields = [field for name in arguments.sets for field in read_set(arguments.data / "images" / name)]
    share = arguments.simulated_share if fields else 1.0
    net = fit(fields, share, arguments.steps)
    save_file(quantise(net), arguments.out, metadata=_card(arguments, share))


def _card(arguments: argparse.Namespace, share: float) -> dict[str, str]:
    """What the file says of itself: how to fit it again, on what, and under which licence that came."""
    sets = " ".join(arguments.sets)
    options = f"--sets {sets} --simulated-share {share} --steps {arguments.steps}"
    return {
        "fitted_by": f"python -m cosmic_ray.imaging.fit.train {options}",
        "fitted_on": f"{sets} and drawn patches ({share:.0%})" if sets else "drawn patches",
        "source": arguments.source,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
