"""What intervals of equal width and of equal probability mean for a flow model with shift 3, as SD3.

    python benchmarks/flow_intervals.py --output_file benchmarks/results/flow_intervals.json

For n intervals: the share of training draws over all t (stage 2) that falls into each, under two weighting schemes,
and how many of a sampler's steps. Boundaries of equal probability are those of the scheme.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_foster
from backbones import Flow, Weighting
from tsm_lora import interval_bounds, interval_index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--num_intervals", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--output_file", default="output/flow_intervals.json")
    args = parser.parse_args()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    processes = {
        scheme: Flow(SimpleNamespace(scheduler=scheduler), Weighting(scheme=scheme))
        for scheme in ("none", "logit_normal")
    }
    scheduler.set_timesteps(args.num_inference_steps)
    tables = {}
    kinds = {"equal_width": interval_bounds(args.num_intervals)}
    kinds |= {f"equal_probability, {scheme}": p.bounds(args.num_intervals) for scheme, p in processes.items()}
    for kind, bounds in kinds.items():
        steps = interval_index(scheduler.timesteps, bounds).bincount(minlength=args.num_intervals).tolist()
        print(f"\n{kind}\ntimesteps    draws (none)    draws (logit_normal)    of {args.num_inference_steps} steps")
        tables[kind] = []
        for low, high, count in zip(bounds, bounds[1:], steps):
            shares = {scheme: p.share(high) - p.share(low) for scheme, p in processes.items()}
            tables[kind].append({"timesteps": [low, high - 1], "share_of_draws": shares, "sampling_steps": count})
            cells = "".join(f"{100 * share:12.2f} %   " for share in shares.values())
            print(f"{low:4d}..{high - 1:<4d}{cells}   {count:12d}")
    command = " ".join(["python benchmarks/flow_intervals.py", *sys.argv[1:]])
    train_foster.write_json(Path(args.output_file), {"command": command, "shift": args.shift, "tables": tables})


if __name__ == "__main__":
    main()
