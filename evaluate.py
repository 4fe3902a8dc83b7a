"""Score what was trained.

    python evaluate.py mini output/base output/tsm               # pictures of sample.py, by the mini world's detectors
    python evaluate.py clips output/video-tsm                    # clips of sample.py, by the mini world's detectors
    python evaluate.py digits output/digits-tsm                  # by a classifier of handwritten digits
    python evaluate.py loss --experts output/foster-n8/experts-n8        # validation loss per timestep interval
    python evaluate.py t2i_compbench output/sd2 --complex_lists examples/dataset --paper "1: SD2"        # Table 1
    python evaluate.py coco output/coco --reference val2014 --paper "12: PixArt-alpha"             # Tables 3, 6, 12
    python evaluate.py evalcrafter output/videos --metadata metadata.json --action_labels label_map_k400.txt \
        --action_model vit-base-p16_videomaev2.pth --paper "2: VC2"                                # Tables 2 and 5
    python evaluate.py gors output/sd2-train/color --category color --output_dir output/gors/color   # training data

`mini` reads the folders that sample.py wrote, each with samples/ and metadata.jsonl, and gives the share of pictures
with the demanded colour, shape and texture present, the relation right (spatial), all named attributes on one and the
same object (binding), and everything right (complex); mini/world.py has the exact definitions and no learned weights.
`clips` gives the share of clips whose action, speed, colour and number of objects are as demanded (mini/clips.py).
`loss` gives the diffusion loss on a validation folder at fixed t and noise, base beside experts, on intervals of equal
width (t grows with noise), with the standard error of the paired difference. Both print a table and write JSON.

`t2i_compbench` reads output/sd2/color/samples/, output/sd2/shape/samples/, ... of sample.py or of the official tool,
and gives the six scores of t2i_compbench.py, and in each folder the official JSON. Spatial and Complex use
output/sd2/spatial/detections.json (README.md says how the official UniDet writes it), else GroundingDINO, which the
result calls a substitute. `coco` gives FID, Patch-FID and CLIP score (coco.py) against a folder of pictures; what it
learned of that folder is stored as reference.npz, which --reference takes as well. `evalcrafter` reads 0000.mp4,
0001.mp4, ... and EvalCrafter's metadata.json (not bundled: it has no licence), and gives its six scores
(evalcrafter.py) and Color without its defects.

These three keep what they measured of each picture or clip, so that a second start does what is missing, and several
processes (accelerate launch) share the work. Networks are loaded when needed, from hub ids, folders or files. Each
writes output_dir/result.json; --paper prints the numbers of a row of tables/paper.json beside, --chart draws both.

`gors` turns scored pictures into training data with rewards, by GORS' thresholds (T2I-CompBench; paper 4.1).
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers
from accelerate import Accelerator, PartialState
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from tqdm.auto import tqdm

import coco
import data
import evalcrafter
import t2i_compbench
import train_foster
import tsm_lora

HERE = Path(__file__).resolve().parent
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
MEASURES = {  # of T2I-CompBench's categories
    **dict.fromkeys(("color", "shape", "texture"), ("blip",)),
    **{"spatial": ("detection",), "non_spatial": ("clip",), "complex": ("blip", "detection", "clip")},
}
OFFICIAL = {  # where T2I-CompBench's tools leave their results, and evaluate.py mini its own
    "blip": "annotation_blip",
    "detection": "labels/annotation_obj_detection_2d",
    "clip": "annotation_clip",
    "complex": "annotation_3_in_1",
    "mini": "annotation_mini",
}
UNSCALED = ("is", "is_standard_deviation", "fid", "patch_fid", "clip_score")  # others are printed times 100
CRAFTER = {"is": None, "action": "action", "amplitude": "amp", "blip_bleu": None, "color": "color", "count": "count"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by = {"mini": "pictures by the mini world's detectors", "clips": "clips by the mini world's detectors"}
    for command, what in (by | {"digits": "pictures by a classifier of digits"}).items():
        scores = commands.add_parser(command, help=f"scores of sampled {what}")
        scores.add_argument("image_dirs", nargs="+", help="folders that sample.py wrote")
        scores.add_argument("--output_file", default="output/scores.json")
    bench = commands.add_parser("t2i_compbench", help="T2I-CompBench's scores, Tables 1, 2, 4, 7, 8, 10, 11 and 13")
    bench.add_argument("image_dir", help="has a folder per category, each with samples/")
    bench.add_argument("--categories", nargs="+", choices=MEASURES, default=list(MEASURES))
    bench.add_argument("--spacy_model", default="en_core_web_sm", help="name of an installed model, or its folder")
    bench.add_argument(
        "--vqa_model",
        default="Salesforce/blip-vqa-base",
        help="hub id or folder, or the official model_base_vqa_capfilt_large.pth (480 instead of 384 pixels)",
    )
    bench.add_argument("--vqa_tokenizer", default="google-bert/bert-base-uncased", help="of a .pth")
    bench.add_argument("--clip_model", default="openai/clip-vit-base-patch32")
    bench.add_argument("--detector", default="IDEA-Research/grounding-dino-tiny", help="where no detections.json is")
    bench.add_argument("--complex_lists", help="folder of complex_val_spatial.txt and complex_val_action.txt")
    on_coco = commands.add_parser("coco", help="FID, Patch-FID and CLIP score, Tables 3, 6 and 12")
    on_coco.add_argument("image_dir", help="folder that sample.py wrote, or any folder of pictures")
    on_coco.add_argument("--reference", help="folder of real pictures, or a reference.npz that this command wrote")
    on_coco.add_argument("--metrics", nargs="+", choices=("fid", "patch_fid", "clip_score"), default=["fid"])
    on_coco.add_argument("--clip_model", default="laion/CLIP-ViT-g-14-laion2B-s12B-b42K")
    gors = commands.add_parser("gors", help="training data of scored pictures")
    gors.add_argument("image_dir", help="folder that sample.py wrote and that t2i_compbench or mini scored")
    gors.add_argument("--category", choices=t2i_compbench.THRESHOLDS, required=True)
    gors.add_argument("--num_images_per_prompt", type=int, help="as in sample.py's args.json if not given")
    gors.add_argument("--output_dir", required=True, help="for train_foster.py --train_data_dir")
    crafter = commands.add_parser("evalcrafter", help="EvalCrafter's scores of clips, Tables 2 and 5")
    crafter.add_argument("video_dir", help="0000.mp4, ... or a folder that sample.py wrote")
    crafter.add_argument("--metadata", required=True, help="EvalCrafter's metadata.json")
    crafter.add_argument("--metrics", nargs="+", choices=CRAFTER, default=list(CRAFTER))
    crafter.add_argument("--action_model", help="mmaction2's VideoMAE-v2 .pth, or a hub id or folder of transformers'")
    crafter.add_argument("--action_labels", help="names of its classes, a line each")
    crafter.add_argument("--clip_model", default="openai/clip-vit-base-patch32")
    crafter.add_argument("--raft_path", help="weights of torchvision's raft_large; its Things weights if not given")
    crafter.add_argument("--caption_model", default="Salesforce/blip2-opt-2.7b")
    crafter.add_argument("--detector", default="IDEA-Research/grounding-dino-tiny")
    crafter.add_argument("--segmenter", default="facebook/sam-vit-base")
    for command in (on_coco, crafter):
        command.add_argument(
            "--inception_path",
            default="/tmp/inception-2015-12-05.pt",
            help="TorchScript file; the default is where clean-fid keeps it",
        )
    for name, command in (("t2i_compbench", bench), ("coco", on_coco), ("evalcrafter", crafter)):
        command.add_argument("--output_dir", default=f"output/{name}", help="result.json, and what was measured")
        command.add_argument("--paper", help="a row of tables/paper.json, such as '1: SD2 + TSM (Ours)'")
        command.add_argument("--chart", help="picture file of the scores")
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
        raise ValueError(f"{folder} lacks {len(missing)} of {len(rows)} samples ({missing[0]}, ...): finish sample.py")
    return [(folder / row["file_name"], row["text"]) for row in rows]


def read_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"{path} is no picture or is truncated ({error}); delete it, and make it again if it was sampled"
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
    means = []
    for path, prompt in tqdm(read_samples(folder), desc=str(folder)):
        score = score_of(data.read_clip(path) if command == "clips" else read_picture(path), prompt)
        asked = {name: score[name] for name in SCORES[command] if score[name] is not None}
        for name, value in asked.items():
            values[name].append(value)
        means.append(sum(asked.values()) / len(asked))
    if command == "mini":
        write_official(Path(folder), "mini", means)
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
    print(f"\nvalidation loss on {len(rows)} samples, {origin} (gain over the base ± its error)")
    print("timesteps    base    " + "   ".join(args.experts))
    for record in records:
        cells = (
            f"{v['loss']:.4f} ({v['gain']['mean']:+.4f} ± {v['gain']['standard_error']:.4f})"
            for v in record["experts"].values()
        )
        print(f"{'{}..{}'.format(*record['timesteps']):9s}  {record['base']:.4f}   " + "   ".join(cells))
    train_foster.write_json(Path(args.output_file), {"pictures_from": origin, "intervals": records})


# ---------------------------------------------------------------------------------------------------------------------
# Measurements that are kept, and results


def kept(folder: Path, paths: dict[str, Path], load: Callable, settings: dict, state: PartialState) -> dict:
    """measure(name, path) of every file as a .npy file, by name, where measure = load(). Only what `folder` does not
    keep yet is measured, each process its share. ValueError where the folder holds measurements by other settings."""
    store = folder / "settings.json"
    with state.main_process_first():
        before = json.loads(store.read_text()) if store.exists() else None
        before = before if any(folder.glob("*.npy")) else settings
        if before != settings:
            raise ValueError(f"{folder} was measured with {before}, not {settings}: choose another --output_dir")
        if state.is_main_process:
            train_foster.write_json(store, settings)

    def is_measured(name):
        array = folder / f"{name}.npy"  # has the time of what it was measured on
        # to a millisecond: file systems round differently
        return array.exists() and abs(array.stat().st_mtime - paths[name].stat().st_mtime) < 1e-3

    missing = [name for name in sorted(paths) if not is_measured(name)]
    state.wait_for_everyone()  # before any process adds to what is there
    mine = missing[state.process_index :: state.num_processes]
    measure = load() if mine else None
    for name in tqdm(mine, desc=folder.name):
        value = measure(name, paths[name])
        with open(folder / f"{name}.partial", "wb") as file:
            np.save(file, np.asarray(value))
        os.utime(folder / f"{name}.partial", (paths[name].stat().st_mtime,) * 2)
        os.replace(folder / f"{name}.partial", folder / f"{name}.npy")
    state.wait_for_everyone()
    return {name: folder / f"{name}.npy" for name in sorted(paths)}


def weights(path: str) -> dict:
    """Tensors of a .safetensors or .pth file; nothing else is ever unpickled."""
    loaded = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    return loaded.get("state_dict", loaded.get("model", loaded))


def load_inception(args: argparse.Namespace, device: torch.device):
    if not Path(args.inception_path).is_file():
        raise ValueError(
            f"--inception_path {args.inception_path}: there is no such file; download {coco.INCEPTION_URL}"
        )
    return torch.jit.load(args.inception_path, map_location=device).eval()


def load_network(kind, name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """In fp32, whatever its file has."""
    return kind.from_pretrained(name, dtype=dtype).to(device).eval()


def digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_official(folder: Path, kind: str, values: list[float], numbers: list[int] | None = None) -> None:
    """vqa_result.json as T2I-CompBench's tools write it. UniDet's takes the numbers in the names for ids, the others
    count; BLIP's answers are text."""
    ids = numbers if kind == "detection" else range(len(values))
    answers = [f"{value:.4f}" if kind == "blip" else value for value in values]
    rows = [{"question_id": number, "answer": answer} for number, answer in zip(ids, answers)]
    train_foster.write_json(folder / OFFICIAL[kind] / "vqa_result.json", rows)


def paper_row(text: str | None) -> dict[str, float]:
    """Scores of a row of tables/paper.json by its table and name, `1: SD2`."""
    if text is None:
        return {}
    tables = json.loads((HERE / "tables/paper.json").read_text())
    table, _, row = (part.strip() for part in text.partition(":"))
    if table not in tables or table == "source":
        raise ValueError(f"--paper {text!r}: give a table from 1 to 13 and a row of it, such as '1: SD2'")
    if row not in tables[table]["rows"]:
        raise ValueError(f"--paper {text!r}: table {table} has the rows {list(tables[table]['rows'])}")
    return tables[table]["rows"][row]


def write_result(args: argparse.Namespace, scores: dict, counts: dict, settings: dict, folders: list[Path]) -> None:
    """Add scores to output_dir/result.json, or begin it anew for another source; print and draw them beside the
    paper's. `settings` are those of each metric, `folders` those whose args.json say how they were sampled."""
    source, path = getattr(args, "video_dir", None) or args.image_dir, Path(args.output_dir) / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("source") != source:
        result = {"source": source, "scores": {}, "counts": {}, "settings": {}, "sampling": {}}
    packages = ("torch", "torchvision", "transformers", "diffusers", "numpy", "pillow", "spacy")
    result["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    for name, values in (("scores", scores), ("counts", counts), ("settings", settings)):
        result[name] |= values
    sampling = {str(folder): folder / "args.json" for folder in folders}
    result["sampling"] |= {k: json.loads(file.read_text()) for k, file in sampling.items() if file.exists()}
    train_foster.write_json(path, result)
    paper = paper_row(args.paper)
    shown = {name: value * (1 if name in UNSCALED else 100) for name, value in result["scores"].items()}
    print(f"\n{'':24s}{'here':>10s}" + (f"{'paper':>10s}   ({args.paper})" if paper else ""))
    for name, value in shown.items():
        print(f"{name:24s}{value:10.4f}" + (f"{paper[name]:10.4f}" if name in paper else ""))
    if args.chart:
        draw_chart(shown, paper, args)


def draw_chart(scores: dict[str, float], paper: dict[str, float], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(1.5 + len(scores), 3))
    for k, (label, values) in enumerate((("here", scores), (args.paper, paper))):
        if values:
            bars = axis.bar([x + 0.4 * k for x in range(len(scores))], [values.get(n, 0) for n in scores], 0.4)
            axis.bar_label(bars, [f"{values[n]:.2f}" if n in values else "" for n in scores], fontsize=7)
            bars.set_label(label)
    axis.set_xticks([x + 0.2 * bool(paper) for x in range(len(scores))], scores, fontsize=8)
    axis.legend()
    figure.tight_layout()
    Path(args.chart).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.chart, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# T2I-CompBench


def numbered_samples(folder: Path) -> list[tuple[int, Path, str]]:
    """(number, picture, prompt) by number, of samples/<prompt>_<number>.png as sample.py and T2I-CompBench's own tool
    name them. ValueError for other names."""
    if (folder / "metadata.jsonl").is_file():
        pairs = read_samples(folder)  # with the prompts whole
    else:
        files = [path for path in (folder / "samples").glob("*") if not path.name.startswith(".")]
        pairs = [(path, path.stem.split("_")[0]) for path in files]
    if not pairs:
        raise ValueError(f"{folder / 'samples'} has no pictures: run sample.py --output_dir {folder}")
    if odd := [path.name for path, _ in pairs if not re.fullmatch(r".+_\d+\.(png|jpe?g|webp)", path.name)]:
        raise ValueError(f"{folder / 'samples'}: {odd[0]} is not called <prompt>_<number>.png")
    rows = sorted((int(path.stem.rpartition("_")[-1]), path, text) for path, text in pairs)
    if twice := [b.name for (i, _, _), (j, b, _) in zip(rows, rows[1:]) if i == j]:
        raise ValueError(f"{folder / 'samples'}: {twice[0]} has the number of another picture")
    return rows


def load_spacy(name: str):
    """The English model that splits prompts; the scores depend on it."""
    import spacy

    try:
        nlp = spacy.load(name)
    except OSError as error:
        raise ValueError(
            f"--spacy_model {name} is not there: `python -m spacy download en_core_web_sm`, or give the folder of an "
            "unpacked wheel from https://github.com/explosion/spacy-models/releases (the official one is 3.5.0)"
        ) from error
    if not nlp.has_pipe("parser"):
        raise ValueError(f"--spacy_model {name} has no parser, so it knows no noun phrases: use en_core_web_sm")
    return nlp


def bench_measure(kind: str, category: str, texts: dict, folder: Path, args: argparse.Namespace, device) -> Callable:
    """(name, path) -> score of a picture of the category, by a network of T2I-CompBench."""
    if kind == "clip":
        model = load_network(transformers.CLIPModel, args.clip_model, device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.clip_model)
        nlp = load_spacy(args.spacy_model) if category == "complex" else None

        def clip(name, path):
            text = t2i_compbench.without_adjectives(nlp(texts[name])) if nlp else texts[name]
            return t2i_compbench.clip_similarity(model, tokenizer, read_picture(path), text)

        return clip
    nlp = load_spacy(args.spacy_model)
    if kind == "blip":
        if Path(args.vqa_model).is_file():
            model = t2i_compbench.blip_of_weights(weights(args.vqa_model)).to(device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.vqa_tokenizer)
        else:
            model = load_network(transformers.BlipForQuestionAnswering, args.vqa_model, device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.vqa_model)

        def blip(name, path):
            asked = t2i_compbench.questions([chunk.text for chunk in nlp(texts[name]).noun_chunks])
            answers = t2i_compbench.blip_probabilities(model, tokenizer, read_picture(path), asked)
            return t2i_compbench.attribute_score(answers)

        return blip
    nouns_of = t2i_compbench.complex_nouns if category == "complex" else t2i_compbench.spatial_nouns
    stored = json.loads((folder / "detections.json").read_text()) if (folder / "detections.json").exists() else None
    if stored is None:
        detector = load_network(transformers.GroundingDinoForObjectDetection, args.detector, device)
        processor = transformers.AutoProcessor.from_pretrained(args.detector)

    def spatial(name, path):
        nouns = nouns_of(nlp(texts[name]))
        if nouns is None:
            found = []
        elif stored is None:
            found = t2i_compbench.detections(detector, processor, read_picture(path), nouns)
        elif path.name in stored:
            found = stored[path.name]
        else:
            raise ValueError(f"{folder / 'detections.json'} lacks {path.name}: detect the objects of all pictures")
        return t2i_compbench.spatial_score(texts[name], nouns, found)

    return spatial


def bench_settings(kind: str, category: str, folder: Path, texts: dict, args: argparse.Namespace) -> dict:
    """What a measurement depends on."""
    flags = {"blip": ("spacy_model", "vqa_model"), "clip": ("clip_model",), "detection": ("spacy_model",)}[kind]
    flags += ("spacy_model",) if category == "complex" and kind == "clip" else ()
    settings = {flag: getattr(args, flag) for flag in flags}
    if kind == "blip" and Path(args.vqa_model).is_file():
        settings |= {"vqa_weights": digest(args.vqa_model), "vqa_tokenizer": args.vqa_tokenizer}
    if kind == "detection" and (folder / "detections.json").exists():
        settings["detections.json"] = digest(folder / "detections.json")
    elif kind == "detection":
        settings["detector"] = f"{args.detector} in place of UniDet: not comparable with published numbers"
    prompts = json.dumps(texts).encode()
    return settings | {"image_dir": str(folder), "prompts": hashlib.sha256(prompts).hexdigest()[:16]}


def complex_lists(args: argparse.Namespace, texts: list[str]) -> dict[str, set[str]]:
    """Which prompts of the category complex, for validation or training, are spatial and which are of an action; those
    in neither list are both. ValueError where that would be all of them."""
    lists = {}
    for name in ("spatial", "action"):
        files = [Path(args.complex_lists or "") / f"complex_{split}_{name}.txt" for split in ("val", "train")]
        files = [file for file in files if file.is_file()]
        if args.complex_lists is None or not files:
            raise ValueError(
                f"Complex needs complex_val_{name}.txt: --complex_lists examples/dataset of T2I-CompBench"
            )
        lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
        lists[name] = {t2i_compbench.prompt_key(line) for line in lines}
    if not any(t2i_compbench.prompt_key(text) in lists["spatial"] | lists["action"] for text in texts):
        raise ValueError(f"{args.complex_lists}: no prompt of the pictures is in its lists; give those of their split")
    return lists


def evaluate_t2i_compbench(args: argparse.Namespace) -> None:
    state, out = PartialState(cpu=not torch.cuda.is_available()), Path(args.output_dir)
    paper_row(args.paper)  # a wrong one is told before the work
    folders = {category: Path(args.image_dir) / category for category in args.categories}
    samples = {category: numbered_samples(folder) for category, folder in folders.items()}
    lists = complex_lists(args, [text for _, _, text in samples["complex"]]) if "complex" in samples else {}
    scores, counts, settings = {}, {}, {}
    for category, folder in folders.items():
        paths = {f"{number:06d}": path for number, path, _ in samples[category]}
        texts = {f"{number:06d}": text for number, _, text in samples[category]}
        values = {}
        for kind in MEASURES[category]:
            own = bench_settings(kind, category, folder, texts, args)
            load = partial(bench_measure, kind, category, texts, folder, args, state.device)
            files = kept(out / category / kind, paths, load, own, state)
            values[kind] = [float(np.load(file)) for file in files.values()]
            settings[category] = settings.get(category, {}) | own
            if state.is_main_process:
                write_official(folder, kind, values[kind], [int(name) for name in files])
        final = values[MEASURES[category][0]]
        if category == "complex":
            rows = zip(texts.values(), *(values[kind] for kind in ("blip", "detection", "clip")))
            final = [t2i_compbench.complex_score(*row, lists) for row in rows]
            if state.is_main_process:
                write_official(folder, "complex", final)
        scores[category], counts[category] = sum(final) / len(final), len(final)
    if state.is_main_process:
        write_result(args, scores, counts, settings, list(folders.values()))


# ---------------------------------------------------------------------------------------------------------------------
# COCO


SUFFIXES = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")  # clean-fid's


def pictures_in(folder: Path) -> dict[str, Path]:
    """What sample.py wrote, or every picture below a folder, by a name of its own."""
    if (folder / "samples").is_dir() and (folder / "metadata.jsonl").is_file():
        return {path.name: path for path, _ in read_samples(folder)}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no pictures there")
    return {str(path.relative_to(folder)).replace(os.sep, "__"): path for path in files}


def stacked(files: list[Path], size: int = 512):
    """Their arrays, `size` at a time."""
    for k in range(0, len(files), size):
        yield np.stack([np.load(file) for file in files[k : k + size]])


def reference_moments(metric: str, measured: Callable, args: argparse.Namespace, state: PartialState) -> dict | None:
    """`mean`, `cov` and `origin` of the reference's features, in the main process; of a folder they are measured once
    and stored in output_dir/reference.npz."""
    inception, reference = digest(args.inception_path), Path(args.reference)
    stored = reference if reference.is_file() else Path(args.output_dir) / "reference.npz"
    known = dict(np.load(stored, allow_pickle=False)) if stored.exists() else {}
    if reference.is_file() and "inception" not in known:
        raise ValueError(f"{reference} is no reference.npz that this command wrote: give the folder of pictures")
    if reference.is_dir():
        paths = pictures_in(reference)
        origin = f"{reference}: {len(paths)} pictures, newest {max(p.stat().st_mtime for p in paths.values())}"
        if str(known.get("origin")) != origin or str(known.get("inception")) != inception:
            known = {}
        if f"{metric}_mean" not in known:
            files = measured(f"reference_{metric}", paths)
            if not state.is_main_process:
                return None
            mean, cov = coco.moments(stacked(list(files.values())))
            known |= {f"{metric}_mean": mean, f"{metric}_cov": cov, "origin": origin, "inception": inception}
            np.savez(stored.with_name("reference.partial.npz"), **known)
            os.replace(stored.with_name("reference.partial.npz"), stored)
    if str(known["inception"]) != inception:
        raise ValueError(f"{reference} was measured with another network than {args.inception_path}")
    if f"{metric}_mean" not in known:
        raise ValueError(f"{reference} has no {metric}: measure it on the folder of pictures, --metrics {metric}")
    return {"mean": known[f"{metric}_mean"], "cov": known[f"{metric}_cov"], "origin": str(known["origin"])}


def evaluate_coco(args: argparse.Namespace) -> None:
    state, out, folder = PartialState(cpu=not torch.cuda.is_available()), Path(args.output_dir), Path(args.image_dir)
    paper_row(args.paper)  # a wrong one is told before the work
    frechet = [metric for metric in args.metrics if metric != "clip_score"]
    if frechet and (args.reference is None or not Path(args.reference).exists()):
        raise ValueError(f"{frechet[0]} needs --reference, val2014 or a reference.npz; got {args.reference}")
    if "clip_score" in args.metrics and not (folder / "metadata.jsonl").is_file():
        raise ValueError(f"the CLIP score needs captions: {folder} has no metadata.jsonl of sample.py")
    if frechet:
        load_inception(args, state.device)  # a missing one is told before the work
    scores, settings, paths = {}, {}, pictures_in(folder)

    def measured(metric, name, pictures):
        cut = {"fid": coco.fid_picture, "patch_fid": coco.patch_picture}[metric]

        def load():
            inception = load_inception(args, state.device)
            return lambda name, path: coco.inception_features(inception, cut(read_picture(path)))

        source = args.reference if name.startswith("reference") else str(folder)
        return kept(out / name, pictures, load, {"image_dir": source, "inception": digest(args.inception_path)}, state)

    for metric in frechet:
        reference = reference_moments(metric, partial(measured, metric), args, state)
        files = measured(metric, metric, paths)
        if state.is_main_process:
            mean, cov = coco.moments(stacked(list(files.values())))
            scores[metric] = coco.frechet_distance(mean, cov, reference["mean"], reference["cov"])
            settings[metric] = {"reference": reference["origin"], "inception": digest(args.inception_path)}
    if "clip_score" in args.metrics:
        texts = {path.name: text for path, text in read_samples(folder)}

        def load():
            model = load_network(transformers.CLIPModel, args.clip_model, state.device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.clip_model)

            def similarity(name, path):
                picture, text = coco.fid_picture(read_picture(path)), coco.CLIP_PREFIX + texts[name]
                return t2i_compbench.clip_similarity(model, tokenizer, picture, text)

            return similarity

        captions = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        settings["clip_score"] = {"image_dir": str(folder), "clip_model": args.clip_model, "captions": captions}
        files = kept(out / "clip_score", paths, load, settings["clip_score"], state)
        scores["clip_score"] = float(np.mean([np.load(file) for file in files.values()]))
    if state.is_main_process:
        write_result(args, scores, dict.fromkeys(scores, len(paths)), settings, [folder])


# ---------------------------------------------------------------------------------------------------------------------
# GORS


def evaluate_gors(args: argparse.Namespace) -> None:
    """A folder for train_foster.py --train_data_dir ... --reward_column reward."""
    folder, out = Path(args.image_dir), Path(args.output_dir)
    kind = {"mini": "mini", "complex": "complex"}.get(args.category) or MEASURES[args.category][0]
    file = folder / OFFICIAL[kind] / "vqa_result.json"
    if out.exists():
        raise ValueError(f"{out} exists: choose another --output_dir")
    if not file.is_file():
        raise ValueError(
            f"{folder} is not scored, {file} is missing: run evaluate.py t2i_compbench or mini on it first"
        )
    rows, answers = numbered_samples(folder), json.loads(file.read_text())
    if len(rows) != len(answers):
        raise ValueError(f"{file} has {len(answers)} answers for {len(rows)} pictures: score the folder again")
    if args.num_images_per_prompt is None:
        if not (folder / "args.json").exists():
            raise ValueError(
                f"{folder} has no args.json of sample.py: say --num_images_per_prompt, T2I-CompBench's 90"
            )
        args.num_images_per_prompt = json.loads((folder / "args.json").read_text())["num_images_per_prompt"]
    first = {}  # line of each prompt; one that comes twice counts as at its first line, officially
    for number, _, text in rows:
        first.setdefault(text, number // args.num_images_per_prompt)
    scale = 2.5 if args.category == "non_spatial" else 1
    rewards = [scale * float(row["answer"]) for row in answers]
    chosen = [
        {"file_name": path.name, "text": text, "reward": reward, "path": path}
        for (_, path, text), reward in zip(rows, rewards)
        if t2i_compbench.keep_reward(args.category, first[text], reward)
    ]
    thresholds = t2i_compbench.THRESHOLDS[args.category]
    if not chosen:
        raise ValueError(f"no reward is above {thresholds}, the largest is {max(rewards):.4f}: nothing to train on")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parent:
        draft = Path(parent) / out.name
        draft.mkdir()
        for row in chosen:
            path = row.pop("path")
            try:
                os.link(path, draft / path.name)  # 63,000 pictures a category: not twice on the disk
            except OSError:
                shutil.copyfile(path, draft / path.name)
        (draft / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        os.rename(draft, out)
    print(f"{out}: {len(chosen)} of {len(rows)} pictures, with a reward above {thresholds[0]} for the prompts of a")
    print(f"template and {thresholds[1]} for others; mean reward {np.mean([row['reward'] for row in chosen]):.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# EvalCrafter


def crafter_measure(metric: str, entries: dict, args: argparse.Namespace, device: torch.device) -> Callable:
    """(name, path) -> what the metric's network makes of a clip. ValueError where a network's file is not named."""
    needed = {"action": ("action_model", "action_labels")}.get(metric, ())
    if missing := [f"--{flag}" for flag in needed if getattr(args, flag) is None]:
        raise ValueError(f"the metric {metric} needs {' and '.join(missing)}: it cannot be downloaded by itself")

    def frames(path):
        return np.stack([np.asarray(frame) for frame in data.read_clip(path)])

    if metric == "is":
        inception = load_inception(args, device)
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
            model = model.to(device).eval()
        else:
            model = load_network(transformers.VideoMAEForVideoClassification, args.action_model, device)
        text = load_network(transformers.CLIPModel, args.clip_model, device)
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
        model = load_network(transformers.Blip2ForConditionalGeneration, args.caption_model, device, dtype)
        processor = transformers.AutoProcessor.from_pretrained(args.caption_model)

        def blip_bleu(name, path):
            captions = evalcrafter.blip_captions(model, processor, frames(path))
            return evalcrafter.blip_bleu(entries[name]["prompt"], captions)

        return blip_bleu
    detector = load_network(transformers.GroundingDinoForObjectDetection, args.detector, device)
    segmenter = load_network(transformers.SamModel, args.segmenter, device)
    find, cut = (transformers.AutoProcessor.from_pretrained(name) for name in (args.detector, args.segmenter))

    def objects(name, path):
        """Per sampled frame the number of objects, and their mean hue by the official and by the corrected rule."""
        (_, noun), clip, rows = evalcrafter.attribute(entries[name][CRAFTER[metric]]), frames(path), []
        for frame in clip[evalcrafter.attribute_frames(len(clip))]:
            boxes, _ = evalcrafter.detect(detector, find, frame, noun)
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
    paper_row(args.paper)
    if "is" in args.metrics:
        load_inception(args, state.device)
    for flag in ("metadata", "action_labels", "raft_path"):
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
    scores, counts, used = {}, {}, {}
    for metric in args.metrics:
        attribute = CRAFTER[metric]
        own = {k: p for k, p in paths.items() if attribute is None or entries[k].get(attribute)}
        if not own:
            raise ValueError(f"{args.metadata} gives none of the {len(paths)} clips the attribute {attribute!r}")
        told = json.dumps([(k, entries[k]["prompt"], entries[k].get(attribute)) for k in own]).encode()
        settings = {"video_dir": str(folder), "attributes": hashlib.sha256(told).hexdigest()[:16]}
        settings |= {flag: getattr(args, flag) for flag in CRAFTER_FLAGS[metric]}
        load = partial(crafter_measure, metric, entries, args, state.device)
        files = kept(out / metric, own, load, settings, state)
        values = {name: np.load(file) for name, file in files.items()}
        scores |= crafter_scores(metric, values, entries)
        counts[metric], used[metric] = len(own), settings
    if state.is_main_process:
        write_result(args, scores, counts, used, [folder.parent])


if __name__ == "__main__":
    arguments = parse_args()
    commands = {"loss": evaluate_loss, "t2i_compbench": evaluate_t2i_compbench, "coco": evaluate_coco}
    commands |= {"gors": evaluate_gors, "evalcrafter": evaluate_evalcrafter}
    commands.get(arguments.command, evaluate_pictures)(arguments)
