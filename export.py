"""Export timestep LoRA experts for other programs.

    python export.py output/foster-n8/experts-n8 --format kohya      # A1111, ComfyUI, SD.Next: SD1.x and SD2.x
    python export.py output/foster-n8/experts-n8 --format peft       # a PEFT folder per expert and component
    python export.py output/foster-n8/experts-n8 --format comfyui    # kohya files and a keyframe table

Diffusers needs no export where it has a LoRA loader: each expert file opens with `pipe.load_lora_weights`. In every
format alpha equals the rank, because alpha / r is in the weights and loaders lose alpha.

ComfyUI switches a LoRA by keyframes: `Create Hook LoRA`, then `Create Hook Keyframe` with a start_percent, where a
keyframe counts from the first step whose sigma is at most percent_to_sigma(start_percent). keyframes.json has two per
expert, strength 1 at its start and 0 at its end, with percents computed from the base model's noise schedule.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tsm_lora

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("experts", help="folder of expert files")
    parser.add_argument("--format", required=True, choices=["kohya", "peft", "comfyui"])
    parser.add_argument("--output_dir", help="<experts>-<format> if not given")
    parser.add_argument("--pretrained_model_name_or_path", help="base model, if not the one named in the files")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"{args.experts.rstrip('/')}-{args.format}"
    return args


def to_kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`unet.a.b.lora_A.weight` -> `lora_unet_a_b.lora_down.weight`, and alpha = rank. ValueError for other models."""
    renamed = {}
    for key, A in tensors.items():
        component, module, factor = re.fullmatch(r"(\w+)\.(.+)\.lora_([AB])\.weight", key).groups()
        if component not in KOHYA:
            raise ValueError(f"kohya's keys for {component} are not known here; --format peft serves every model")
        if factor == "B":
            continue
        pairs = {module: (A, tensors[key.replace("lora_A", "lora_B")])}
        if module.endswith("q_proj") and key.replace("q_proj", "out_proj") not in tensors:
            # diffusers recognises kohya's text encoder keys only by an out_proj among them
            pairs[module.replace("q_proj", "out_proj")] = torch.zeros_like(A), torch.zeros_like(A.t())
        for name, (down, up) in pairs.items():
            name = f"{KOHYA[component]}_{name.replace('.', '_')}"
            renamed[f"{name}.lora_down.weight"], renamed[f"{name}.lora_up.weight"] = down, up.contiguous()
            renamed[f"{name}.alpha"] = torch.tensor(float(len(A)))
    return renamed


def write_peft(tensors: dict[str, torch.Tensor], facts: dict, folder: Path, base_model: str) -> None:
    """One PEFT folder per component, for `PeftModel.from_pretrained(component, folder / component)`."""
    for component in sorted({key.split(".")[0] for key in tensors}):
        own = {k.removeprefix(component + "."): v for k, v in tensors.items() if k.startswith(component + ".")}
        if facts.get("classes", {}).get(component) != "CLIPTextModelWithProjection":
            own = {k.removeprefix("text_model."): v for k, v in own.items()}  # as transformers 5 names CLIP's modules
        names = sorted({key.removesuffix(".lora_A.weight") for key in own if key.endswith(".lora_A.weight")})
        config = LoraConfig(
            r=facts["rank"], lora_alpha=facts["rank"], target_modules=names, base_model_name_or_path=base_model
        )
        (folder / component).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / component)
        own = {f"base_model.model.{key}": tensor for key, tensor in own.items()}
        save_file(own, folder / component / "adapter_model.safetensors", {"format": "pt"})


def percent_of_t(t: float, scheduler) -> float:
    """ComfyUI's share of sampling at which the noise level of t is reached: 0 is pure noise, 1 is clean.

    Its percent_to_sigma takes sigma at t = 999 (1 - percent) of a discrete schedule, and shifts 1 - percent as the
    scheduler does for flow matching (comfy/model_sampling.py in https://github.com/comfyanonymous/ComfyUI).
    """
    if scheduler.config.get("prediction_type") is not None:
        return 1 - t / (tsm_lora.T - 1)
    sigma, shift = t / tsm_lora.T, scheduler.config.get("shift", 1.0)
    return 1 - sigma / (shift - (shift - 1) * sigma)


def keyframes(bounds: Sequence[int], scheduler) -> list[tuple[float, float]]:
    """(start_percent, end_percent) of each expert, from interval 0 to n - 1; together they cover 0..1 once."""
    # interval i holds t < bounds[i + 1], but a keyframe also counts at equality: stay a little below the boundary
    percents = [1.0] + [percent_of_t(bound - 1e-3, scheduler) for bound in bounds[1:-1]] + [0.0]
    return [(percents[i + 1], percents[i]) for i in range(len(bounds) - 1)]


def main(args: argparse.Namespace) -> None:
    files, out = tsm_lora.read_folder(args.experts), Path(args.output_dir)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --output_dir")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    base_model = args.pretrained_model_name_or_path or files[0][0]["base_model"]
    for facts, path in files:
        if args.format == "peft":
            write_peft(load_file(path), facts, partial / path.stem, base_model)
        else:
            with safe_open(path, "pt") as file:
                save_file(to_kohya(load_file(path)), partial / path.name, file.metadata())
    if args.format == "comfyui":
        config = DiffusionPipeline.load_config(base_model)
        library, name = config["scheduler"]
        scheduler = getattr(__import__(library), name).from_pretrained(base_model, subfolder="scheduler")
        table = [
            {"file": path.name, "timesteps": facts["timesteps"], "start_percent": start, "end_percent": end}
            for (facts, path), (start, end) in zip(files, keyframes(tsm_lora.bounds_of(files), scheduler))
        ]
        (partial / "keyframes.json").write_text(json.dumps(table, indent=1) + "\n")
        for row in reversed(table):  # in the order of sampling, from noise to clean
            print(f"{row['start_percent']:.4f} to {row['end_percent']:.4f}  {row['file']}")
    os.replace(partial, out)
    print(f"{len(files)} experts in {out}")


if __name__ == "__main__":
    main(parse_args())
