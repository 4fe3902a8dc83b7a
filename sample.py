"""Sample pictures with a base model or with timestep experts (TimeStep Master, arXiv:2503.07416).

    python sample.py --experts output/foster-n8/experts-n8 --prompt "a red circle and a blue square"
    python sample.py --prompts_file mini/prompts/validation.txt --output_dir output/base              # the base model
    # T2I-CompBench's protocol, a folder per category
    accelerate launch --multi_gpu sample.py --experts DIR --prompts_file color_val.txt --output_dir output/color \
        --num_images_per_prompt 10 --same_seeds --seed 42 --scheduler DDIMScheduler --num_inference_steps 30 \
        --guidance_scale 7.5 --mixed_precision fp16

    # a four-step student of distill_dmd2.py, and its rivals without training (Table 3)
    python sample.py --experts output/dmd2-n4/experts-n4 --prompts_file mini/prompts/validation.txt \
        --output_dir output/dmd2 --scheduler LCMScheduler --timesteps 999 749 499 249 --guidance_scale 0
    python sample.py --prompts_file mini/prompts/validation.txt --output_dir output/dpm4 --num_inference_steps 4 \
        --scheduler DPMSolverMultistepScheduler      # or UniPCMultistepScheduler; the teacher DDIMScheduler, --eta 1
    python sample.py --prompts_file mini/prompts/validation.txt --output_dir output/lcm --scheduler LCMScheduler \
        --num_inference_steps 4 --guidance_scale 0 --lora_weights pytorch_lora_weights.safetensors        # LCM-LoRA

In a program of your own, with any scheduler, in any stock pipeline that backbones.BACKBONES knows:

    from diffusers import StableDiffusionPipeline
    from tsm_lora import load_experts
    pipe = StableDiffusionPipeline.from_pretrained("mini/sd15")
    experts = load_experts(pipe, "output/foster-n8/experts-n8")
    image = pipe("a red circle and a blue square").images[0]

Writes output_dir/samples/<prompt>_<number>.png, the names that T2I-CompBench's tools read (number = prompt index *
images per prompt + image index), for video models samples/<number>.mp4, as EvalCrafter's tools read, and beside that
folder metadata.jsonl, args.json and grid.png. A second start of the same command makes only what is missing; several
processes share the work.
"""

import argparse
import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

import backbones
import data
import tsm_lora

HERE = Path(__file__).resolve().parent
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FREE_FLAGS = {"batch_size", "num_grid_images", "output_dir"}  # do not change a picture: a rerun may differ in them


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default=os.path.relpath(HERE / "mini/sd15"), help="folder or hub id")
    add("--revision", help="of the hub repository")
    add("--variant", help="of the weight files, such as fp16")
    add("--without_t5", action="store_true", help="SD3: leave out text_encoder_3")
    add("--experts", help="folder of fostered or assembled experts; the base model alone if not given")
    add("--scale", type=float, default=1.0, help="strength of the experts")
    add("--lora_weights", help="a stock LoRA below the experts, such as LCM-LoRA: file, folder or hub id")
    add("--any_base", action="store_true", help="accept experts that were trained on another base model")
    add("--mixed_precision", choices=DTYPES, default="no", help="precision of the weights; fp32 experts are folded")

    add = parser.add_argument_group("pictures").add_argument
    add("--prompt", nargs="+", help="one or more prompts")
    add("--prompts_file", help="text file, a prompt per line")
    add("--negative_prompt", help="for all prompts")
    add("--num_images_per_prompt", type=int, default=1)
    add("--seed", type=int, default=0, help="picture number k has seed + k")
    add("--same_seeds", action="store_true", help="each prompt's pictures have seed, seed + 1, ... (T2I-CompBench)")
    add("--scheduler", help="class name of a diffusers scheduler; the model's own if not given")
    add("--num_inference_steps", type=int, default=25)
    add("--timesteps", type=int, nargs="+", help="instead, as few-step students want them: 999 749 499 249")
    add("--guidance_scale", type=float, default=4.0)
    add("--eta", type=float, help="noise of DDIM; VideoCrafter2's own sampling has 1, which needs --batch_size 1")
    add("--resolution", type=int, help="pixels; the model's native one if not given")
    add("--height", type=int, help="instead of --resolution, such as VideoCrafter2's 320 by 512")
    add("--width", type=int)
    add("--num_frames", type=int, help="of a clip for video models; the model's own or 16 if not given")
    add("--fps", type=float, help="of clips, which VideoCrafter2 is told; its own or 8 if not given")
    add("--batch_size", type=int, default=16)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="output/samples")
    add("--num_grid_images", type=int, default=32, help="pictures on grid.png, the first ones")
    args = parser.parse_args(argv)
    if bool(args.prompt) == bool(args.prompts_file):
        parser.error("give prompts by --prompt or by --prompts_file, for example --prompt 'a red circle'")
    for flag in ("num_images_per_prompt", "num_inference_steps", "batch_size", "num_grid_images"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    return args


def read_prompts(path: str) -> list[str]:
    if not Path(path).is_file():
        raise ValueError(f"--prompts_file {path}: there is no such file")
    lines = Path(path).read_text(encoding="utf-8").splitlines()  # T2I-CompBench's files have CRLF
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path} holds no prompt")
    return prompts


def file_name(prompt: str, number: int, video: bool) -> str:
    """<prompt>_<six digits>.png; the prompt is cut to what a file system takes, metadata.jsonl has it whole. Clips are
    called <four digits>.mp4."""
    if video:
        return f"{number:04d}.mp4"
    readable = prompt.replace("/", " ").replace("_", " ").encode()[:200].decode(errors="ignore")
    return f"{readable}_{number:06d}.png"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def claim_output_dir(out: Path, args: argparse.Namespace, rows: list[dict]) -> None:
    """Write args.json and metadata.jsonl, or check that what is there comes from the same command."""
    settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    settings["prompts"] = digest(json.dumps(rows).encode())
    for flag in ("experts", "lora_weights"):
        if path := getattr(args, flag):  # of a LoRA perhaps a file, or a name on the hub
            files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.safetensors"))
            settings[f"{flag}_files"] = {os.path.relpath(p, path): digest(p.read_bytes()) for p in files}
    if (out / "args.json").exists():
        before = json.loads((out / "args.json").read_text())
        differ = {f"--{k}": (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        if differ:
            raise ValueError(f"{out} holds other pictures, with (their, your) {differ}; choose another --output_dir")
        return
    (out / "samples").mkdir(parents=True, exist_ok=True)
    metadata = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in (("metadata.jsonl", metadata), ("args.json", json.dumps(settings, indent=1) + "\n")):
        (out / f"{name}.partial").write_text(text)
        os.replace(out / f"{name}.partial", out / name)


def check_student(args: argparse.Namespace) -> None:
    """ValueError for timesteps that the student of distill_dmd2.py was not trained at, such as LCMScheduler's own 759
    and 259: of four experts they would get those of 999 and of 499, which have seen no other noise than their own."""
    router = Path(args.experts) / tsm_lora.ROUTER_FILE
    files = [router] if router.exists() else sorted(Path(args.experts).glob("*.safetensors"))
    facts = tsm_lora.read_facts(files[0], ()) if files else {}
    if not (known := facts.get("student_timesteps")):
        return
    if (args.scheduler, args.timesteps, args.guidance_scale) != ("LCMScheduler", known, 0):
        own = "the scheduler's own timesteps (LCM: 999 759 499 259)"
        given = f"--timesteps {args.timesteps}" if args.timesteps else own
        raise ValueError(
            f"{args.experts} is a student of t = {known}, without guidance; {given} with {args.scheduler} at "
            f"--guidance_scale {args.guidance_scale:g} would run experts at noise that they have never seen: add "
            f"--scheduler LCMScheduler --timesteps {' '.join(map(str, known))} --guidance_scale 0"
        )


def load(args: argparse.Namespace, device: torch.device):
    pipe = backbones.load_pipeline(
        args.pretrained_model_name_or_path,
        args.without_t5,
        revision=args.revision,
        variant=args.variant,
        dtype=DTYPES[args.mixed_precision],
    ).to(device)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blackens pictures, and scores are those of the model
    if args.scheduler:
        scheduler = getattr(diffusers, args.scheduler, None)
        fitting = list(pipe.scheduler.compatibles)  # which leaves out a scheduler that suits all diffusion models
        fitting += [diffusers.LCMScheduler] if hasattr(pipe.scheduler, "alphas_cumprod") else []
        if scheduler not in fitting:
            known = sorted(s.__name__ for s in fitting)
            raise ValueError(f"--scheduler {args.scheduler}: this model takes {known}")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if args.lora_weights:
        pipe.load_lora_weights(args.lora_weights, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(args: argparse.Namespace) -> None:
    state = PartialState(cpu=not torch.cuda.is_available())
    out, per_prompt = Path(args.output_dir), args.num_images_per_prompt
    prompts = args.prompt or read_prompts(args.prompts_file)
    video, rows = backbones.entry_of(args.pretrained_model_name_or_path, args.revision).video, []
    if not video and (args.num_frames or args.fps):
        raise ValueError(f"--num_frames and --fps are for video models, {args.pretrained_model_name_or_path} is none")
    if video and args.eta and args.batch_size != 1:
        raise ValueError("--eta above 0 draws noise for each clip by itself: add --batch_size 1")
    for number in range(len(prompts) * per_prompt):
        prompt, image_index = prompts[number // per_prompt], number % per_prompt
        seed = args.seed + (image_index if args.same_seeds else number)
        rows.append({"file_name": f"samples/{file_name(prompt, number, video)}", "text": prompt, "seed": seed})

    if args.experts:
        check_student(args)
    pipe = load(args, state.device)
    folded = nullcontext()
    if args.experts:
        experts = tsm_lora.load_experts(pipe, args.experts, args.scale, check_base=not args.any_base)
        folded = experts.folded() if args.mixed_precision == "no" else folded  # as fast as the base
    with state.main_process_first():
        if state.is_main_process:
            claim_output_dir(out, args, rows)

    missing = [row for row in rows if not (out / row["file_name"]).exists()]
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    steps = {"timesteps": args.timesteps} if args.timesteps else {"num_inference_steps": args.num_inference_steps}
    options = steps | {"guidance_scale": args.guidance_scale}
    if not (args.height and args.width):
        args.resolution = args.resolution or backbones.native_resolution(pipe)
    options |= {"height": args.height or args.resolution, "width": args.width or args.resolution}
    options |= {"eta": args.eta} if args.eta is not None else {}
    options |= backbones.backbone_of(pipe).sampling(pipe) | {"output_type": "pil"}
    if video:
        pipe.vae.enable_slicing()  # a frame at a time: all of a batch's would not fit
        options |= {"num_frames": args.num_frames} if args.num_frames else {}
        args.fps = pipe.unet.fps = args.fps or getattr(pipe.unet, "fps", 8)
    with folded, tqdm(total=len(mine), desc="samples", disable=not state.is_main_process) as progress:
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            images = pipe(
                [row["text"] for row in batch],
                generator=[torch.Generator().manual_seed(row["seed"]) for row in batch],
                **options,
                **({"negative_prompt": [args.negative_prompt] * len(batch)} if args.negative_prompt else {}),
            )[0]
            for row, image in zip(batch, images):
                partial = out / f"{Path(row['file_name']).name[-10:]}.partial"  # samples/ holds finished pictures only
                data.write_clip(image, partial, args.fps) if video else image.save(partial, "png")
                os.replace(partial, out / row["file_name"])
            progress.update(len(batch))
    state.wait_for_everyone()
    if state.is_main_process:
        paths = [out / row["file_name"] for row in rows[: args.num_grid_images]]
        shown = [data.film_strip(data.read_clip(path)) if video else Image.open(path) for path in paths]
        width, height = (side * max(1, 128 // shown[0].height) for side in shown[0].size)
        shown = [image.resize((width, height), Image.Resampling.NEAREST) for image in shown]
        columns = min(2 if video else 8, len(shown))
        shown += [Image.new("RGB", (width, height))] * (-len(shown) % columns)
        make_image_grid(shown, rows=len(shown) // columns, cols=columns).save(out / "grid.png")
        print(f"{len(rows)} samples in {out / 'samples'} ({len(rows) - len(missing)} were there), {out / 'grid.png'}")


if __name__ == "__main__":
    main(parse_args())
