"""Foster timestep LoRA experts: stage 1 of TimeStep Master (arXiv:2503.07416, Sec. 3.1, Eq. 3-4).

One LoRA per timestep interval, each trained as if it were alone, on t drawn from its interval only.

    # the bundled mini model and world, about three minutes on two CPU cores
    accelerate launch train_foster.py --num_intervals 8
    # the paper's stage 1 on 8 GPUs: global batch 64, 4,000 steps per expert
    accelerate launch --multi_gpu --num_processes 8 train_foster.py --num_intervals 8 --mixed_precision bf16 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir my_images \
        --resolution 512 --train_batch_size 8 --max_train_steps 4000 --learning_rate 1e-4 --train_text_encoder
    # one expert per GPU without communication: the same files in the same folder
    CUDA_VISIBLE_DEVICES=3 python train_foster.py --num_intervals 8 --interval_indices 3 ...

t grows with noise: interval 0 is the cleanest. Writes into --output_dir (default output/foster-n8)
    experts-n8/interval-003.safetensors   one ordinary LoRA file per expert, for sample.py and load_experts
    checkpoints/interval-003/checkpoint-N to go on from with --resume_from_checkpoint latest
    validation.json, loss.png             loss per interval, base beside experts
    samples.png                           the same prompts and noise, base above experts
    args.json, logs/                      every setting with versions; the tracker's files
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import time
from contextlib import contextmanager
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
    *("interval_indices", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "output_dir"),
    *("report_to", "logging_dir", "dataloader_num_workers", "validation_prompts", "num_inference_steps"),
    *("validation_steps", "guidance_scale", "push_to_hub", "hub_model_id", "hub_token"),  # a token is written nowhere
    # global_batch and global_gan_batch count
    *("train_batch_size", "gradient_accumulation_steps", "gan_train_batch_size"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("tsm").add_argument
    add("--num_intervals", type=int, default=8, help="n, experts in all; 1 is vanilla LoRA")
    add("--interval_boundaries", default="equal_width", choices=["equal_width", "equal_probability"])
    add("--interval_indices", type=int, nargs="+", help="train these experts only, 0 is the cleanest")
    add("--rank", type=int, default=4)
    add("--lora_alpha", type=float, help="scale of the addition is alpha / rank; the rank if not given")
    add("--lora_layers", help="comma-separated names in the denoiser; the paper's for this backbone if not given")
    add("--train_text_encoder", action="store_true", help="experts on the text encoder too, as in the paper")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"output/foster-n{args.num_intervals}"
    check_args(args)
    if args.cache_text_embeddings and args.train_text_encoder:
        raise ValueError("--cache_text_embeddings needs frozen text encoders: drop it or --train_text_encoder")
    args.interval_bounds = tsm_lora.interval_bounds(args.num_intervals)
    everyone = list(range(args.num_intervals))
    args.interval_indices = sorted(set(args.interval_indices or everyone))
    if not set(args.interval_indices) <= set(everyone):
        raise ValueError(
            f"--interval_indices {args.interval_indices} with --num_intervals {args.num_intervals}: they count from 0 "
            f"(cleanest) to {args.num_intervals - 1} (noisiest)"
        )
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


def claim_output_dir(args: argparse.Namespace) -> None:
    """Write args.json, or check it against an earlier run's: nothing is overwritten, nothing mixed."""
    out = Path(args.output_dir)
    if not any(out.glob("experts-n*/*.safetensors")) and not any(out.glob("checkpoints/*/*/state.pt")):
        write_args(args)
        return
    check_same_run(args)
    folders = {i: checkpoint_dir(args, i) for i in args.interval_indices}
    taken = [i for i in folders if expert_path(args, i).exists() or checkpoints(folders[i])]
    if taken and not args.resume_from_checkpoint:
        raise ValueError(
            f"{out} holds intervals {taken} of this run already; add --resume_from_checkpoint latest to go on, or "
            "choose another --output_dir"
        )
    named = [named_checkpoint(args, folder) for folder in folders.values()]
    if args.resume_from_checkpoint not in (None, "latest") and not any(named):
        known = [str(p) for folder in folders.values() for p in checkpoints(folder)]
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: this run has {known}")


def expert_path(args: argparse.Namespace, interval: int) -> Path:
    return Path(args.output_dir) / f"experts-n{args.num_intervals}" / f"interval-{interval:03d}.safetensors"


def checkpoint_dir(args: argparse.Namespace, interval: int) -> Path:
    return Path(args.output_dir) / "checkpoints" / f"interval-{interval:03d}"


def save_expert(experts, path: Path, args: argparse.Namespace, interval: int, step: int) -> None:
    experts.save_expert(interval, path, steps=step, seed=args.seed, base_revision=args.revision)


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


def set_intervals(pipe, args: argparse.Namespace) -> None:
    if args.interval_boundaries == "equal_probability":
        args.interval_bounds = backbones.backbone_of(pipe).process(pipe, weighting(args)).bounds(args.num_intervals)


def foster(pipe, train, validation, caches, args: argparse.Namespace, interval: int, accelerator) -> None:
    """Train the expert of one interval from scratch (or from its last checkpoint) and write its file."""
    experts = tsm_lora.attach_experts(
        pipe,
        args.num_intervals,
        [interval],
        rank=args.rank,
        alpha=args.lora_alpha,
        lora_layers=args.lora_layers and [name.strip() for name in args.lora_layers.split(",")],
        train_text_encoder=args.train_text_encoder,
        generator=data.rng(args.seed, interval, "A"),
        bounds=args.interval_bounds,
    )
    if args.gradient_checkpointing:
        experts.enable_gradient_checkpointing()
    optimizer = make_optimizer(experts, args)
    lr_scheduler = get_scheduler(  # not prepared: a function of the optimiser step alone, on any number of processes
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(Trainee(experts), optimizer)
    step, position = 0, None
    if accelerator.scaler is not None:  # each expert starts with a fresh one
        accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
    if (checkpoint := checkpoint_to_resume(args, checkpoint_dir(args, interval))) is not None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        load_training_state(state, experts, optimizer, lr_scheduler, accelerator.scaler)
        step = state["step"]
        position = state["positions"][accelerator.process_index] if args.streaming else None
        accelerator.print(f"expert {interval} goes on from {checkpoint}")

    low, high = args.interval_bounds[interval : interval + 2]
    process = experts.backbone.process(pipe, weighting(args))
    dataset = data.Pictures(train, args, data.latent_shape(pipe, args), augment=True, cache=caches["train"])
    batches = data.training_loader(dataset, args, interval, step, accelerator, position)
    progress = tqdm(
        initial=step,
        total=args.max_train_steps,
        desc=f"expert {interval} of {args.num_intervals} (t {low}..{high - 1})",
        disable=not accelerator.is_local_main_process,
    )
    losses, parameters = [], experts.parameters()
    earlier = args.interval_indices.index(interval) * args.max_train_steps  # trackers want one growing count
    first_step, start = step, time.perf_counter()
    for batch in islice(batches, (args.max_train_steps - step) * args.gradient_accumulation_steps):
        position = batch.pop("position", None)
        with accelerator.accumulate(model):
            loss = sample_losses(model, experts, process, batch, low, high).mean()
            losses.append(loss.detach())
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
            scalars = {f"loss/interval-{interval:03d}": loss, "lr": lr, "grad_norm": grad_norm.item()}
            accelerator.log(scalars, step=earlier + step)
        if step % args.checkpointing_steps == 0:
            positions = gather_object([position]) if args.streaming else []
            if accelerator.is_main_process:
                state = training_state(experts, optimizer, lr_scheduler, accelerator.scaler, step, positions)
                with new_checkpoint(checkpoint_dir(args, interval), state, args.checkpoints_total_limit) as folder:
                    save_expert(experts, folder / expert_path(args, interval).name, args, interval, step)
        if args.validation_steps and step % args.validation_steps == 0 and len(validation):
            measured = (model, experts, validation, args, interval, accelerator, caches["validation"])
            loss = validation_losses(*measured).mean().item()
            accelerator.log({f"validation/interval-{interval:03d}": loss}, step=earlier + step)
    progress.close()
    speed = {"seconds_per_step": (time.perf_counter() - start) / max(1, step - first_step)}
    validate((model, experts, validation, args, interval, accelerator, caches["validation"]), speed)
    if accelerator.is_main_process:
        save_expert(experts, expert_path(args, interval), args, interval, args.max_train_steps)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    experts.unload()


def validate(measured: tuple, speed: dict) -> None:
    """Write the interval's validation loss, base beside expert on the same pictures, t and noise. `measured` are the
    arguments of validation_losses."""
    _, experts, _, args, interval, accelerator, _ = measured
    after = validation_losses(*measured)
    with experts.off():
        before = validation_losses(*measured)
    gain = before - after
    low, high = args.interval_bounds[interval : interval + 2]
    record = {
        "interval": interval,
        "timesteps": [low, high - 1],
        "pictures": len(gain),
        "base": before.mean().item(),
        "expert": after.mean().item(),
        "gain": gain.mean().item(),
        "standard_error": (gain.std() / len(gain) ** 0.5).item(),
        **speed,
    }
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "validation" / f"interval-{interval:03d}.json", record)


def report(pipe, validation: Dataset, origin: str, args: argparse.Namespace) -> None:
    """Table and picture of the validation losses, the model card, and, once all experts are there, pictures of base
    (top) and experts (bottom)."""
    out = Path(args.output_dir)
    records = [json.loads(path.read_text()) for path in sorted((out / "validation").glob("interval-*.json"))]
    write_json(out / "validation.json", {"pictures_from": origin, "intervals": records})
    table = ["| interval | timesteps | base | expert | gain ± standard error |", "|---|---|---|---|---|"]
    for r in records:
        timesteps, gain = "{}..{}".format(*r["timesteps"]), f"{r['gain']:+.4f} ± {r['standard_error']:.4f}"
        table.append(f"| {r['interval']} | {timesteps} | {r['base']:.4f} | {r['expert']:.4f} | {gain} |")
    print("\n".join([f"\nvalidation loss on {origin}, fixed noise; t grows with noise", *table]))
    plot_losses(records, out / "loss.png")
    write_card("\n".join(table), origin, args)
    if not all(expert_path(args, i).exists() for i in range(args.num_intervals)):
        return
    prompts = args.validation_prompts or [row[args.caption_column] for row in islice(validation, 8)]
    images = draw(pipe, prompts, args)
    with_experts = tsm_lora.load_experts(pipe, expert_path(args, 0).parent)
    images += draw(pipe, prompts, args)
    with_experts.unload()
    make_image_grid(images, rows=2, cols=len(prompts)).save(out / "samples.png")
    print(f"\n{out / 'samples.png'}, base above experts:")
    for k, prompt in enumerate(prompts):
        print(f"  column {k + 1}: {prompt}")


def plot_losses(records: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    middle = [sum(r["timesteps"]) / 2 for r in records]
    axes.plot(middle, [r["base"] for r in records], "o-", label="base")
    axes.errorbar(middle, [r["expert"] for r in records], [2 * r["standard_error"] for r in records], label="experts")
    axes.set(xlabel="timestep t (grows with noise)", ylabel="validation loss", yscale="log")
    axes.legend(title="bars: 2 standard errors of the gain")
    figure.savefig(path, dpi=120)


def write_card(table: str, origin: str, args: argparse.Namespace) -> None:
    """README.md beside the experts, the model card of a hub repository."""
    (expert_path(args, 0).parent / "README.md").write_text(
        f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
tags: [text-to-image, lora, timestep-experts]
---
# Timestep LoRA experts

{args.num_intervals} LoRA experts of rank {args.rank} for `{args.pretrained_model_name_or_path}`, one per interval of
the 1000 training timesteps. t grows with noise: interval 0 is the cleanest. Each file is an ordinary
LoRA; `tsm_lora.load_experts(pipe, folder)` runs, at each step, the expert of its t.

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
    set_intervals(pipe, args)
    if accelerator.is_main_process:
        claim_output_dir(args)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("train_foster", {k: str(v) for k, v in vars(args).items() if k != "hub_token"})
    accelerator.print(f"{len(args.interval_indices)} of {args.num_intervals} experts of rank {args.rank}")
    accelerator.print(f"{'a stream of' if args.streaming else len(train)} samples, validation on {origin}")
    seen = args.global_batch * args.max_train_steps
    accelerator.print(f"{args.max_train_steps} steps of {args.global_batch} or {seen} samples per expert")
    caches = data.build_caches(pipe, train, validation, args, accelerator)
    for interval in args.interval_indices:
        if expert_path(args, interval).exists() and named_checkpoint(args, checkpoint_dir(args, interval)) is None:
            accelerator.print(f"expert {interval} is finished, skipping it")
            continue
        foster(pipe, train, validation, caches, args, interval, accelerator)
    if accelerator.is_main_process:
        if args.cache_text_embeddings:
            del pipe  # the memory of one model at a time
            pipe = load_pipeline(args, accelerator)
        report(pipe, validation, origin, args)
        if args.push_to_hub:
            push_to_hub(expert_path(args, 0).parent, args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
