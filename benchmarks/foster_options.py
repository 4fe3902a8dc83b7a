"""What the memory and speed options of train_foster.py cost and save, each beside the plain fp32 run.

    python benchmarks/foster_options.py --output_file benchmarks/results/foster_options_cpu.json

Trains one expert of the mini model for 50 steps per option, in turn, `--rounds` times over, each in a process of its
own, and prints medians: validation loss afterwards, seconds per step beside fp32 in the same round, peak memory of the
process (ru_maxrss). `stream-1000` and `stream-20000` read shards of so many records and show that memory is flat.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from mini import world  # noqa: E402

OPTIONS = {
    "fp32": [],
    "bf16": ["--mixed_precision", "bf16"],
    "8-bit Adam": ["--use_8bit_adam"],
    "4-bit base": ["--load_in_4bit"],
    "gradient checkpointing": ["--gradient_checkpointing"],
    "cached latents": ["--cache_latents", "--center_crop"],
    "cached latents and text": ["--cache_latents", "--center_crop", "--cache_text_embeddings"],
    "channels last": ["--channels_last"],
    "compile": ["--compile"],
    "stream-1000": ["--streaming", "--image_column", "png", "--caption_column", "txt"],
    "stream-20000": ["--streaming", "--image_column", "png", "--caption_column", "txt"],
}


def write_shards(folder: Path, count: int) -> Path:
    """Shards of 1,000 pictures each; the pictures repeat."""
    folder.mkdir()
    pictures = [world.render(scene) for scene in world.scenes("target", "train", 1000)]
    for start in range(0, count, 1000):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as shard:
            for k, picture in enumerate(pictures):
                png = io.BytesIO()
                Image.fromarray(picture).save(png, "png")
                for extension, content in (("png", png.getvalue()), ("txt", b"a red circle")):
                    info = tarfile.TarInfo(f"{start + k:08d}.{extension}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return folder


def run(option: str, steps: int, root: Path) -> dict:
    out = Path(tempfile.mkdtemp(dir=root))
    flags = [
        "--interval_indices",
        "4",
        "--max_train_steps",
        str(steps),
        "--report_to",
        "none",
        "--output_dir",
        str(out),
    ]
    if "stream" in option:
        shards = root / option
        flags += ["--train_data_dir", str(shards if shards.exists() else write_shards(shards, int(option[7:])))]
        flags += ["--validation_data_dir", str(validation_shards(root))]
    pid = os.posix_spawn(
        sys.executable, [sys.executable, str(ROOT / "train_foster.py"), *flags, *OPTIONS[option]], dict(os.environ)
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{option} failed")
    record = json.loads((out / "validation" / "interval-004.json").read_text())
    peak = usage.ru_maxrss / 1024  # MB
    return {"loss": record["expert"], "seconds_per_step": record["seconds_per_step"], "peak_mb": peak}


def validation_shards(root: Path) -> Path:
    folder = root / "validation"
    return folder if folder.exists() else write_shards(folder, 1000)


def adamw_step_ms() -> dict[str, float]:
    """Median milliseconds of one step of AdamW on the tensors of an SD1.5 expert, fused (as in training) and not."""
    times: dict[str, list[float]] = {"fused": [], "not fused": []}
    shapes = [(4, 320), (4, 768), (320, 4), (4, 1280), (1280, 4)] * 51  # 255 tensors, about as in 128 layers
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers = {name: torch.optim.AdamW(parameters, fused=name == "fused") for name in times}
    for _ in range(100):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", default="output/foster_options.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = [{o: run(o, args.steps, Path(folder)) for o in args.options} for _ in range(args.rounds)]
    table = {}
    print(f"\n{'option':24s} loss    s/step  beside fp32  peak MB")
    for option in args.options:
        row = {k: statistics.median(r[option][k] for r in rounds) for k in ("loss", "seconds_per_step", "peak_mb")}
        ratios = [r[option]["seconds_per_step"] / r[args.options[0]]["seconds_per_step"] for r in rounds]
        row |= {"ratio": statistics.median(ratios), "ratios": ratios}
        table[option] = row
        loss, seconds = f"{row['loss']:.4f}", f"{row['seconds_per_step']:.3f}"
        print(f"{option:24s} {loss}  {seconds}   {row['ratio']:.2f}         {row['peak_mb']:.0f}")
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    machine += f", OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine, "steps": args.steps, "table": table}
    result["adamw_step_ms"] = adamw_step_ms()
    print(f"one step of AdamW, ms: {result['adamw_step_ms']}")
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
