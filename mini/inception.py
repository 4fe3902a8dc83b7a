"""Train the mini world's stand-in for Inception: a small network that tells which colours, shapes, textures and domain
a picture has, and whose 64 features evaluate.py coco takes for a Frechet distance, through the code of FID:

    python mini/inception.py        # -> mini/inception.pt, TorchScript; a few minutes on a CPU, a function of --seed
    python evaluate.py coco output/tsm --reference mini/data/target-train-true-v1 --inception_path mini/inception.pt

Like the file inception-2015-12-05.pt it has `layers`, from (B, 3, 299, 299) in [-1, 1] to (B, features). Distances by
it compare mini models with one another and nothing else.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mini import world

HERE = Path(__file__).resolve().parent
NAMES = (*world.COLOURS, *world.SHAPES, *world.TEXTURES, "target")


class Layers(nn.Module):
    """(B, 3, any, any) in [-1, 1] -> (B, 64): 32x32 pixels, three convolutions with stride 2, the mean over places."""

    def __init__(self):
        super().__init__()
        widths, parts = (3, 32, 64, 64), []
        for before, after in zip(widths, widths[1:]):
            parts += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
            parts += [nn.Conv2d(after, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        self.trunk = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(F.adaptive_avg_pool2d(x, (32, 32))).mean((2, 3))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.heads = nn.Linear(64, len(NAMES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of what is there: (B, 3, H, W) in [-1, 1] -> (B, 14)."""
        return self.heads(self.layers(x))


def batch_of(scenes: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [-1, 1] and whether each of NAMES is there."""
    pixels = torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).movedim(-1, 1) / 127.5 - 1
    words = [{word for t in s.things for word in (t.colour, t.shape, t.texture)} | {s.domain} for s in scenes]
    return pixels, torch.tensor([[float(name in own) for name in NAMES] for own in words])


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model, rng = Inception(), np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    for step in range(args.steps):
        pixels, labels = batch_of([world.make_scene(world.DOMAINS[k % 2], rng) for k in range(args.batch_size)])
        loss = F.binary_cross_entropy_with_logits(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps} loss {loss.item():.4f}", flush=True)
    model.eval().requires_grad_(False)
    pixels, labels = batch_of([s for domain in world.DOMAINS for s in world.scenes(domain, "validation")])
    print(f"right on validation pictures: {((model(pixels) > 0) == labels.bool()).float().mean():.4f}")
    partial = args.output_file.with_suffix(".partial")
    torch.jit.script(model).save(partial)
    os.replace(partial, args.output_file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, default=HERE / "inception.pt")
    main(parser.parse_args())
