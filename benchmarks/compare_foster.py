"""Vanilla LoRA beside timestep experts of several n: the paper's first claim (Tables 4 and 8) on the mini world.

    python benchmarks/compare_foster.py --domain target --output_file benchmarks/results/foster_target.json
    python benchmarks/compare_foster.py --domain digits --total_steps 512 \\
        --output_file benchmarks/results/foster_digits.json
    python benchmarks/compare_foster.py --domain clips --total_steps 256 --runs n1-r4 n8-r4 \\
        --output_file benchmarks/results/foster_clips.json

A run is n<intervals>-r<rank>, or `full`: every weight of the denoiser (its learning rates a tenth of the others').
Each is trained by train_foster.py's own functions with a constant learning rate, so the checkpoints of one run are the
results of all shorter ones:
    equal total steps            --total_steps / n steps per expert (and a quarter and a half of it, the curve)
    equal steps per expert       --total_steps / 16 steps per expert, whatever n
Each run's learning rate is the one with the lowest validation loss after all steps, with the first seed; the other
seeds use it. The grid starts as --learning_rates and is widened in steps of 2.5 until the best lies inside it.
Validation loss: fixed pictures, t and noise, the mean over 8 intervals of equal width.
Scores: pictures for prompts that nothing was chosen on, by the mini world's detectors or the classifier of digits.
Differences are paired with n1-r4 of the same seed and budget. Writes JSON and, beside it, a picture of the curves.
Finished trainings and measurements are kept in --work_dir and not repeated.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbones
import data
import evaluate
import train_foster
import tsm_lora
from mini import clips, digits, world

HERE = Path(__file__).resolve().parents[1]
RUNS = ["n1-r4", "n2-r4", "n4-r4", "n8-r4", "n16-r4", "n1-r32", "full"]
INTERVALS, MOST_INTERVALS = 8, 16
REFERENCE = "n1-r4"
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--domain", choices=["target", "digits", "clips"], default="target")
    parser.add_argument("--total_steps", type=int, default=1024)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 5e-3, 1.25e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--work_dir", default="output/compare")
    parser.add_argument("--output_file", default="output/compare.json")
    args = parser.parse_args(argv)
    if args.total_steps % (4 * MOST_INTERVALS):
        parser.error(f"--total_steps must be a multiple of {4 * MOST_INTERVALS}")
    return args


def intervals_of(run: str) -> int:
    return 1 if run == "full" else int(run[1:].split("-r")[0])


def budgets(n: int, args: argparse.Namespace) -> list[int]:
    """Steps per expert at which a run of n experts is measured."""
    steps = args.total_steps // n
    return sorted({steps // 4, steps // 2, steps, args.total_steps // MOST_INTERVALS})


def domain_flags(domain: str) -> list:
    """Model and data that are not the default of the scripts."""
    if domain == "digits":
        folders = [digits.image_folder(split, HERE / "mini/data") for split in ("train", "validation")]
        return ["--train_data_dir", folders[0], "--validation_data_dir", folders[1]]
    if domain == "clips":
        return ["--pretrained_model_name_or_path", HERE / "mini/vc2", "--cache_latents", "--center_crop"]
    return []


def settings_of(run: str, rate: float, seed: int, args: argparse.Namespace) -> argparse.Namespace:
    """train_foster.py's settings of a run."""
    n, rank = (1, 1) if run == "full" else map(int, run[1:].split("-r"))
    flags = ["--num_intervals", n, "--rank", rank, "--max_train_steps", args.total_steps // n, "--seed", seed]
    flags += ["--learning_rate", rate, "--train_batch_size", args.train_batch_size, "--max_validation_samples", 128]
    flags += ["--checkpointing_steps", min(args.total_steps // MOST_INTERVALS, args.total_steps // n // 4)]
    flags += ["--output_dir", Path(args.work_dir) / f"{args.domain}-{run}-lr{rate:g}-seed{seed}"]
    flags += [*domain_flags(args.domain), "--report_to", "none", "--resume_from_checkpoint", "latest"]
    settings = train_foster.parse_args([str(flag) for flag in flags])
    settings.global_batch, settings.video = settings.train_batch_size, train_foster.is_video(settings)
    return settings


def validation_loss(pipe, experts, rows, settings, accelerator) -> torch.Tensor:
    """Losses (8 intervals, N pictures)."""
    settings = argparse.Namespace(**vars(settings) | {"interval_bounds": tsm_lora.interval_bounds(INTERVALS)})
    args = (train_foster.Trainee(experts), experts, rows, settings)
    return torch.stack([train_foster.validation_losses(*args, i, accelerator) for i in range(INTERVALS)])


@torch.no_grad()
def scores(pipe, domain: str) -> dict[str, list[float]]:
    """Every score of pictures whose prompts took no part in training or in any choice, None where not asked for."""
    if domain == "digits":
        prompts = (HERE / "mini/prompts/digits.txt").read_text().splitlines()
    elif domain == "clips":
        prompts = clips.prompts("test")[:60]
    else:
        prompts = [prompt for category in world.CATEGORIES for prompt in world.prompts(category, "test")[:40]]
    score_of = evaluate.scorer("mini" if domain == "target" else domain)
    options, rows = SAMPLING | backbones.backbone_of(pipe).sampling(pipe), []
    for start in range(0, len(prompts), 40):
        chunk = prompts[start : start + 40]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(chunk))]
        images = pipe(chunk, generator=generators, output_type="pil", **options)[0]
        rows += [score_of(image, prompt) for image, prompt in zip(images, chunk)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def fine_tune(pipe, train, settings, accelerator):
    """Every weight of the denoiser, on the samples that an n = 1 expert would see; yields the steps done."""
    experts = tsm_lora.attach_experts(pipe, 1, rank=1, train_text_encoder=False)  # B = 0 and frozen: for `predict`
    denoiser = experts.components[experts.backbone.denoiser].requires_grad_(True)
    for factor in experts.parameters():
        factor.requires_grad_(False)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.adam_weight_decay)
    process, model = experts.backbone.process(pipe), train_foster.Trainee(experts)
    pictures = data.Pictures(train, settings, data.latent_shape(pipe, settings), augment=True)
    batches = data.training_loader(pictures, settings, 0, 0, accelerator, None)
    for step, batch in enumerate(tqdm(batches, desc="full fine-tuning"), 1):
        loss = train_foster.sample_losses(model, experts, process, batch, 0, tsm_lora.T).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step in budgets(1, argparse.Namespace(total_steps=settings.max_train_steps)):
            yield step, experts


def build_caches(pipe, train, rows, settings, args: argparse.Namespace, accelerator) -> dict[str, data.Cache]:
    """data.build_caches, but all runs of a domain share one file of latents."""
    own, pool = Path(settings.output_dir), Path(args.work_dir) / f"{args.domain}-latents"

    def link(source, target):
        for name in ("latents.bin", "latents.done"):
            if (source / name).exists() and not (target / name).exists():
                target.mkdir(exist_ok=True)
                os.link(source / name, target / name)

    link(pool, own)
    caches = data.build_caches(pipe, train, rows, settings, accelerator)
    link(own, pool)
    return caches


def experts_after(pipe, settings, step: int) -> Path:
    """A folder with the experts as they were after so many steps each."""
    if step == settings.max_train_steps:
        return train_foster.expert_path(settings, 0).parent
    folder = Path(settings.output_dir) / f"after-{step}"
    folder.mkdir(exist_ok=True)
    for i in range(settings.num_intervals):
        name = f"interval-{i:03d}"
        source = Path(settings.output_dir) / "checkpoints" / name / f"checkpoint-{step}" / f"{name}.safetensors"
        if not (folder / source.name).exists():
            os.link(source, folder / source.name)
    return folder


def measure(run: str, rate: float, seed: int, args: argparse.Namespace, accelerator, with_scores: bool) -> dict:
    """{steps per expert: {loss (8, N), scores}} of one run, trained if that was not done before."""
    settings = settings_of(run, rate, seed, args)
    path = Path(settings.output_dir) / "measured.json"
    record = json.loads(path.read_text()) if path.exists() else {"run": run, "learning_rate": rate, "seed": seed}
    steps = budgets(settings.num_intervals, args)
    scored = [s for s in steps if s in (args.total_steps // MOST_INTERVALS, steps[-1])] if with_scores else []
    wanted = steps if with_scores else steps[-1:]
    if all(str(s) in record and (s not in scored or "scores" in record[str(s)]) for s in wanted):
        return record
    train, rows, _ = data.split_rows(settings)
    pipe = train_foster.load_pipeline(settings, accelerator)
    start = time.time()
    if run == "full":
        wanted, scored, steps = steps, steps[-1:], fine_tune(pipe, train, settings, accelerator)
    else:
        train_foster.claim_output_dir(settings)
        caches = build_caches(pipe, train, rows, settings, args, accelerator)
        for interval in range(settings.num_intervals):
            if not train_foster.expert_path(settings, interval).exists():
                train_foster.foster(pipe, train, rows, caches, settings, interval, accelerator)
        steps = [(s, None) for s in wanted]
    record.setdefault("seconds", time.time() - start)
    for step, experts in steps:
        own = tsm_lora.load_experts(pipe, experts_after(pipe, settings, step)) if experts is None else experts
        entry = record.setdefault(str(step), {})
        entry.setdefault("loss", validation_loss(pipe, own, rows, settings, accelerator).tolist())
        if step in scored and "scores" not in entry:
            entry["scores"] = scores(pipe, args.domain)
        if experts is None:
            own.unload()
        train_foster.write_json(path, record)
    return record


def base(args: argparse.Namespace, accelerator) -> dict:
    """The base model's losses and scores."""
    path = Path(args.work_dir) / f"{args.domain}-base.json"
    if not path.exists():
        settings = settings_of("full", 0, 0, args)
        _, rows, _ = data.split_rows(settings)
        pipe = train_foster.load_pipeline(settings, accelerator)
        experts = tsm_lora.attach_experts(pipe, 1, rank=1, train_text_encoder=False)
        loss = validation_loss(pipe, experts, rows, settings, accelerator).tolist()
        train_foster.write_json(path, {"loss": loss, "scores": scores(pipe, args.domain)})
    return json.loads(path.read_text())


def mean_and_error(values: list[float]) -> dict[str, float]:
    return dict(zip(("mean", "standard_error"), evaluate.mean_and_error(values)))


def flat_scores(entry: dict) -> dict[str, float]:
    """Mean of each score over the prompts that ask for it."""
    named = {name: [v for v in values if v is not None] for name, values in entry["scores"].items()}
    return {name: sum(values) / len(values) for name, values in named.items() if values}


def row_of(run: str, step: int, records: list[dict], reference: list[dict] | None, of_base: dict) -> dict:
    """One line of the table: means over the seeds, and differences to the reference, paired by seed."""
    n = intervals_of(run)
    losses = [torch.tensor(record[str(step)]["loss"]) for record in records]  # (8, N) each
    row = {"run": run, "steps_per_expert": step, "total_steps": step * n, "learning_rate": records[0]["learning_rate"]}
    row |= {"loss": mean_and_error([x.mean().item() for x in losses])}
    row |= {"loss_by_interval": torch.stack(losses).mean((0, 2)).tolist()}
    row["lower_than_base"] = 1 - row["loss"]["mean"] / torch.tensor(of_base["loss"]).mean().item()
    scored = "scores" in records[0][str(step)]
    if scored:
        by_seed = [flat_scores(record[str(step)]) for record in records]
        row["scores"] = {name: mean_and_error([s[name] for s in by_seed]) for name in by_seed[0]}
    if reference:
        others = [record[str(reference[1])] for record in reference[0]]  # its records, and its steps
        gaps = [x - torch.tensor(other["loss"]) for x, other in zip(losses, others)]
        row["loss_minus_reference"] = mean_and_error([gap.mean().item() for gap in gaps])
        row["by_interval_minus_reference"] = torch.stack(gaps).mean((0, 2)).tolist()
        pictures = torch.stack(gaps).mean((0, 1))  # (N,)
        row["loss_minus_reference"]["standard_error_over_pictures"] = (pictures.std() / len(pictures) ** 0.5).item()
        if scored and "scores" in others[0]:
            pairs = [(flat_scores(r[str(step)]), flat_scores(other)) for r, other in zip(records, others)]
            row["scores_minus_reference"] = {k: mean_and_error([a[k] - b[k] for a, b in pairs]) for k in pairs[0][0]}
    return row


def best_rate(loss_at, rates: list[float]) -> tuple[float, dict[str, float]]:
    """The learning rate of the lowest loss and all that were tried: the grid is widened until it brackets the best,
    three times at most."""
    losses: dict[float, float] = {}
    for _ in range(4):
        losses |= {rate: loss_at(rate) for rate in rates}
        best = min(losses, key=losses.get)
        rates = [round(best * 2.5, 6)] if best == max(losses) else []
        rates = [round(best / 2.5, 6)] if best == min(losses) else rates
    return best, {f"{rate:g}": loss for rate, loss in sorted(losses.items())}


def tables(records: dict[str, list[dict]], of_base: dict, args: argparse.Namespace) -> dict[str, list[dict]]:
    reference = records.get(REFERENCE)
    lists: dict[str, list[dict]] = {"equal_total_steps": [], "equal_steps_per_expert": [], "curve": []}
    short = args.total_steps // MOST_INTERVALS
    for run, own in records.items():
        n = intervals_of(run)
        last = args.total_steps // n
        against = None if run == REFERENCE or not reference else reference
        lists["equal_total_steps"].append(row_of(run, last, own, against and (against, args.total_steps), of_base))
        lists["equal_steps_per_expert"].append(row_of(run, short, own, against and (against, short), of_base))
        for step in (last // 4, last // 2, last):
            lists["curve"].append(row_of(run, step, own, against and (against, step * n), of_base))
    return lists


def plot(lists: dict[str, list[dict]], of_base: dict, args: argparse.Namespace, path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, run in enumerate(args.runs):
        rows = [row for row in lists["curve"] if row["run"] == run]
        steps, means = [row["total_steps"] for row in rows], [row["loss"]["mean"] for row in rows]
        left.errorbar(
            steps, means, [row["loss"]["standard_error"] for row in rows], label=run, capsize=2, color=f"C{k}"
        )
        if run != REFERENCE and "by_interval_minus_reference" in rows[-1]:
            own = torch.tensor(rows[-1]["loss_by_interval"])
            relative = own / (own - torch.tensor(rows[-1]["by_interval_minus_reference"]))
            right.plot(range(INTERVALS), relative.tolist(), color=f"C{k}")
    left.set(xlabel="optimiser steps in all", ylabel="validation loss", title=args.domain)
    left.legend(fontsize="xx-small")
    right.axhline(1, color="black", linewidth=0.5)
    right.set(xlabel="interval (0 is the cleanest)", ylabel=f"loss / loss of {REFERENCE}", title="equal total steps")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=train_foster.on_cpu())
    of_base = base(args, accelerator)
    records, tried = {}, {}
    for run in args.runs:
        last = str(args.total_steps // intervals_of(run))

        def loss_at(rate, run=run, last=last):
            record = measure(run, rate, args.seeds[0], args, accelerator, False)
            return torch.tensor(record[last]["loss"]).mean().nan_to_num(torch.inf).item()

        rates = [rate / 10 if run == "full" else rate for rate in args.learning_rates]
        best, tried[run] = best_rate(loss_at, rates)
        records[run] = [measure(run, best, seed, args, accelerator, True) for seed in args.seeds]
        print(run, tried[run], "->", best, flush=True)
    lists = tables(records, of_base, args)
    result = {"command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])}
    result |= {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"}
    result |= {"seeds": args.seeds, "learning_rates_tried": tried, "base_scores": flat_scores(of_base)}
    result |= {"base_loss_by_interval": torch.tensor(of_base["loss"]).mean(1).tolist(), **lists}
    train_foster.write_json(Path(args.output_file), result)
    plot(lists, of_base, args, Path(args.output_file).with_suffix(".png"))
    for title in ("equal_total_steps", "equal_steps_per_expert"):
        print(f"\n{args.domain}, {title.replace('_', ' ')} (± standard error over {len(args.seeds)} seeds)")
        names = list(result["base_scores"])
        print(f"{'':8s} steps    lr      loss    minus {REFERENCE}       " + " ".join(f"{n:>9s}" for n in names))
        for row in lists[title]:
            gap = row.get("loss_minus_reference")
            gap = f"{gap['mean']:+.4f} ± {gap['standard_error']:.4f}" if gap else ""
            shown = " ".join(f"{100 * v['mean']:9.1f}" for v in row.get("scores", {}).values())
            rate, loss = row["learning_rate"], row["loss"]["mean"]
            print(f"{row['run']:8s} {row['steps_per_expert']:5d} {rate:8g} {loss:.4f} {gap:18s}  {shown}")


if __name__ == "__main__":
    main(parse_args())
