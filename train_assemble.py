"""Assemble timestep LoRA experts: stage 2 of TimeStep Master (arXiv:2503.07416, Sec. 3.2, Eq. 5-7).

The core's expert of each timestep, plus the contexts' experts of the same timestep times gates
g(x, t) = W_r x + E[t]. Experts and base are frozen, only the routers train, on t drawn from all of T.

    # after `train_foster.py --num_intervals 8` and `train_foster.py --num_intervals 1`, all by default
    accelerate launch train_assemble.py
    # the paper's stage 2 on 8 GPUs: core 8, context 1, global batch 64, 4,000 steps
    accelerate launch --multi_gpu --num_processes 8 train_assemble.py --core_experts output/sd15/experts-n8 \
        --context_experts output/sd15-n1/experts-n1 --mixed_precision bf16 --train_data_dir my_images \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512 \
        --train_batch_size 8 --max_train_steps 4000 --learning_rate 1e-4

t grows with noise: interval 0 is the cleanest. Writes into --output_dir (default output/assemble)
    assembled/                            experts and router.safetensors, for sample.py and load_experts
    checkpoints/checkpoint-N              to go on from with --resume_from_checkpoint latest
    validation.json, loss.png             loss per interval: base, each set of experts alone, assembled
    gates.png                             mean gate of each layer at each timestep
    samples.png                           the same prompts and noise: base, core (or finest set), assembled
    args.json, logs/                      every setting with versions; the tracker's files
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object, send_to_device
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms import InterpolationMode
from tqdm.auto import tqdm

import backbones
import data
import tsm_lora

HERE = Path(__file__).resolve().parent
VALIDATION_BATCH = 32
LOGGING_STEPS = 10  # reading the loss synchronises the device
# Flags that do not change what is trained: a run may be continued with other values of these.
FREE_FLAGS = {
    *("resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "output_dir"),
    *("report_to", "logging_dir", "dataloader_num_workers", "validation_prompts", "num_inference_steps"),
    *("validation_steps", "guidance_scale", "train_batch_size", "gradient_accumulation_steps"),  # global_batch counts
    *("push_to_hub", "hub_model_id", "hub_token"),  # and a token is written nowhere
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("tsm").add_argument
    add("--core_experts", default="output/foster-n8/experts-n8", help="folder of fostered experts; not gated")
    add("--context_experts", nargs="+", default=["output/foster-n1/experts-n1"], help="one or more folders, gated")
    add("--symmetric", action="store_true", help="gate the core's scale too; the finest one starts at gate 1")
    add("--router_inputs", default="both", choices=["both", "feature", "timestep"], help="of the gates (Table 7)")
    add("--moe_experts", type=int, help="instead: MoE LoRA of so many fresh experts that serve all t (appendix C.2)")
    add("--top_k", type=int, default=2, help="of MoE LoRA")
    add("--balance_loss_weight", type=float, default=0.01, help="of MoE LoRA")
    add("--rank", type=int, default=4, help="of MoE LoRA, as the three that follow")
    add("--lora_alpha", type=float, help="scale of the addition is alpha / rank; the rank if not given")
    add("--lora_layers", help="comma-separated names in the denoiser; the paper's for this backbone if not given")
    add("--train_text_encoder", action="store_true", help="experts on the text encoder too, as in the paper")
    add_training_flags(parser)
    parser.set_defaults(max_train_steps=1000, learning_rate=1e-3)  # suit the mini model
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or "output/assemble"
    check_args(args)
    moe_only = ("rank", "lora_alpha", "lora_layers", "train_text_encoder", "top_k", "balance_loss_weight")
    tsm_only = ("core_experts", "context_experts", "symmetric", "router_inputs")
    foreign, word = (moe_only, "without") if args.moe_experts is None else (tsm_only, "with")
    if idle := [f"--{flag}" for flag in foreign if getattr(args, flag) != parser.get_default(flag)]:
        raise ValueError(f"{', '.join(idle)} has no effect {word} --moe_experts: drop it")
    if args.symmetric and args.router_inputs == "feature":
        raise ValueError(
            "--symmetric starts at E = 1: its routers need the timestep, --router_inputs both or timestep"
        )
    if args.moe_experts is not None:
        if not 1 <= args.top_k <= args.moe_experts:
            raise ValueError(f"--top_k must lie in 1..{args.moe_experts}, the number of --moe_experts")
        if args.cache_text_embeddings and args.train_text_encoder:
            raise ValueError("--cache_text_embeddings needs frozen text encoders: drop it or --train_text_encoder")
        args.interval_bounds = tsm_lora.interval_bounds(8)  # of the table of validation losses
        return args
    for folder in (args.core_experts, *args.context_experts):
        if not Path(folder).is_dir():
            raise ValueError(
                f"there is no folder {folder}. Train the experts first, as in `accelerate launch train_foster.py "
                "--num_intervals 8` (the core) and `... --num_intervals 1` (a context), then name their folders by "
                "--core_experts and --context_experts"
            )
    if args.cache_text_embeddings and len(tsm_lora.read_folder(args.core_experts)[0][0]["targets"]) > 1:
        raise ValueError("--cache_text_embeddings: these experts adapt text encoders too, so their output follows t")
    args.interval_bounds = max((tsm_lora.bounds_of(tsm_lora.read_folder(f)) for _, f, _ in banks(args)), key=len)
    return args


# >>> the same lines in train_foster.py and train_assemble.py
def add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default=os.path.relpath(HERE / "mini/sd15"), help="folder or hub id")
    add("--revision", help="of the hub repository")
    add("--variant", help="of the weight files, such as fp16")
    add("--without_t5", action="store_true", help="SD3: leave out text_encoder_3, which is frozen in any case")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="pictures or clips with metadata, shards or .parquet; the mini world if not given")
    add("--dataset_name", help="hub id of a data set, instead of --train_data_dir")
    add("--dataset_config_name", help="of the hub data set")
    add("--validation_data_dir", help="the same kinds, for the loss per interval; a held-out part if not given")
    add("--streaming", action="store_true", help="read shards in turn, for data that fits neither memory nor disk")
    add("--corrupt_records", default="stop", choices=["stop", "skip"], help="of streamed data")
    add("--image_column", default="image")
    add("--video_column", default="video", help="of clips; the names of files in a table such as OpenVid-1M's")
    add("--caption_column", default="text")
    add("--reward_column", help="weight of each sample's loss, as in GORS")
    add("--max_train_samples", type=int, help="use the first so many pictures")
    add("--max_validation_samples", type=int, default=256)
    add("--resolution", type=int, help="pixels; the model's native one if not given")
    add("--height", type=int, help="instead of --resolution, such as VideoCrafter2's 320 by 512")
    add("--width", type=int)
    add("--max_num_frames", type=int, help="of a clip for video models; the model's own or 16 if not given")
    add("--frame_stride", type=int, default=1, help="take every so many frames of a clip")
    add("--fps", type=float, help="instead: take so many frames per second; VideoCrafter2 is told")
    add("--center_crop", action="store_true", help="and the middle of a clip; else a random crop, and a random part")
    add("--random_flip", action="store_true", help="spoils captions that say left or right")
    add("--image_interpolation_mode", default="lanczos", choices=[m.value for m in InterpolationMode])
    add("--proportion_empty_prompts", type=float, default=0.0, help="captions dropped (paper: not specified)")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0)
    add("--max_train_steps", type=int, default=125, help="optimiser steps (paper: 4000), in fostering per expert")
    add("--train_batch_size", type=int, default=32, help="per process (paper: 64 in all)")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, default=1e-2, help="the default suits the mini model (paper: 1e-4)")
    add("--text_encoder_lr", type=float, help="--learning_rate if not given")
    add("--lr_scheduler", default="constant", help="a name that diffusers.optimization.get_scheduler knows")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_weight_decay_text_encoder", type=float, help="--adam_weight_decay if not given")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--snr_gamma", type=float, help="of diffusion models: min-SNR weights of the loss; 5.0 is usual")
    add("--weighting_scheme", default="none", choices=backbones.SCHEMES, help="of flow models, as in diffusers")
    add("--logit_mean", type=float, default=0.0, help="of logit_normal; above 0 is cleaner")
    add("--logit_std", type=float, default=1.0, help="of logit_normal")
    add("--mode_scale", type=float, default=1.29, help="of mode")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="accelerate's setting if not given")
    add("--gradient_checkpointing", action="store_true")
    add("--cache_latents", action="store_true", help="encode each picture once, into a file mapped into memory")
    add("--cache_text_embeddings", action="store_true", help="and each caption; then free the frozen text encoders")
    add("--load_in_4bit", action="store_true", help="the frozen base's Linear weights as nf4; needs bitsandbytes")
    add("--compile", action="store_true", help="torch.compile of the denoiser's repeated blocks")
    add("--channels_last", action="store_true", help="memory layout of the denoiser; helps convolutions on a GPU")
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes; tensors below 4096 elements stay fp32")
    add("--allow_tf32", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)

    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--output_dir", help="output/foster-n<num_intervals> or output/assemble if not given")
    add("--logging_dir", default="logs", help="below --output_dir")
    add("--report_to", help="tensorboard, wandb, ..., all or none; tensorboard if installed and nothing is given")
    add("--validation_steps", type=int, help="also measure the interval's validation loss every so many steps")
    add("--validation_prompts", nargs="+", help="of samples.png; captions of the validation part if not given")
    add("--num_inference_steps", type=int, default=25, help="of samples.png")
    add("--guidance_scale", type=float, default=4.0, help="of samples.png")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, help="kept per expert")
    add("--resume_from_checkpoint", help="latest, or the path of a checkpoint; finished experts are skipped")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="the experts with a model card")
    add("--hub_model_id", help="the name of --output_dir if not given")
    add("--hub_token", help="the stored one if not given")


def check_args(args: argparse.Namespace) -> None:
    """Resolve the defaults that depend on others; ValueError for flags that cannot work."""
    counts = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps")
    counts += ("max_train_samples", "checkpoints_total_limit", "validation_steps", "max_grad_norm")
    counts += ("max_num_frames", "frame_stride", "height", "width")
    for flag in (*counts, "max_validation_samples"):
        least = {"max_validation_samples": 2, "max_grad_norm": 1e-12}.get(flag, 1)
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    if args.fps is not None and (args.fps <= 0 or args.frame_stride != 1):
        raise ValueError("--fps must be positive, and stands instead of --frame_stride: give one")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError(f"--proportion_empty_prompts must lie in 0..1, got {args.proportion_empty_prompts}")
    if args.streaming and args.cache_latents:
        raise ValueError("--cache_latents needs the whole data set at hand, which --streaming never has: drop one")
    if args.streaming and args.cache_text_embeddings:
        raise ValueError("--cache_text_embeddings needs all captions at hand, which --streaming never has: drop one")
    if args.dataset_name and args.train_data_dir:
        raise ValueError("--dataset_name and --train_data_dir name two data sets: give one")
    args.video = False  # until the model is known
    if args.report_to is None:
        args.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss


class Trainee(torch.nn.Module):
    """Denoiser and text encoders under one forward, for autocast and for one exchange of gradients."""

    def __init__(self, experts: tsm_lora.Experts):
        super().__init__()
        self.components = torch.nn.ModuleDict({name: experts.components[name] for name in experts.targets})
        self.experts = experts

    def forward(self, xt: torch.Tensor, t: torch.Tensor, captions: list[str], conditions=None) -> torch.Tensor:
        return self.experts.predict(xt, t, captions, conditions)


def sample_losses(model, experts, process, batch: dict, low: int, high: int):
    """Diffusion loss of each sample, Eq. 1 with t drawn from the interval [low, high) (Eq. 4): (B,)."""
    vae = experts.pipe.vae
    batch = send_to_device(batch, vae.device, non_blocking=True)
    x0 = data.latents(vae, batch)  # (B, c, h, w)
    t = process.draw_t(batch["u"], low, high)  # (B,)
    xt, target = process.diffuse(x0, batch["noise"], t)
    pred = model(xt, t, batch["caption"], batch.get("conditions"))
    loss = F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(1)  # (B,)
    return loss * process.loss_weights(t) * batch["weight"]


def weighting(args: argparse.Namespace) -> backbones.Weighting:
    return backbones.Weighting(args.snr_gamma, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)


def validation_batch(args: argparse.Namespace) -> int:
    return args.train_batch_size if args.video else VALIDATION_BATCH  # clips are large


@torch.no_grad()
def validation_losses(
    model, experts, rows: Dataset, args, interval: int, accelerator, cache: data.Cache | None = None
) -> torch.Tensor:
    """Loss of each validation picture at one fixed t and noise of the interval, whatever the run's seed and weighting
    of t: (N,)."""
    low, high = args.interval_bounds[interval : interval + 2]
    process = experts.backbone.process(experts.pipe)
    model = accelerator.unwrap_model(model)  # processes may have unequal numbers of batches
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    size = validation_batch(args)
    starts = range(0, len(mine), size)
    keys = [[(k, "validation", interval, k) for k in mine[start : start + size]] for start in starts]
    losses = torch.zeros(len(rows), device=accelerator.device)
    dataset = data.Pictures(rows, args, data.latent_shape(experts.pipe, args), augment=False, cache=cache)
    for chunk, batch in zip(keys, data.loader(dataset, keys, args)):
        losses[[k for k, *_ in chunk]] = sample_losses(model, experts, process, batch, low, high)
    return accelerator.reduce(losses, "sum").cpu()


def on_cpu() -> bool:
    """Several CPU processes find each other only if Accelerator is told that it runs on the CPU."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace every Linear by one with nf4 weights that computes in `dtype`; but for T5's `wo`, to whose type T5 casts
    its hidden states."""
    import bitsandbytes  # slow to import

    linears = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear and not n.endswith(".wo")]
    for name, linear in linears:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        quantized = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        quantized.bias = linear.bias
        model.set_submodule(name, quantized.to(linear.weight.device))


def is_video(args: argparse.Namespace) -> bool:
    """Whether the model makes clips; ValueError for a name that cannot be one, and for clips' flags of another."""
    name = args.pretrained_model_name_or_path
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"--pretrained_model_name_or_path {name}: neither a folder nor a hub id of the form owner/name"
        )
    video = backbones.entry_of(name, args.revision).video
    if not video and (args.max_num_frames or args.fps or args.frame_stride != 1):
        raise ValueError(f"--max_num_frames, --frame_stride and --fps are for video models, {name} makes pictures")
    return video


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator):
    """The base model, frozen, in the training precision (the VAE in fp32), and the resolution it works at."""
    name = args.pretrained_model_name_or_path
    args.video = is_video(args)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = backbones.load_pipeline(
        name,
        args.without_t5,
        revision=args.revision,
        variant=args.variant,
        dtype={"default": dtype, "vae": torch.float32},
    ).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    backbone = backbones.backbone_of(pipe)
    denoiser = getattr(pipe, backbone.denoiser)
    backbone.process(pipe, weighting(args))  # raises where the flags are for another kind of model
    if not (args.height and args.width):
        args.resolution = args.resolution or backbones.native_resolution(pipe)
    if any(side % (multiple := backbones.resolution_multiple(pipe)) for side in data.size_of(args)):
        raise ValueError(f"{data.size_of(args)} pixels: height and width must be multiples of this model's {multiple}")
    if args.train_text_encoder and not backbone.text_encoders:
        raise ValueError(
            f"--train_text_encoder: there are no experts for the text encoders of a {type(pipe).__name__}"
        )
    if args.video:
        if args.compile or args.channels_last:
            raise ValueError("--compile and --channels_last are not for video models: drop them")
        pipe.vae.enable_slicing()  # a frame at a time: all of a batch's would not fit
        args.max_num_frames = args.max_num_frames or denoiser.config.get("num_frames", 16)
        denoiser.fps = args.fps or getattr(denoiser, "fps", None)
    if args.load_in_4bit:
        for model in (denoiser, *backbones.text_encoders(pipe).values()):
            quantize(model, dtype)
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if args.compile:
        blocks = denoiser._repeated_blocks or [type(denoiser.transformer_blocks[0]).__name__]
        denoiser._repeated_blocks = blocks  # diffusers 0.42 does not name those of PixArt and SD3
        denoiser.compile_repeated_blocks()
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blackens pictures of validation
    return pipe


# <<<


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run


def banks(args: argparse.Namespace) -> list[tuple[str, Path, bool]]:
    """Name, folder and gatedness of each set of experts, the core first."""
    folders = [(Path(args.core_experts), args.symmetric)] + [(Path(folder), True) for folder in args.context_experts]
    names = (f"n{tsm_lora.read_folder(folder)[0][0]['num_intervals']}" for folder, _ in folders)
    return [
        (f"{k}-{'context' if gated else 'core'}-{name}", folder, gated)
        for k, (name, (folder, gated)) in enumerate(zip(names, folders))
    ]


def assemble_sets(pipe, sets: list[tuple[str, Path, bool]], args: argparse.Namespace) -> tsm_lora.Experts:
    """The experts of sets as `banks` lists them, with fresh routers, attached; raises where they do not fit."""
    core = next((folder for _, folder, gated in sets if not gated), None)
    return tsm_lora.assemble_experts(pipe, core, [folder for _, folder, gated in sets if gated], args.router_inputs)


def assembled_dir(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / "assembled"


def claim_output_dir(pipe, args: argparse.Namespace) -> None:
    """Write args.json and copies of the experts, or check them against an earlier run's: nothing is overwritten."""
    known = checkpoints(Path(args.output_dir) / "checkpoints")
    if known or (assembled_dir(args) / tsm_lora.ROUTER_FILE).exists():
        check_same_run(args)
        if not args.resume_from_checkpoint:
            raise ValueError(
                f"{args.output_dir} holds this run already; add --resume_from_checkpoint latest to go on, or choose "
                "another --output_dir"
            )
        if args.resume_from_checkpoint != "latest" and not named_checkpoint(
            args, known[0].parent if known else Path()
        ):
            known = [str(p) for p in known]
            raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: this run has {known}")
        return
    own, sets = assembled_dir(args).resolve(), banks(args) if args.moe_experts is None else []
    if any(folder.resolve().is_relative_to(own) for _, folder, _ in sets):
        raise ValueError(
            f"--core_experts or --context_experts lie in {own}, which this run writes; choose another --output_dir"
        )
    if own.exists() and not (Path(args.output_dir) / "args.json").exists():
        raise ValueError(f"{own} exists and is not of this script; choose another --output_dir")
    if sets:  # refuse what does not fit before anything is written or cached
        assemble_sets(pipe, sets, args).unload()
    write_args(args)
    shutil.rmtree(own, ignore_errors=True)  # of a run that was stopped before its first checkpoint
    for name, folder, _ in sets:
        (own / name).mkdir(parents=True)
        for _, path in tsm_lora.read_folder(folder):
            shutil.copyfile(path, own / name / path.name)


def save_assembled(experts, folder: Path, args: argparse.Namespace, step: int) -> None:
    """The routers, beside the copies of their experts; of MoE LoRA the experts too."""
    facts = {"steps": step, "seed": args.seed, "base_revision": args.revision}
    if args.moe_experts is None:
        names = [name for name, _, _ in banks(args)]
    else:
        names = [f"{k}-context-n1" for k in range(args.moe_experts)]
        for k, name in enumerate(names):
            experts.save_expert(0, folder / name / "interval-000.safetensors", bank=k, **facts)
    experts.save_router(folder / tsm_lora.ROUTER_FILE, names, **facts)


# >>> the same lines in train_foster.py and train_assemble.py
def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def run_settings(args: argparse.Namespace) -> dict:
    def whole(value):
        if isinstance(value, list):
            return [whole(v) for v in value]
        return os.path.abspath(value) if isinstance(value, str) and os.path.isdir(value) else value

    return {k: whole(v) for k, v in vars(args).items() if k not in FREE_FLAGS}


def write_args(args: argparse.Namespace) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    versions["python"] = platform.python_version()
    write_json(Path(args.output_dir) / "args.json", {"args": run_settings(args), "versions": versions})


def check_same_run(args: argparse.Namespace) -> None:
    """ValueError where --output_dir was begun with other settings."""
    path, settings = Path(args.output_dir) / "args.json", run_settings(args)
    before = json.loads(path.read_text())["args"] if path.exists() else {}
    differ = {f"--{k}": (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
    if differ:
        raise ValueError(
            f"{args.output_dir} holds another run, with (its, your) {differ}; choose another --output_dir"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p.parent for p in folder.glob("checkpoint-*/state.pt") if p.parent.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


@contextmanager
def new_checkpoint(folder: Path, state: dict, limit: int | None):
    """Trainable state only, and what the caller writes into the folder that it is given; complete under its own name
    at the end, then the oldest beyond the limit go."""
    path = folder / f"checkpoint-{state['step']}"
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    torch.save(state, partial / "state.pt")
    if path.exists():
        (path / "state.pt").unlink(missing_ok=True)  # from here on it does not count as a checkpoint
        shutil.rmtree(path)
    os.replace(partial, path)
    for old in checkpoints(folder)[:-limit] if limit else []:
        shutil.rmtree(old)


def checkpoint_to_resume(args: argparse.Namespace, folder: Path) -> Path | None:
    """`latest` or what --resume_from_checkpoint names: a path, or as in diffusers a name such as checkpoint-500. What
    has no checkpoint of that name goes on from its latest."""
    own = checkpoints(folder)
    if args.resume_from_checkpoint is None or not own:
        return None
    return own[-1] if (named := named_checkpoint(args, folder)) is None else named


def named_checkpoint(args: argparse.Namespace, folder: Path) -> Path | None:
    name = Path(str(args.resume_from_checkpoint))
    fitting = (p for p in checkpoints(folder) if p in (name, args.output_dir / name) or p.name == str(name))
    return next(fitting, None)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(experts: tsm_lora.Experts, args: argparse.Namespace) -> torch.optim.Optimizer:
    denoiser = experts.parameters(experts.backbone.denoiser)
    encoders = experts.parameters()[len(denoiser) :]
    groups = [{"params": [p for p in parameters if p.requires_grad]} for parameters in (denoiser, encoders)]
    if args.text_encoder_lr is not None:
        groups[1]["lr"] = args.text_encoder_lr
    if args.adam_weight_decay_text_encoder is not None:
        groups[1]["weight_decay"] = args.adam_weight_decay_text_encoder
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW  # slow to import
    else:
        AdamW = partial(torch.optim.AdamW, fused=True)
    return AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def training_state(experts, optimizer, lr_scheduler, scaler, step: int, positions: list) -> dict:
    """`positions` are those of streamed data, one per process."""
    state = {"step": step, "positions": positions}
    state |= {"experts": experts.state_dict(), "optimizer": optimizer.state_dict()}
    return state | {"lr_scheduler": lr_scheduler.state_dict(), "scaler": scaler.state_dict() if scaler else {}}


def load_training_state(state: dict, experts, optimizer, lr_scheduler, scaler) -> None:
    experts.load_state_dict(state["experts"])
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"] or torch.amp.GradScaler().state_dict())


# <<<


def attach(pipe, args: argparse.Namespace) -> tsm_lora.Experts:
    if args.moe_experts is not None:
        return tsm_lora.attach_moe(
            pipe,
            args.moe_experts,
            args.top_k,
            rank=args.rank,
            alpha=args.lora_alpha,
            lora_layers=args.lora_layers and [name.strip() for name in args.lora_layers.split(",")],
            train_text_encoder=args.train_text_encoder,
            generator=data.rng(args.seed, "router", "A"),
        )
    copies = [(name, assembled_dir(args) / name, gated) for name, _, gated in banks(args)]
    return assemble_sets(pipe, copies, args)


def assemble(pipe, train, validation, caches, args: argparse.Namespace, accelerator) -> None:
    """Train the routers from scratch (or from the last checkpoint) and write their file."""
    experts = attach(pipe, args)
    if args.gradient_checkpointing:
        experts.enable_gradient_checkpointing()
    optimizer = make_optimizer(experts, args)
    lr_scheduler = get_scheduler(  # not prepared: a function of the optimiser step alone, on any number of processes
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(Trainee(experts), optimizer)
    step, position = 0, None
    if (checkpoint := checkpoint_to_resume(args, Path(args.output_dir) / "checkpoints")) is not None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        load_training_state(state, experts, optimizer, lr_scheduler, accelerator.scaler)
        step = state["step"]
        position = state["positions"][accelerator.process_index] if args.streaming else None
        accelerator.print(f"routers go on from {checkpoint}")

    low, high = 0, tsm_lora.T
    process = experts.backbone.process(pipe, weighting(args))
    dataset = data.Pictures(train, args, data.latent_shape(pipe, args), augment=True, cache=caches["train"])
    batches = data.training_loader(dataset, args, "router", step, accelerator, position)
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="routers", disable=not accelerator.is_local_main_process
    )
    losses, parameters = [], [p for p in experts.parameters() if p.requires_grad]
    for batch in islice(batches, (args.max_train_steps - step) * args.gradient_accumulation_steps):
        position = batch.pop("position", None)
        with accelerator.accumulate(model):
            loss = sample_losses(model, experts, process, batch, low, high).mean()
            losses.append(loss.detach())
            if args.moe_experts is not None:
                loss = loss + args.balance_loss_weight * experts.balance_loss()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        progress.update()
        if step % LOGGING_STEPS == 0 or step == args.max_train_steps:
            loss, lr = accelerator.reduce(torch.stack(losses).mean(), "mean").item(), lr_scheduler.get_last_lr()[0]
            losses.clear()
            progress.set_postfix(loss=f"{loss:.4f}", lr=lr)
            accelerator.log({"loss": loss, "lr": lr, "grad_norm": grad_norm.item()}, step=step)
        if step % args.checkpointing_steps == 0:
            positions = gather_object([position]) if args.streaming else []
            if accelerator.is_main_process:
                state = training_state(experts, optimizer, lr_scheduler, accelerator.scaler, step, positions)
                with new_checkpoint(Path(args.output_dir) / "checkpoints", state, args.checkpoints_total_limit):
                    pass  # what can be sampled comes at the end, beside its experts
        if args.validation_steps and step % args.validation_steps == 0 and len(validation):
            by_interval = [
                validation_losses(model, experts, validation, args, i, accelerator, caches["validation"]).mean()
                for i in range(len(args.interval_bounds) - 1)
            ]
            scalars = {f"validation/interval-{i:03d}": loss.item() for i, loss in enumerate(by_interval)}
            accelerator.log(scalars, step=step)
    progress.close()
    if accelerator.is_main_process:
        save_assembled(experts, assembled_dir(args), args, args.max_train_steps)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    experts.unload()


def validate(pipe, validation, args: argparse.Namespace, accelerator) -> dict[str, torch.Tensor]:
    """Losses (n intervals, N pictures) of the base, of each set of experts alone, and of all assembled."""
    sets = {"base": assembled_dir(args)}
    sets |= {name: assembled_dir(args) / name for name, _, _ in banks(args)} if args.moe_experts is None else {}
    losses = {}
    for name, folder in (sets | {"assembled": assembled_dir(args)}).items():
        experts = tsm_lora.load_experts(pipe, folder)
        model, intervals = Trainee(experts), range(len(args.interval_bounds) - 1)
        with accelerator.autocast(), experts.off() if name == "base" else nullcontext():
            rows = [validation_losses(model, experts, validation, args, i, accelerator) for i in intervals]
        losses[name] = torch.stack(rows)
        experts.unload()
    return losses


@torch.no_grad()
def mean_gates(pipe, validation, args: argparse.Namespace, timesteps: list[int]) -> tuple[torch.Tensor, dict]:
    """Mean gate of each layer at each t over validation pictures, (m contexts, layers, timesteps), and the mean
    absolute value of the two terms E[t] and W_r x."""
    experts = tsm_lora.load_experts(pipe, assembled_dir(args))
    rows = validation.take(min(validation_batch(args), len(validation)))
    pictures = data.Pictures(rows, args, data.latent_shape(pipe, args), augment=False)
    (batch,) = data.loader(pictures, [[(k, "gates", k) for k in range(len(rows))]], args)
    x0 = data.latents(pipe.vae, {k: v.to(pipe.vae.device) for k, v in batch.items() if torch.is_tensor(v)})
    noise, process = batch["noise"].to(x0.device), experts.backbone.process(pipe)
    layers = list(experts.layers.values())
    means = torch.zeros(len(timesteps), len(layers), sum(bank.gated for bank in experts.routing.banks))
    sizes: dict[str, list[float]] = {"E": [], "W_r x": []}

    def watch(layer, k, j, gates):  # (..., m)
        means[j, k] = gates.float().reshape(-1, gates.shape[-1]).mean(0).cpu()
        bias = torch.zeros(1) if layer.E is None else layer.E[timesteps[j]].float()
        sizes["E"].append(bias.abs().mean().item())
        sizes["W_r x"].append((gates.float() - bias.to(gates.device)).abs().mean().item())

    dtype = next(experts.components[experts.backbone.denoiser].parameters()).dtype
    for j, t in enumerate(timesteps):
        for k, layer in enumerate(layers):
            layer.watch = partial(watch, layer, k, j)
        t = torch.full((len(rows),), t, device=x0.device)
        xt, _ = process.diffuse(x0, noise, t)
        experts.predict(xt.to(dtype), t, batch["caption"])
    experts.unload()
    return means.permute(2, 1, 0), {name: sum(values) / len(values) for name, values in sizes.items()}


def report(pipe, losses: dict[str, torch.Tensor], validation: Dataset, origin: str, args: argparse.Namespace) -> None:
    """Tables and pictures of losses and gates, the model card, and pictures of base, core and assembled experts."""
    out, bounds = Path(args.output_dir), args.interval_bounds
    before = "base"  # what stage 2 starts from: the core, or the finest scale
    if args.moe_experts is None:
        before = next((name for name, _, gated in banks(args) if not gated), None)
        before = before or max((name for name, _, _ in banks(args)), key=lambda name: int(name.split("-n")[1]))
    records = []
    for i in range(len(bounds) - 1):
        gain = losses[before][i] - losses["assembled"][i]
        records.append({"interval": i, "timesteps": [bounds[i], bounds[i + 1] - 1], "pictures": len(gain)})
        records[i] |= {"loss": {name: loss[i].mean().item() for name, loss in losses.items()}}
        records[i] |= {"gain": gain.mean().item(), "standard_error": (gain.std() / len(gain) ** 0.5).item()}
    timesteps = list(range(10, tsm_lora.T, 20))
    gates, sizes = mean_gates(pipe, validation, args, timesteps)
    sizes = sizes if args.moe_experts is None else None  # its gates are shares
    write_json(out / "validation.json", {"pictures_from": origin, "gates": sizes, "intervals": records})
    table = [f"| interval | timesteps | {' | '.join(losses)} | gain over {before} ± standard error |"]
    table += ["|---" * (len(losses) + 3) + "|"]
    for r in records:
        cells = " | ".join(f"{loss:.4f}" for loss in r["loss"].values())
        timesteps_of, gain = "{}..{}".format(*r["timesteps"]), f"{r['gain']:+.5f} ± {r['standard_error']:.5f}"
        table.append(f"| {r['interval']} | {timesteps_of} | {cells} | {gain} |")
    print("\n".join([f"\nvalidation loss on {origin}, fixed noise; t grows with noise", *table]))
    if sizes is not None:
        print(f"mean |E[t]| {sizes['E']:.4f}, mean |W_r x| {sizes['W_r x']:.4f}")
    plot_losses(records, out / "loss.png")
    plot_gates(gates, timesteps, out / "gates.png")
    write_card("\n".join(table), origin, args)
    prompts = args.validation_prompts or [row[args.caption_column] for row in islice(validation, 8)]
    images, rows = draw(pipe, prompts, args), ["base"]
    folders = {} if before == "base" else {before: assembled_dir(args) / before}
    for name, folder in (folders | {"assembled": assembled_dir(args)}).items():
        experts = tsm_lora.load_experts(pipe, folder)
        images += draw(pipe, prompts, args)
        rows.append(name)
        experts.unload()
    make_image_grid(images, rows=len(rows), cols=len(prompts)).save(out / "samples.png")
    print(f"\n{out / 'samples.png'}, from above: {', '.join(rows)}")
    for k, prompt in enumerate(prompts):
        print(f"  column {k + 1}: {prompt}")


def plot_losses(records: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    middle = [sum(r["timesteps"]) / 2 for r in records]
    for name in records[0]["loss"]:
        axes.plot(middle, [r["loss"][name] for r in records], "o-", label=name, markersize=3)
    axes.set(xlabel="timestep t (grows with noise)", ylabel="validation loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_gates(gates: torch.Tensor, timesteps: list[int], path: Path) -> None:
    """A panel per context, layers from input (top) to output by timesteps."""
    figure = Figure(figsize=(4.5 * len(gates), 4), layout="constrained")
    limit = gates.abs().max().item()
    panels = figure.subplots(1, len(gates), squeeze=False)[0]
    for j, (axes, of_context) in enumerate(zip(panels, gates)):
        extent = (timesteps[0] - 10, timesteps[-1] + 10, len(of_context), 0)
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        image = axes.imshow(of_context, aspect="auto", extent=extent, **options)
        axes.set(title=f"context {j + 1}", xlabel="timestep t (grows with noise)", ylabel="adapted layer")
    figure.colorbar(image, ax=panels, label="mean gate")
    figure.savefig(path, dpi=120)


def write_card(table: str, origin: str, args: argparse.Namespace) -> None:
    """README.md beside the experts, the model card of a hub repository."""
    what = (
        "the core's expert of its t plus the contexts' experts of that t times g(x, t) = W_r x + E[t]"
        if args.moe_experts is None
        else f"{args.moe_experts} experts mixed by a softmax over the {args.top_k} largest gates of the layer's input"
    )
    (assembled_dir(args) / "README.md").write_text(
        f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
tags: [text-to-image, lora, timestep-experts]
---
# Assembled timestep LoRA experts

LoRA experts for `{args.pretrained_model_name_or_path}` and their routers. t grows with noise: interval 0 is the
cleanest. `tsm_lora.load_experts(pipe, folder)` runs, at each step, {what}.

Validation loss on {origin}:

{table}

```json
{json.dumps({k: v for k, v in vars(args).items() if k not in FREE_FLAGS}, indent=1)}
```
"""
    )


# >>> the same lines in train_foster.py and train_assemble.py
def draw(pipe, prompts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """A picture (or film strip) per prompt, each from its own noise, at least 128 pixels wide."""
    # the stock pipelines decode in the denoiser's precision
    backbone = backbones.backbone_of(pipe)
    pipe.vae.to(getattr(pipe, backbone.denoiser).dtype)
    options = backbone.sampling(pipe) | ({"num_frames": args.max_num_frames} if args.video else {})
    height, width = data.size_of(args)
    images = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(k) for k in range(len(prompts))],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=height,
        width=width,
        output_type="pil",
        **options,
    )[0]
    larger = -(-128 // width)
    images = [data.film_strip(clip) for clip in images] if args.video else images
    return [image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST) for image in images]


def push_to_hub(folder: Path, args: argparse.Namespace) -> None:
    api = HfApi(token=args.hub_token)
    repo_id = api.create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="timestep LoRA experts")
    print(f"pushed to {repo_id}")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
    )
    if on_cpu() and accelerator.num_processes == 1 and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        torch.set_num_threads(min(8, os.cpu_count()))  # `accelerate launch` allows one
    args.mixed_precision = accelerator.mixed_precision  # perhaps accelerate's own setting
    args.global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    diffusers.utils.logging.set_verbosity_error()  # pipelines speak of each truncated caption
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


# <<<


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    args.video = is_video(args)
    with accelerator.main_process_first():
        train, validation, origin = data.split_rows(args)
    pipe = load_pipeline(args, accelerator)
    if accelerator.is_main_process:
        claim_output_dir(pipe, args)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("train_assemble", {k: str(v) for k, v in vars(args).items() if k != "hub_token"})
    if args.moe_experts is None:
        accelerator.print("routers over " + ", ".join(f"{name[2:]} ({folder})" for name, folder, _ in banks(args)))
    else:
        accelerator.print(f"MoE LoRA: {args.moe_experts} experts of rank {args.rank}, top {args.top_k}")
    accelerator.print(f"{'a stream of' if args.streaming else len(train)} samples, validation on {origin}")
    seen = args.global_batch * args.max_train_steps
    accelerator.print(f"{args.max_train_steps} steps of {args.global_batch} or {seen} samples")
    caches = data.build_caches(pipe, train, validation, args, accelerator)
    finished = (assembled_dir(args) / tsm_lora.ROUTER_FILE).exists()
    if finished and named_checkpoint(args, Path(args.output_dir) / "checkpoints") is None:
        accelerator.print("the routers are finished, skipping them")
    else:
        assemble(pipe, train, validation, caches, args, accelerator)
    if args.cache_text_embeddings:
        del pipe  # the memory of one model at a time
        pipe = load_pipeline(args, accelerator)
    losses = validate(pipe, validation, args, accelerator)
    if accelerator.is_main_process:
        report(pipe, losses, validation, origin, args)
        if args.push_to_hub:
            push_to_hub(assembled_dir(args), args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
