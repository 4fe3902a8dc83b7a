"""Compare vanilla LoRA, timestep experts and full fine-tuning of the denoiser by validation loss, on the mini world.

    python benchmarks/compare_foster.py n1-r4-s1000 n8-r4-s125 n1-r32-s1000 full-s1000 --seeds 0 1 2

A run is called n<intervals>-r<rank>-s<steps per expert>, or full-s<steps>; an ending such as -lr3e-3 sets its learning
rate. Each is trained by train_foster.py's own functions on the same pictures and measured on the same validation
pictures at fixed t and noise, averaged over 8 intervals of equal width. Prints a table, base first, and writes JSON:
losses per interval, the share of full fine-tuning's gain that a run closes, paired standard errors, seconds. Finished
runs are kept in --output_dir and not repeated.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train_foster
import tsm_lora

INTERVALS = 8  # of the table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", default="output/compare")
    parser.add_argument("--output_file", default="output/compare.json")
    args, args.other = parser.parse_known_args(argv)  # the rest are train_foster.py's flags: data, model, batch size
    for run in args.runs:
        if not re.fullmatch(r"(n\d+-r\d+|full)-s\d+(-lr[\d.e-]+)?", run):
            parser.error(f"{run} is no run; they read like n8-r4-s125, n1-r32-s1000-lr3e-3 or full-s1000")
    return args


def settings_of(run: str, seed: int, args: argparse.Namespace) -> argparse.Namespace:
    """train_foster.py's settings of a run."""
    name, steps, rate = re.fullmatch(r"(n\d+-r\d+|full)-s(\d+)(?:-lr(.+))?", run).groups()
    n, rank = re.fullmatch(r"n(\d+)-r(\d+)", name).groups() if name != "full" else ("1", "4")
    flags = ["--num_intervals", n, "--rank", rank, "--max_train_steps", steps, "--seed", str(seed)]
    flags += ["--learning_rate", rate] if rate else []
    flags += ["--output_dir", str(Path(args.output_dir) / f"{run}-seed{seed}"), "--report_to", "none"]
    return train_foster.parse_args([*args.other, *flags, "--resume_from_checkpoint", "latest"])


def validation(pipe, experts, rows, settings, accelerator) -> torch.Tensor:
    """Losses (8 intervals, N pictures)."""
    model, scheduler = train_foster.Trainee(experts), experts.backbone.noise_scheduler(pipe)
    settings = argparse.Namespace(**vars(settings) | {"num_intervals": INTERVALS})
    args = (model, experts, scheduler, rows, settings)
    return torch.stack([train_foster.validation_losses(*args, i, accelerator) for i in range(INTERVALS)])


def fine_tune(pipe, train, settings, accelerator) -> None:
    """Every weight of the denoiser, on the samples that an n = 1 expert would see."""
    experts = tsm_lora.attach_experts(pipe, 1, rank=1, train_text_encoder=False)  # B = 0 and frozen: for `predict`
    denoiser = experts.components[experts.backbone.denoiser].requires_grad_(True)
    for factor in experts.parameters():
        factor.requires_grad_(False)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.adam_weight_decay)
    scheduler, model = experts.backbone.noise_scheduler(pipe), train_foster.Trainee(experts)
    pictures = data.Pictures(train, settings, data.latent_shape(pipe, settings.resolution), augment=True)
    for batch in tqdm(data.training_loader(pictures, settings, 0, 0, accelerator, None), desc="full fine-tuning"):
        loss = train_foster.sample_losses(model, experts, scheduler, batch, 0, tsm_lora.T).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    experts.unload()


def measure(run: str, seed: int, args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Train one run, if that was not done before, and measure it: losses (8, N), seconds."""
    settings = settings_of(run, seed, args)
    path = Path(settings.output_dir) / "losses.json"
    if path.exists():
        return json.loads(path.read_text())
    settings.global_batch = settings.train_batch_size * settings.gradient_accumulation_steps
    train, rows, origin = data.split_rows(settings)
    pipe = train_foster.load_pipeline(settings, accelerator)
    start = time.time()
    if run.startswith("full"):
        fine_tune(pipe, train, settings, accelerator)
        experts = tsm_lora.attach_experts(pipe, 1, rank=1, train_text_encoder=False)
    else:
        train_foster.claim_output_dir(settings)
        for interval in range(settings.num_intervals):
            if not train_foster.expert_path(settings, interval).exists():
                train_foster.foster(pipe, train, rows, None, settings, interval, accelerator)
        experts = tsm_lora.load_experts(pipe, train_foster.expert_path(settings, 0).parent)
    record = {"run": run, "seed": seed, "learning_rate": settings.learning_rate, "seconds": time.time() - start}
    record |= {"losses": validation(pipe, experts, rows, settings, accelerator).tolist(), "pictures_from": origin}
    train_foster.write_json(path, record)
    return record


def base_losses(args: argparse.Namespace, accelerator: Accelerator) -> torch.Tensor:
    settings = settings_of("full-s1", 0, args)
    _, rows, _ = data.split_rows(settings)
    pipe = train_foster.load_pipeline(settings, accelerator)
    experts = tsm_lora.attach_experts(pipe, 1, rank=1, train_text_encoder=False)
    return validation(pipe, experts, rows, settings, accelerator)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=train_foster.on_cpu())
    base = base_losses(args, accelerator)
    full = next((run for run in args.runs if run.startswith("full")), None)
    runs = {run: [measure(run, seed, args, accelerator) for seed in args.seeds] for run in args.runs}
    mean = {run: torch.tensor([r["losses"] for r in records]).mean(0) for run, records in runs.items()}  # (8, N)
    table = [{"run": "base", "loss": base.mean().item(), "by_interval": base.mean(1).tolist()}]
    for run, losses in mean.items():
        gain = (base - losses).mean(0)  # (N,): paired by picture
        per_seed = [torch.tensor(r["losses"]).mean().item() for r in runs[run]]
        row = {"run": run, "loss": losses.mean().item(), "by_interval": losses.mean(1).tolist(), "by_seed": per_seed}
        row |= {"gain": gain.mean().item(), "standard_error": (gain.std() / len(gain) ** 0.5).item()}
        row["lower_by"] = row["gain"] / table[0]["loss"]
        row["share_of_full"] = row["gain"] / (base - mean[full]).mean().item() if full else None
        row["seconds"] = sum(r["seconds"] for r in runs[run]) / len(runs[run])
        table.append(row)
    print(f"\n{'run':24s} loss     gain ± error        lower by  share of full")
    print(f"{'base':24s} {table[0]['loss']:.4f}")
    for row in table[1:]:
        share = f"{100 * row['share_of_full']:5.1f} %" if full else ""
        gain = f"{row['gain']:.4f} ± {row['standard_error']:.4f}"
        print(f"{row['run']:24s} {row['loss']:.4f}   {gain:18s}  {100 * row['lower_by']:5.1f} %   {share}")
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    result = {"command": command, "machine": machine, "seeds": args.seeds, "table": table}
    train_foster.write_json(Path(args.output_file), result)


if __name__ == "__main__":
    main(parse_args())
