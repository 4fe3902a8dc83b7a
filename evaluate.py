"""Score what was trained.

    python evaluate.py mini output/base output/tsm               # pictures of sample.py, by the mini world's detectors
    python evaluate.py clips output/video-tsm                    # clips of sample.py, by the mini world's detectors
    python evaluate.py digits output/digits-tsm                  # by a classifier of handwritten digits
    python evaluate.py loss --experts output/foster-n8/experts-n8        # validation loss per timestep interval
    python evaluate.py evalcrafter output/videos --metadata metadata.json --inception_path inception-2015-12-05.pt \
        --action_model vit-base-p16_videomaev2.pth --action_labels label_map_k400.txt            # Tables 2 and 5

`mini` reads the folders that sample.py wrote, each with samples/ and metadata.jsonl, and gives the share of pictures
with the demanded colour, shape and texture present, the relation right (spatial), all named attributes on one and the
same object (binding), and everything right (complex); mini/world.py has the exact definitions and no learned weights.
`clips` gives the share of clips whose action, speed, colour and number of objects are as demanded (mini/clips.py).
`loss` gives the diffusion loss on a validation folder at fixed t and noise, base beside experts, on intervals of equal
width (t grows with noise), with the standard error of the paired difference. Both print a table and write JSON.

`evalcrafter` reads 0000.mp4, 0001.mp4, ... and EvalCrafter's metadata.json (not bundled: it has no licence), and gives
its six scores (evalcrafter.py) and Color without its defects. Each clip's result is kept, so that a second start does
what is missing, and several processes share the work. --metrics takes some of them; networks are loaded when needed,
from hub ids, folders or, for Inception, RAFT and the action classifier, files.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers
from accelerate import Accelerator, PartialState
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from tqdm.auto import tqdm

import data
import evalcrafter
import train_foster
import tsm_lora

SCORES = {
    "mini": ("colour", "shape", "texture", "spatial", "binding", "complex"),
    "clips": ("action", "speed", "colour", "count"),
    "digits": ("digit",),
}
CRAFTER_FLAGS = {  # what a metric's measurements depend on
    "is": ("inception_path",),
    "action": ("action_model", "action_labels", "clip_model"),
    "amplitude": ("raft_path",),
    "blip_bleu": ("caption_model",),
    "color": ("detector", "segmenter"),
    "count": ("detector", "segmenter"),
}
CRAFTER = {"is": None, "action": "action", "amplitude": "amp", "blip_bleu": None, "color": "color", "count": "count"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by = {"mini": "pictures by the mini world's detectors", "clips": "clips by the mini world's detectors"}
    for command, what in (by | {"digits": "pictures by a classifier of digits"}).items():
        scores = commands.add_parser(command, help=f"scores of sampled {what}")
        scores.add_argument("image_dirs", nargs="+", help="folders that sample.py wrote")
        scores.add_argument("--output_file", default="output/scores.json")
    crafter = commands.add_parser("evalcrafter", help="EvalCrafter's scores of clips, Tables 2 and 5")
    crafter.add_argument("video_dir", help="0000.mp4, ... or a folder that sample.py wrote")
    crafter.add_argument("--metadata", required=True, help="EvalCrafter's metadata.json")
    crafter.add_argument("--metrics", nargs="+", choices=CRAFTER, default=list(CRAFTER))
    crafter.add_argument("--inception_path", help="TorchScript file inception-2015-12-05.pt")
    crafter.add_argument("--action_model", help="mmaction2's VideoMAE-v2 .pth, or a hub id or folder of transformers'")
    crafter.add_argument("--action_labels", help="names of its classes, a line each")
    crafter.add_argument("--clip_model", default="openai/clip-vit-base-patch32")
    crafter.add_argument("--raft_path", help="weights of torchvision's raft_large; its Things weights if not given")
    crafter.add_argument("--caption_model", default="Salesforce/blip2-opt-2.7b")
    crafter.add_argument("--detector", default="IDEA-Research/grounding-dino-tiny")
    crafter.add_argument("--segmenter", default="facebook/sam-vit-base")
    crafter.add_argument("--output_dir", default="output/evalcrafter", help="result.json, and what was measured")
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


def read_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"{path} is no picture or is truncated ({error}); delete it and run sample.py again"
        ) from error


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
        score = score_of(data.read_clip(path) if command == "clips" else read_picture(path), prompt)
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


# ---------------------------------------------------------------------------------------------------------------------
# EvalCrafter


def kept(folder: Path, paths: dict[str, Path], load: Callable, settings: dict, state: PartialState) -> dict:
    """measure(name, path) of every file as an array, by name, where measure = load(). Only what `folder` does not keep
    yet is measured, each process its share. ValueError where the folder holds measurements by other settings."""
    store = folder / "settings.json"
    with state.main_process_first():
        before = json.loads(store.read_text()) if store.exists() else settings
        if before != settings:
            raise ValueError(f"{folder} was measured with {before}, not {settings}: choose another --output_dir")
        if state.is_main_process:
            train_foster.write_json(store, settings)

    def is_measured(name):
        array = folder / f"{name}.npy"
        return array.exists() and array.stat().st_mtime >= paths[name].stat().st_mtime

    missing = [name for name in sorted(paths) if not is_measured(name)]
    state.wait_for_everyone()  # before any process adds to what is there
    mine = missing[state.process_index :: state.num_processes]
    measure = load() if mine else None
    for name in tqdm(mine, desc=folder.name):
        value = measure(name, paths[name])
        with open(folder / f"{name}.partial", "wb") as file:
            np.save(file, np.asarray(value))
        os.replace(folder / f"{name}.partial", folder / f"{name}.npy")
    state.wait_for_everyone()
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in sorted(paths)}


def weights(path: str) -> dict:
    """Tensors of a .safetensors or .pth file; nothing else is ever unpickled."""
    loaded = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def crafter_measure(metric: str, entries: dict, args: argparse.Namespace, device: torch.device) -> Callable:
    """(name, path) -> what the metric's network makes of a clip. ValueError where a network's file is not named."""
    needed = {"is": ("inception_path",), "action": ("action_model", "action_labels")}.get(metric, ())
    if missing := [f"--{flag}" for flag in needed if getattr(args, flag) is None]:
        raise ValueError(f"the metric {metric} needs {' and '.join(missing)}: it cannot be downloaded by itself")

    def frames(path):
        return np.stack([np.asarray(frame) for frame in data.read_clip(path)])

    if metric == "is":
        inception = torch.jit.load(args.inception_path, map_location=device).eval()
        return lambda name, path: evalcrafter.inception_probabilities(inception, frames(path)).numpy()
    if metric == "action":
        labels = Path(args.action_labels).read_text().splitlines()
        if Path(args.action_model).is_file():
            state = evalcrafter.convert_videomae(weights(args.action_model))
            model = transformers.VideoMAEForVideoClassification(
                transformers.VideoMAEConfig(num_labels=len(labels), layer_norm_eps=1e-6)
            )
            model.fc_norm.eps = 1e-6
            model.load_state_dict(state)
        else:
            model = transformers.VideoMAEForVideoClassification.from_pretrained(args.action_model)
        model = model.to(device).eval()
        text = transformers.CLIPModel.from_pretrained(args.clip_model).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.clip_model)

        def action(name, path):
            probabilities = evalcrafter.action_probabilities(model, frames(path))
            similarities = evalcrafter.text_similarities(text, tokenizer, labels, entries[name]["action"])
            return evalcrafter.action_score(probabilities, similarities)

        return action
    if metric == "amplitude":
        of = torchvision.models.optical_flow
        state = weights(args.raft_path) if args.raft_path else None
        raft = of.raft_large(weights=None).to(device).eval()
        raft.load_state_dict(state or of.Raft_Large_Weights.C_T_V1.get_state_dict(weights_only=True))
        return lambda name, path: evalcrafter.mean_flows(raft, frames(path))
    if metric == "blip_bleu":
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(args.caption_model, dtype=dtype)
        processor, model = transformers.AutoProcessor.from_pretrained(args.caption_model), model.to(device).eval()

        def blip_bleu(name, path):
            captions = evalcrafter.blip_captions(model, processor, frames(path))
            return evalcrafter.blip_bleu(entries[name]["prompt"], captions)

        return blip_bleu
    detector = transformers.GroundingDinoForObjectDetection.from_pretrained(args.detector).to(device).eval()
    segmenter = transformers.SamModel.from_pretrained(args.segmenter).to(device).eval()
    find, cut = (transformers.AutoProcessor.from_pretrained(name) for name in (args.detector, args.segmenter))

    def objects(name, path):
        """Per sampled frame the number of objects, and their mean hue by the official and by the corrected rule."""
        (_, noun), clip, rows = evalcrafter.attribute(entries[name][CRAFTER[metric]]), frames(path), []
        for frame in clip[evalcrafter.attribute_frames(len(clip))]:
            boxes = evalcrafter.detect_boxes(detector, find, frame, noun)
            ids = evalcrafter.object_ids(boxes, segmenter, cut, frame)
            hues = (evalcrafter.mean_hue(frame, ids, corrected) for corrected in (False, True))
            rows.append([len(np.unique(ids[ids > 0])), *hues])
        return rows

    return objects


def crafter_scores(metric: str, measured: dict[str, np.ndarray], entries: dict) -> dict[str, float]:
    """The scores that a metric's measurements give, by name."""
    if metric == "is":
        mean, deviation = evalcrafter.inception_score(torch.from_numpy(np.concatenate(list(measured.values()))))
        return {"is": mean, "is_standard_deviation": deviation}
    if metric == "amplitude":
        right = [evalcrafter.amplitude(flows) == entries[name]["amp"] for name, flows in measured.items()]
        return {"amplitude": float(np.mean(right))}
    if metric not in ("color", "count"):
        return {metric: float(np.mean(list(measured.values())))}
    pairs = [(rows, evalcrafter.attribute(entries[name][metric])[0]) for name, rows in measured.items()]
    if metric == "count":
        return {"count": float(np.mean([evalcrafter.count_score(rows[:, 0], float(n)) for rows, n in pairs]))}
    official = [evalcrafter.color_score(rows[:, 1], color) for rows, color in pairs]
    corrected = [evalcrafter.color_score(rows[:, 2], color, corrected=True) for rows, color in pairs]
    return {"color": float(np.mean(official)), "color_corrected": float(np.mean(corrected))}


def evaluate_evalcrafter(args: argparse.Namespace) -> None:
    state, out = PartialState(cpu=not torch.cuda.is_available()), Path(args.output_dir)
    folder = Path(args.video_dir) / "samples" if (Path(args.video_dir) / "samples").is_dir() else Path(args.video_dir)
    for flag in ("metadata", "inception_path", "action_labels", "raft_path"):
        if getattr(args, flag) is not None and not Path(getattr(args, flag)).is_file():
            raise ValueError(f"--{flag} {getattr(args, flag)}: there is no such file")
    entries = json.loads(Path(args.metadata).read_text())
    entries = {key: entry | entry.get("attributes", {}) for key, entry in entries.items()}
    paths = {path.stem[:4]: path for path in sorted(folder.glob("*.mp4"))}
    if not paths or (foreign := sorted(set(paths) - set(entries))):
        raise ValueError(f"{folder}: no .mp4 there" if not paths else f"{folder}: {args.metadata} knows no {foreign}")
    if (folder.parent / "metadata.jsonl").exists():  # of sample.py
        lines = map(json.loads, (folder.parent / "metadata.jsonl").read_text().splitlines())
        for name, text in ((Path(line["file_name"]).stem, line["text"]) for line in lines):
            if name in paths and text != entries[name]["prompt"].strip():
                raise ValueError(f"{name}.mp4 was made for {text!r}, {args.metadata} says {entries[name]['prompt']!r}")
    result = {"video_dir": str(folder), "scores": {}, "counts": {}}
    if (out / "result.json").exists():  # of other metrics
        before = json.loads((out / "result.json").read_text())
        result = before if before["video_dir"] == str(folder) else result
    for metric in args.metrics:
        attribute = CRAFTER[metric]
        own = {k: p for k, p in paths.items() if attribute is None or entries[k].get(attribute)}
        if not own:
            raise ValueError(f"{args.metadata} gives none of the {len(paths)} clips the attribute {attribute!r}")
        told = json.dumps([(k, entries[k]["prompt"], entries[k].get(attribute)) for k in own]).encode()
        settings = {"video_dir": str(folder), "attributes": hashlib.sha256(told).hexdigest()[:16]}
        settings |= {flag: getattr(args, flag) for flag in CRAFTER_FLAGS[metric]}
        values = kept(
            out / metric, own, partial(crafter_measure, metric, entries, args, state.device), settings, state
        )
        result["scores"] |= crafter_scores(metric, values, entries)
        result["counts"][metric] = len(own)
    if state.is_main_process:
        train_foster.write_json(out / "result.json", result)
        for name, value in result["scores"].items():
            print(f"{name:24s} {value if name.startswith('is') else 100 * value:8.2f}")


if __name__ == "__main__":
    arguments = parse_args()
    run = {"loss": evaluate_loss, "evalcrafter": evaluate_evalcrafter}.get(arguments.command, evaluate_pictures)
    run(arguments)
