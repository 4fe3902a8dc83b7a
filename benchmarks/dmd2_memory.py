"""Memory and seconds per iteration of distill_dmd2.py, faithful beside --low_memory.

    python benchmarks/dmd2_memory.py --output_file benchmarks/results/dmd2_memory_cpu.json
    python benchmarks/dmd2_memory.py --width 320 --latent_size 64 --batch_size 8 --device cuda \\
        --mixed_precision bf16 --output_file benchmarks/results/dmd2_memory_gpu.json

Two parts. `static`: bytes of weights, gradients and AdamW's moments of all players with SD1.5's UNet, from the shapes
alone (meta device). `measured`: iterations with GAN on a UNet of SD1.5's layout with random weights and --width
channels at its first level (SD1.5: 320), conditions and latents of mini/sd15; each mode in a process of its own, the
student's turn in each iteration. Peak memory is that of the process, or on a GPU of PyTorch's allocator.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import backbones  # noqa: E402
import distill_dmd2  # noqa: E402
import train_foster  # noqa: E402

MODES = {"faithful": [], "low memory": ["--low_memory"]}
FP32, ADAMW = 4, 4  # bytes of a number; weight, gradient and two moments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, help="measure this one here and print it; both if not given")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--output_file", default="output/dmd2_memory.json")
    return parser.parse_args(argv)


def build_unet(width: int, **config) -> UNet2DConditionModel:
    """SD1.5's layout (diffusers' defaults), `width` channels at the first level."""
    return UNet2DConditionModel(block_out_channels=(width, 2 * width, 4 * width, 4 * width), **config)


def settings(mode: str, args: argparse.Namespace) -> argparse.Namespace:
    flags = ["--num_intervals", 1, "--rank", args.rank, "--lora_alpha", 8, "--resolution", 4 * args.latent_size]
    flags += ["--mixed_precision", args.mixed_precision, "--report_to", "none", *MODES[mode]]
    return distill_dmd2.parse_args([str(flag) for flag in flags])


def static(mode: str, args: argparse.Namespace) -> dict[str, float]:
    """GB (10^9 bytes) by player, of SD1.5; teacher and frozen base are fp32, as without --mixed_precision."""
    pipe, own = backbones.load_pipeline(ROOT / "mini/sd15"), settings("faithful", args)
    with torch.device("meta"):
        pipe.unet = build_unet(320, sample_size=64, cross_attention_dim=768)
        base = sum(p.numel() for p in pipe.unet.parameters())
        experts, pairs = distill_dmd2.attach(pipe, own, 0)
        guidance = distill_dmd2.Guidance(distill_dmd2.Denoiser(pipe, pipe.unet))
        guidance.feature = lambda *_: torch.empty(1, 1280, 8, 8)
        guidance.add_head((4, 64, 64), {"c": torch.empty(1)}, 0)
    lora, head = sum(own.numel() for _, own in pairs), sum(p.numel() for p in guidance.head.parameters())
    shared = mode == "low memory"
    numbers = {"student": base + ADAMW * lora, "teacher": 0 if shared else base}
    numbers |= {"fake score": ADAMW * (lora if shared else base), "head": ADAMW * head}
    sizes = {name: FP32 * count / 1e9 for name, count in numbers.items()}
    return {name: round(size, 3) for name, size in (sizes | {"sum": sum(sizes.values())}).items()}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Peak GB above the process before any network, and seconds per iteration by turn."""
    torch.manual_seed(0)
    own, size = settings(args.mode, args), args.latent_size
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    pipe = backbones.load_pipeline(ROOT / "mini/sd15", dtype=torch.float32)
    before, channels = peak(args), pipe.unet.config.in_channels
    width = pipe.text_encoder.config.hidden_size
    pipe.unet = build_unet(args.width, cross_attention_dim=width, in_channels=channels, out_channels=channels)
    pipe.to(accelerator.device)
    result = {"weights of the base": sum(p.numel() for p in pipe.unet.parameters())}
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    players = distill_dmd2.make_players(pipe, own, 0, accelerator)
    distill_dmd2.begin_phase(pipe, players, own, 0, True, 100)
    drawn = distill_dmd2.Prompts(["a red circle"], (channels, size, size), len(own.student_timesteps))
    batch = torch.utils.data.default_collate([drawn[0, k] for k in range(args.batch_size)])
    batch = distill_dmd2.send_to_device(batch, accelerator.device)
    with torch.no_grad():
        backbone = backbones.backbone_of(pipe)
        batch["c"] = batch["real_c"] = backbone.conditions(backbone.encode(pipe, batch["caption"]))
    batch["real_x0"] = batch["matching"]["noise"]
    for turn in ("student's turn", "other turn"):
        seconds = []
        for _ in range(1 + args.iterations):
            start = time.perf_counter()
            losses = distill_dmd2.iterate(players, batch, 0, turn == "student's turn", True, own, accelerator)
            assert all(value.isfinite() for value in losses.values())  # reads the device
            seconds.append(time.perf_counter() - start)
        result[f"seconds, {turn}"] = round(sorted(seconds[1:])[args.iterations // 2], 3)
    return result | {"peak GB": round(peak(args) - before, 3)}


def peak(args: argparse.Namespace) -> float:
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(args: argparse.Namespace) -> None:
    if args.mode:
        print(json.dumps(measure(args)))
        return
    result = {"command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])}
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"{os.cpu_count()} CPU cores"
    result |= {"machine": f"{device}, {platform.machine()}, torch {torch.__version__}", "settings": vars(args)}
    for mode in MODES:
        flags = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("mode", "output_file")]
        done = subprocess.run([sys.executable, __file__, f"--mode={mode}", *flags], stdout=subprocess.PIPE, check=True)
        result[mode] = {"static GB, SD1.5": static(mode, args), "measured": json.loads(done.stdout.splitlines()[-1])}
        print(mode, json.dumps(result[mode], indent=1))
    train_foster.write_json(Path(args.output_file), result)


if __name__ == "__main__":
    main(parse_args())
