"""Base, LoRA, MoE LoRA, stage 1, symmetric stage 2 and stage 2: Table 13 on the mini world.

    python benchmarks/compare_assemble.py --domain target --router_samples 60000 \\
        --output_file benchmarks/results/assemble_target.json
    python benchmarks/compare_assemble.py --domain clips --methods stage-2 --total_steps 256 --router_samples 4800 \\
        --core_rate 0.03125 --context_rate 0.0125 --output_file benchmarks/results/assemble_clips.json

Stage 1 is n8-r4 and LoRA n1-r4 of compare_foster.py, at its learning rates and --total_steps each, trained here if
they are not in --work_dir. The routers and MoE LoRA are trained by train_assemble.py's own functions: routers on
--router_samples samples, so that each row of E is visited about --router_samples / 1000 times, MoE LoRA for
--total_steps. Learning rates: the one with the lowest validation loss with the first seed, on a grid that is widened
until the best lies inside. Loss and scores as in compare_foster.py; differences are paired with stage 1 by seed.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare_foster

import data
import train_assemble
import train_foster
import tsm_lora

METHODS = {
    "moe": ["--moe_experts", "8", "--top_k", "2"],
    "symmetric": ["--symmetric"],
    "stage-2": [],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--domain", choices=["target", "digits", "clips"], default="target")
    parser.add_argument("--total_steps", type=int, default=1024)
    parser.add_argument("--core_rate", type=float, default=1.25e-2, help="learning rate of n8-r4")
    parser.add_argument("--context_rate", type=float, default=5e-3, help="learning rate of n1-r4")
    parser.add_argument("--router_samples", type=int, default=85_000)
    parser.add_argument("--router_rates", type=float, nargs="+", default=[4e-4, 1e-3, 2.5e-3])
    parser.add_argument("--moe_rates", type=float, nargs="+", default=[2e-3, 5e-3, 1.25e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--work_dir", default="output/compare")
    parser.add_argument("--output_file", default="output/compare_assemble.json")
    return parser.parse_args(argv)


def fostered(run: str, rate: float, seed: int, args, accelerator) -> Path:
    """The experts of compare_foster.py's run."""
    compare_foster.measure(run, rate, seed, args, accelerator, False)
    settings = compare_foster.settings_of(run, rate, seed, args)
    return train_foster.expert_path(settings, 0).parent


def settings_of(method: str, rate: float, seed: int, args, accelerator) -> argparse.Namespace:
    """train_assemble.py's settings of a run."""
    steps = args.total_steps if method == "moe" else -(-args.router_samples // args.train_batch_size)
    flags = [*METHODS[method], "--max_train_steps", steps, "--learning_rate", rate, "--seed", seed]
    flags += ["--train_batch_size", args.train_batch_size, "--max_validation_samples", 128, "--report_to", "none"]
    if method != "moe":
        flags += ["--core_experts", fostered("n8-r4", args.core_rate, seed, args, accelerator)]
        flags += ["--context_experts", fostered("n1-r4", args.context_rate, seed, args, accelerator)]
    flags += ["--output_dir", Path(args.work_dir) / f"{args.domain}-{method}-lr{rate:g}-seed{seed}"]
    flags += ["--resume_from_checkpoint", "latest", "--checkpointing_steps", 500, "--checkpoints_total_limit", 1]
    flags += compare_foster.domain_flags(args.domain)
    settings = train_assemble.parse_args([str(flag) for flag in flags])
    settings.global_batch, settings.video = settings.train_batch_size, train_foster.is_video(settings)
    return settings


def measured(folder: Path, settings, args, accelerator, with_scores: bool) -> dict:
    """Loss (8, N) and scores of a folder of experts; kept beside it."""
    path = folder.with_name(f"{folder.name}-measured.json")
    record = json.loads(path.read_text()) if path.exists() else {}
    if "loss" in record and ("scores" in record or not with_scores):
        return record
    _, rows, _ = data.split_rows(settings)
    pipe = train_foster.load_pipeline(settings, accelerator)
    experts = tsm_lora.load_experts(pipe, folder)
    record.setdefault("loss", compare_foster.validation_loss(pipe, experts, rows, settings, accelerator).tolist())
    if with_scores:
        record["scores"] = compare_foster.scores(pipe, args.domain)
    if experts.router is not None and "gates" not in record:
        experts.unload()
        _, record["gates"] = train_assemble.mean_gates(pipe, rows, settings, list(range(10, tsm_lora.T, 20)))
    train_foster.write_json(path, record)
    return record


def train_and_measure(method: str, rate: float, seed: int, args, accelerator, with_scores: bool) -> dict:
    settings = settings_of(method, rate, seed, args, accelerator)
    folder = train_assemble.assembled_dir(settings)
    if not (folder / tsm_lora.ROUTER_FILE).exists():
        train, rows, _ = data.split_rows(settings)
        pipe = train_foster.load_pipeline(settings, accelerator)
        train_assemble.claim_output_dir(pipe, settings)
        caches = compare_foster.build_caches(pipe, train, rows, settings, args, accelerator)
        train_assemble.assemble(pipe, train, rows, caches, settings, accelerator)
    return measured(folder, settings, args, accelerator, with_scores)


def main(args: argparse.Namespace) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=train_foster.on_cpu())
    of_base = compare_foster.base(args, accelerator)
    records: dict[str, list[dict]] = {"LoRA": [], "stage 1": []}
    for seed in args.seeds:
        for name, run, rate in (("LoRA", "n1-r4", args.context_rate), ("stage 1", "n8-r4", args.core_rate)):
            record = compare_foster.measure(run, rate, seed, args, accelerator, True)
            records[name].append(record[str(args.total_steps // compare_foster.intervals_of(run))])
    tried, chosen = {}, {}
    for method in args.methods:
        rates = args.moe_rates if method == "moe" else args.router_rates

        def loss_at(rate, method=method):
            record = train_and_measure(method, rate, args.seeds[0], args, accelerator, False)
            return torch.tensor(record["loss"]).mean().nan_to_num(torch.inf).item()

        chosen[method], tried[method] = compare_foster.best_rate(loss_at, rates)
        run = (method, chosen[method])
        records[method] = [train_and_measure(*run, seed, args, accelerator, True) for seed in args.seeds]
        print(method, tried[method], flush=True)
    table = [{"method": "base", "loss": torch.tensor(of_base["loss"]).mean().item()}]
    table[0] |= {"loss_by_interval": torch.tensor(of_base["loss"]).mean(1).tolist()}
    table[0] |= {"scores": compare_foster.flat_scores(of_base)}
    for name, own in records.items():
        losses, against = (torch.tensor([r["loss"] for r in rows]) for rows in (own, records["stage 1"]))
        gaps, row = losses - against, {"method": name, "learning_rate": chosen.get(name)}
        row["loss"] = compare_foster.mean_and_error(losses.mean((1, 2)).tolist())
        row["loss_by_interval"] = losses.mean((0, 2)).tolist()
        row["minus_stage_1"] = compare_foster.mean_and_error(gaps.mean((1, 2)).tolist())
        row["minus_stage_1_by_interval"] = [
            compare_foster.mean_and_error(gaps[:, i].mean(1).tolist()) for i in range(compare_foster.INTERVALS)
        ]
        scores = [compare_foster.flat_scores(record) for record in own]
        row["scores"] = {k: compare_foster.mean_and_error([s[k] for s in scores]) for k in scores[0]}
        if "gates" in own[0]:
            row["gates"] = {k: sum(r["gates"][k] for r in own) / len(own) for k in own[0]["gates"]}
        table.append(row)
    result = {"command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])}
    result |= {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"}
    result |= {
        "seeds": args.seeds,
        "learning_rates_tried": tried,
        "visits_per_row_of_E": args.router_samples / tsm_lora.T,
    }
    train_foster.write_json(Path(args.output_file), result | {"table": table})
    print(f"\n{args.domain}: {'':6s} loss    minus stage 1        scores (%)")
    for row in table[1:]:
        gap, shown = row["minus_stage_1"], "  ".join(f"{k} {100 * v['mean']:.1f}" for k, v in row["scores"].items())
        gap = f"{gap['mean']:+.5f} ± {gap['standard_error']:.5f}"
        print(f"{row['method']:12s} {row['loss']['mean']:.4f}  {gap}  {shown}")


if __name__ == "__main__":
    main(parse_args())
