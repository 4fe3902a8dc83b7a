"""The teacher at many and at four steps, DMD2 as one LoRA, as timestep experts and with routers: Tables 3 and 6 on the
mini world.

    python benchmarks/compare_dmd2.py --output_file benchmarks/results/dmd2_source.json

Iterations are the paper's (appendix A.3) divided by 1000 / --scale, batches are --train_batch_size of an expert
without GAN, half of it with, and four times as much for the LoRA, as there. Counted in samples that pass the student,
that LoRA costs twice as much as the four experts; `LoRA, equal` has their iterations and batches, and so their number
of updates and of samples. Learning rates are the script's defaults, tuned for none. Prompts are the true captions
of the source domain's test scenes, the distance is to their renders (mini/inception.py), and all few-step
rivals run at the guidance that the students are trained with. Finished runs in --work_dir are reused.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare_foster

import backbones
import coco
import distill_dmd2
import evaluate
import train_foster
import tsm_lora
from mini import world

ROOT = Path(__file__).resolve().parents[1]
TEACHER = os.path.relpath(ROOT / "mini/sd15")
SAMPLERS = {  # scheduler, steps and spacing of the teacher
    "teacher, 50 steps": ("DDIMScheduler", 50, "leading"),
    "DDIM, as configured": ("DDIMScheduler", 4, "leading"),  # from t = 751
    "DDIM": ("DDIMScheduler", 4, "trailing"),  # at the students' 999, 749, 499, 249
    "DPM++": ("DPMSolverMultistepScheduler", 4, "trailing"),
    "UniPC": ("UniPCMultistepScheduler", 4, "trailing"),
}
RUNS = {  # intervals, thousands of iterations without and with GAN, batch in multiples of an expert's
    "LoRA": (1, [40], [5], 4),
    "LoRA, equal": (1, [50], [70], 1),
    "stage 1": (4, [20, 20, 5, 5], [5, 5, 20, 40], 1),
    "stage 2": (1, [0], [2], 1),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="stage 2 needs stage 1 and LoRA")
    parser.add_argument("--scale", type=float, default=50, help="iterations for each 1,000 of the paper's")
    parser.add_argument("--train_batch_size", type=int, default=8, help="of an expert (paper: 32)")
    parser.add_argument("--update_ratio", type=int, default=2)
    parser.add_argument("--real_guidance_scale", type=float, default=1.75)
    parser.add_argument("--router_rate", type=float, default=1e-3, help="(paper: not specified)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pictures", type=int, default=1000, help="captions of the test scenes, the first ones")
    parser.add_argument("--work_dir", default="output/compare-dmd2")
    parser.add_argument("--output_file", default="output/compare_dmd2.json")
    return parser.parse_args(argv)


def settings_of(run: str, seed: int, args: argparse.Namespace) -> argparse.Namespace:
    """distill_dmd2.py's settings of a run."""
    intervals, without, with_gan, batch = RUNS[run]
    steps = [[round(args.scale * k) for k in counts] for counts in (without, with_gan)]
    size = batch * args.train_batch_size
    flags = ["--steps_without_gan", *steps[0], "--steps_with_gan", *steps[1], "--update_ratio", args.update_ratio]
    flags += ["--train_batch_size", size, "--gan_train_batch_size", size // 2, "--seed", seed, "--cache_latents"]
    flags += ["--real_guidance_scale", args.real_guidance_scale, "--save_guidance", "--report_to", "none"]
    flags += ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1]
    if run == "stage 2":
        core, context = (Path(settings_of(name, seed, args).output_dir) for name in ("stage 1", "LoRA"))
        flags += ["--core_experts", core / "experts-n4", "--context_experts", context / "experts-n1"]
        flags += ["--initial_guidance", context / "guidance" / "interval-000.safetensors"]
        flags += ["--gan_learning_rate", args.router_rate]
    else:
        flags += ["--num_intervals", intervals]
    name = run.replace(", ", "-").replace(" ", "-")
    flags += ["--output_dir", Path(args.work_dir) / f"{name}-scale{args.scale:g}-seed{seed}"]
    return distill_dmd2.parse_args([str(flag) for flag in flags])


def cost(run: str, args: argparse.Namespace) -> dict[str, int]:
    """Iterations, updates of the student and samples that pass it, of the run alone."""
    _, without, with_gan, batch = RUNS[run]
    counts = [round(args.scale * k) for k in (*without, *with_gan)]
    sizes = [batch * args.train_batch_size] * len(without) + [batch * args.train_batch_size // 2] * len(with_gan)
    updates = sum(-(-count // args.update_ratio) for count in counts)
    passes = sum(count * size for count, size in zip(counts, sizes))
    return {"iterations": sum(counts), "student_updates": updates, "samples": passes}


@torch.no_grad()
def moments(images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the small network's features."""
    inception = torch.jit.load(ROOT / "mini/inception.pt").eval()
    return coco.moments([np.stack([coco.inception_features(inception, coco.fid_picture(image)) for image in images])])


def measure(path: Path, pipe, prompts: list[str], reference: tuple, **options) -> dict:
    """Frechet distance and mean scores of a picture per prompt, picture k from seed k; kept in a file."""
    if path.exists():
        return json.loads(path.read_text())
    images = []
    for k in range(0, len(prompts), 50):
        texts = prompts[k : k + 50]
        generators = [torch.Generator().manual_seed(k + j) for j in range(len(texts))]
        images += pipe(texts, generator=generators, **options).images
    values = [world.score(image, text) for image, text in zip(images, prompts)]
    present = {key: [value[key] for value in values if value[key] is not None] for key in evaluate.SCORES["mini"]}
    record = {"frechet": coco.frechet_distance(*moments(images), *reference)}
    record |= {"scores": {key: float(np.mean(own)) for key, own in present.items() if own}}
    train_foster.write_json(path, record)
    return record


def load(scheduler: str, **options):
    pipe = backbones.load_pipeline(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    return pipe


def main(args: argparse.Namespace) -> None:
    folder, work = world.image_folder("source", "test"), Path(args.work_dir)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()][: args.pictures]
    prompts, table = [row["text"] for row in rows], []
    reference = moments(Image.open(folder / row["file_name"]) for row in rows)
    for name, (scheduler, steps, spacing) in SAMPLERS.items():
        options = {"num_inference_steps": steps, "guidance_scale": args.real_guidance_scale}
        path = work / f"{scheduler}-{spacing}-{steps}-{args.real_guidance_scale:g}-{args.pictures}.json"
        pipe = load(scheduler, timestep_spacing=spacing)
        table.append({"method": name, "seeds": [measure(path, pipe, prompts, reference, **options)]})
    for run in args.runs:
        records = []
        for seed in args.seeds:
            settings = settings_of(run, seed, args)
            AcceleratorState._reset_state(True)
            distill_dmd2.main(settings)  # skips what is finished, refuses what was trained with other settings
            pipe = load("LCMScheduler")
            tsm_lora.load_experts(pipe, distill_dmd2.result_path(settings, 0).parent)
            options = {"timesteps": settings.student_timesteps, "guidance_scale": 0.0}
            path = Path(settings.output_dir) / f"measured-{args.pictures}.json"
            records.append(measure(path, pipe, prompts, reference, **options))
            files = (Path(settings.output_dir) / "training").glob("*.json")
            records[-1]["seconds"] = sum(json.loads(file.read_text())["seconds"] for file in files)
        seconds = sum(record["seconds"] for record in records) / len(records)
        table.append({"method": run, **cost(run, args), "seconds": round(seconds), "seeds": records})
    for row in table:
        own = row.pop("seeds")
        summary = compare_foster.mean_and_error if len(own) > 1 else lambda values: {"mean": values[0]}
        row["frechet"], scores = summary([record["frechet"] for record in own]), [record["scores"] for record in own]
        row["scores"] = {key: summary([s[key] for s in scores]) for key in scores[0]}
        shown = "  ".join(f"{key} {100 * value['mean']:.1f}" for key, value in row["scores"].items())
        print(f"{row['method']:18s} {row['frechet']['mean']:8.3f}  {shown}")
    result = {"command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])}
    result |= {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"}
    result |= {"seeds": args.seeds, "settings": vars(args), "table": table}
    train_foster.write_json(Path(args.output_file), result)


if __name__ == "__main__":
    main(parse_args())
