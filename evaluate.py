"""Score what was trained.

    python evaluate.py mini output/base output/tsm               # pictures of sample.py, by the mini world's detectors
    python evaluate.py clips output/video-tsm                    # clips of sample.py, by the mini world's detectors
    python evaluate.py digits output/digits-tsm                  # by a classifier of handwritten digits
    python evaluate.py loss --experts output/foster-n8/experts-n8        # validation loss per timestep interval

`mini` reads the folders that sample.py wrote, each with samples/ and metadata.jsonl, and gives the share of pictures
with the demanded colour, shape and texture present, the relation right (spatial), all named attributes on one and the
same object (binding), and everything right (complex); mini/world.py has the exact definitions and no learned weights.
`clips` gives the share of clips whose action, speed, colour and number of objects are as demanded (mini/clips.py).
`loss` gives the diffusion loss on a validation folder at fixed t and noise, base beside experts, on intervals of equal
width (t grows with noise), with the standard error of the paired difference. Both print a table and write JSON.
"""

import argparse
import json
import math
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

import data
import train_foster
import tsm_lora

SCORES = {
    "mini": ("colour", "shape", "texture", "spatial", "binding", "complex"),
    "clips": ("action", "speed", "colour", "count"),
    "digits": ("digit",),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by = {"mini": "pictures by the mini world's detectors", "clips": "clips by the mini world's detectors"}
    for command, what in (by | {"digits": "pictures by a classifier of digits"}).items():
        scores = commands.add_parser(command, help=f"scores of sampled {what}")
        scores.add_argument("image_dirs", nargs="+", help="folders that sample.py wrote")
        scores.add_argument("--output_file", default="output/scores.json")
    loss = commands.add_parser("loss", help="validation loss per interval; takes train_foster.py's flags too")
    loss.add_argument("--experts", nargs="+", required=True, help="folders of experts")
    loss.add_argument("--num_intervals", type=int, default=8, help="intervals of the table, whatever the experts' own")
    loss.add_argument("--output_file", default="output/loss.json")
    args, other = parser.parse_known_args(argv)
    if args.command != "loss" and other:
        parser.error(f"unrecognized arguments: {' '.join(other)}")
    if args.command == "loss":  # model and data by train_foster.py's own flags
        args.settings = train_foster.parse_args([*other, "--num_intervals", str(args.num_intervals)])
    return args


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def read_samples(folder: str | os.PathLike) -> list[tuple[Path, str]]:
    """Pictures and prompts of a folder that sample.py wrote. ValueError where some are missing."""
    folder = Path(folder)
    if not (folder / "metadata.jsonl").is_file():
        raise ValueError(f"{folder} has no metadata.jsonl; give a folder that sample.py wrote (--output_dir)")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(rows)} pictures ({missing[0]}, ...): finish sample.py"
        )
    return [(folder / row["file_name"], row["text"]) for row in rows]


def scorer(command: str):
    """(picture or frames, prompt) -> {score: value, or None where the prompt does not ask for it}."""
    from mini import clips, digits, world

    if command == "digits":
        return lambda picture, prompt: {"digit": digits.score(picture, prompt)}
    return clips.score if command == "clips" else world.score


def mean_scores(folder: str | os.PathLike, command: str) -> dict:
    """Mean, standard error and count of each score over the pictures whose prompt asks for it."""
    score_of = scorer(command)
    values: dict[str, list[float]] = {name: [] for name in SCORES[command]}
    for path, prompt in tqdm(read_samples(folder), desc=str(folder)):
        try:
            score = score_of(data.read_clip(path) if command == "clips" else Image.open(path).convert("RGB"), prompt)
        except (OSError, UnidentifiedImageError) as error:  # PyAV's errors are OSErrors or ValueErrors
            kind = "clip" if command == "clips" else "picture"
            raise ValueError(
                f"{path} is no {kind} or is truncated ({error}); delete it and run sample.py again"
            ) from error
        for name in SCORES[command]:
            if score[name] is not None:
                values[name].append(score[name])
    return {
        name: dict(zip(("mean", "standard_error", "count"), (*mean_and_error(v), len(v)))) if v else None
        for name, v in values.items()
    }


def evaluate_pictures(args: argparse.Namespace) -> None:
    scores = {folder: mean_scores(folder, args.command) for folder in args.image_dirs}
    width = max(len(folder) for folder in scores)
    print(f"\n{'':{width}s}" + "".join(f"{name:>14s}" for name in SCORES[args.command]) + "   (%, ± standard error)")
    for folder, row in scores.items():
        cells = (f"{100 * v['mean']:.1f} ± {100 * v['standard_error']:.1f}" if v else "-" for v in row.values())
        print(f"{folder:{width}s}" + "".join(f"{cell:>14s}" for cell in cells))
    train_foster.write_json(Path(args.output_file), scores)


# ---------------------------------------------------------------------------------------------------------------------
# Validation loss


def evaluate_loss(args: argparse.Namespace) -> None:
    from accelerate import Accelerator

    settings = args.settings
    accelerator = Accelerator(cpu=train_foster.on_cpu(), mixed_precision=settings.mixed_precision)
    pipe = train_foster.load_pipeline(settings, accelerator)
    train_foster.set_intervals(pipe, settings)
    _, rows, origin = data.split_rows(settings)

    def losses(experts, i):
        model = train_foster.Trainee(experts)
        with accelerator.autocast():
            return train_foster.validation_losses(model, experts, rows, settings, i, accelerator)

    base, table = None, {}
    for folder in args.experts:
        experts = tsm_lora.load_experts(pipe, folder)
        if base is None:
            with experts.off():
                base = [losses(experts, i) for i in range(args.num_intervals)]
        table[folder] = [losses(experts, i) for i in range(args.num_intervals)]
        experts.unload()
    bounds = settings.interval_bounds
    records = [
        {
            "timesteps": [bounds[i], bounds[i + 1] - 1],
            "base": base[i].mean().item(),
            "experts": {
                folder: {
                    "loss": row[i].mean().item(),
                    "gain": dict(zip(("mean", "standard_error"), mean_and_error((base[i] - row[i]).tolist()))),
                }
                for folder, row in table.items()
            },
        }
        for i in range(args.num_intervals)
    ]
    if not accelerator.is_main_process:
        return
    print(f"\nvalidation loss on {len(rows)} pictures, {origin} (gain over the base ± its error)")
    print("timesteps    base    " + "   ".join(args.experts))
    for record in records:
        cells = (
            f"{v['loss']:.4f} ({v['gain']['mean']:+.4f} ± {v['gain']['standard_error']:.4f})"
            for v in record["experts"].values()
        )
        print(f"{'{}..{}'.format(*record['timesteps']):9s}  {record['base']:.4f}   " + "   ".join(cells))
    train_foster.write_json(Path(args.output_file), {"pictures_from": origin, "intervals": records})


if __name__ == "__main__":
    arguments = parse_args()
    (evaluate_loss if arguments.command == "loss" else evaluate_pictures)(arguments)
