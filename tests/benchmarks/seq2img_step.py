"""Images per second of a training step of seq2img, ours of both recipes beside imagen-pytorch's.

    python tests/benchmarks/seq2img_step.py                              # CUDA where there is one, else CPU
    python tests/benchmarks/seq2img_step.py --device cpu --preset tiny --batch 4

Without imagen-pytorch 2.1.0 its row is skipped. A step is forward, backward and AdamW on images that already lie on
the device. In turns, in one process: a dense product, our step (`paper` and `better`; on CUDA compiled too), and
imagen-pytorch's, all at the preset's image size, bf16 autocast on CUDA, float32 on the CPU. Ours draws keyed times
and noise; imagen-pytorch's its own. Clock: wall time on CUDA; the process's CPU time on the CPU.
FLOPs of an image: three times those that torch counts in one forward pass of the network.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mae_step import Step, product, report, seconds
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosmic_ray.models.seq2img import Seq2ImgConfig
from cosmic_ray.training.objective import Share
from cosmic_ray.training.seq2img import NAME, Seq2ImgObjective


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)


def our_step(config: Seq2ImgConfig, batch: int, device: torch.device, compiled: bool) -> tuple[Step, int]:
    """The objective's loss and an optimiser's step; the FLOPs of one image."""
    objective = Seq2ImgObjective(config, seed=0)
    network = objective.network.to(device)
    for block in objective.blocks(NAME) if compiled else ():
        block.compile()
    optimizer = adamw(network)
    side, width = config.network.image_size, config.network.condition_size
    images = torch.randint(0, 256, (batch, 1, side, side), dtype=torch.uint8, device=device)
    tensors = {"images": images, "condition": torch.randn(batch, width, device=device)}
    share = Share(0, torch.arange(batch, device=device), tensors)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total, count = objective.losses(objective.networks(), share, 0, NAME)["loss"]
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, 3 * forward_flops(config)


def forward_flops(config: Seq2ImgConfig) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x, one = torch.zeros(1, *config.shape), torch.zeros(1)
        config.build()(x, one, torch.zeros(1, config.network.condition_size), one.bool())
    return counter.get_total_flops()


def library_step(side: int, batch: int, device: torch.device) -> Step | None:
    """imagen-pytorch's own loss, as COSMIC set it; None where it is not installed."""
    try:
        import transformers

        transformers.T5Config.from_pretrained = lambda *_, **__: SimpleNamespace(d_model=768)
        from imagen_pytorch import Imagen, Unet
    except ImportError:
        return None
    last = (False, False, False, True)
    unet = Unet(
        dim=32, cond_dim=64, dim_mults=(1, 2, 4, 8), num_resnet_blocks=1, layer_attns=last, layer_cross_attns=last
    )
    imagen = Imagen(unet, image_sizes=side, pred_objectives="x_start", text_embed_dim=64).to(device)
    optimizer = adamw(imagen)
    images = torch.rand(batch, 3, side, side, device=device)
    latents = torch.randn(batch, 1, 64, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = imagen(images, text_embeds=latents, unet_number=1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def variants(preset: str, batch: int, device: torch.device) -> dict[str, tuple[Step, int]]:
    """What is timed: by name, the step and the FLOPs of one image's training step."""
    configs = {recipe: Seq2ImgConfig.of(preset, recipe) for recipe in ("paper", "better")}
    found = {}
    for compiled in (False, True) if device.type == "cuda" else (False,):
        for recipe, config in configs.items():
            name = f"ours, {recipe}, {'compiled' if compiled else 'eager'}"
            found[name] = our_step(config, batch, device, compiled)
    library = library_step(configs["paper"].network.image_size, batch, device)
    if library is None:
        print("imagen-pytorch: skipped, not installed")
    else:
        found["imagen-pytorch"] = library, 3 * forward_flops(configs["paper"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="large", help="see cosmic_ray.models.unet.PRESETS")
    parser.add_argument("--batch", type=int, default=16, help="images a step (App. A: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="each measures every variant once; medians are over them")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, 1 thread"
    print(f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {'bf16' if cuda else 'float32'}")
    print(f"{arguments.preset}, batch {arguments.batch}, {arguments.rounds} rounds, in turns")
    multiply, dense_flops, title = product(device)
    found = variants(arguments.preset, arguments.batch, device)
    for step, _ in found.values():
        seconds(step, device, 3 if cuda else 1)  # compile, allocate
    dense: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        dense.append(dense_flops / seconds(multiply, device, 20 if cuda else 3))
        for name, (step, _) in found.items():
            rates[name].append(arguments.batch / seconds(step, device, 20 if cuda else 1))
    flops = {name: count for name, (_, count) in found.items()}
    report(rates, flops, dense, title, "second" if cuda else "CPU-second")


if __name__ == "__main__":
    main()
