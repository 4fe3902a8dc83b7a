"""Foster timestep LoRA experts: stage 1 of TimeStep Master (arXiv:2503.07416, Sec. 3.1, Eq. 3-4).

One LoRA per timestep interval, each trained as if it were alone, on t drawn uniformly from its interval only.

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
    validation.json, samples.png          loss per interval and pictures, base beside experts
    args.json, logs/                      every setting with versions; the tracker's files
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from tqdm.auto import tqdm

import tsm_lora

HERE = Path(__file__).resolve().parent
LOGGING_STEPS = 10  # reading the loss synchronises the device
# Flags that do not change what is trained: a run may be continued with other values of these.
FREE_FLAGS = {
    *("interval_indices", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "output_dir"),
    *("report_to", "logging_dir", "dataloader_num_workers", "validation_prompts", "num_inference_steps"),
    *("validation_data_dir", "max_validation_samples", "validation_steps", "guidance_scale"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default=os.path.relpath(HERE / "mini/sd15"), help="folder or hub id")
    add("--revision", help="of the hub repository")
    add("--variant", help="of the weight files, such as fp16")

    add = parser.add_argument_group("tsm").add_argument
    add("--num_intervals", type=int, default=8, help="n, experts in all; 1 is vanilla LoRA")
    add("--interval_indices", type=int, nargs="+", help="train these experts only, 0 is the cleanest")
    add("--rank", type=int, default=4)
    add("--lora_alpha", type=float, help="scale of the addition is alpha / rank; the rank if not given")
    add("--lora_layers", help="comma-separated names in the denoiser; the paper's for this backbone if not given")
    add("--train_text_encoder", action="store_true", help="experts on the text encoder too, as in the paper")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="image folder with metadata.jsonl; the mini world's target domain if not given")
    add("--validation_data_dir", help="image folder for the loss per interval; a held-out part if not given")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--max_train_samples", type=int, help="use the first so many pictures")
    add("--max_validation_samples", type=int, default=256)
    add("--resolution", type=int, help="pixels; the model's native one if not given")
    add("--center_crop", action="store_true", help="else a random crop")
    add("--random_flip", action="store_true", help="spoils captions that say left or right")
    add("--image_interpolation_mode", default="lanczos", choices=[m.value for m in InterpolationMode])
    add("--proportion_empty_prompts", type=float, default=0.0, help="captions dropped (paper: not specified)")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0)
    add("--max_train_steps", type=int, default=125, help="optimiser steps per expert (paper: 4000)")
    add("--train_batch_size", type=int, default=32, help="per process (paper: 64 in all)")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, default=1e-3, help="the default suits the mini model (paper: 1e-4)")
    add("--text_encoder_lr", type=float, help="--learning_rate if not given")
    add("--lr_scheduler", default="constant", help="a name that diffusers.optimization.get_scheduler knows")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="accelerate's setting if not given")
    add("--gradient_checkpointing", action="store_true")
    add("--allow_tf32", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)

    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--output_dir", help="output/foster-n<num_intervals> if not given")
    add("--logging_dir", default="logs", help="below --output_dir")
    add("--report_to", help="tensorboard, wandb, ..., all or none; tensorboard if installed and nothing is given")
    add("--validation_steps", type=int, help="also measure the interval's validation loss every so many steps")
    add("--validation_prompts", nargs="+", help="of samples.png; captions of the validation part if not given")
    add("--num_inference_steps", type=int, default=25, help="of samples.png")
    add("--guidance_scale", type=float, default=4.0, help="of samples.png")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, help="kept per expert")
    add("--resume_from_checkpoint", help="latest, or the path of a checkpoint; finished experts are skipped")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Resolve the defaults that depend on others; ValueError for flags that cannot work."""
    tsm_lora.interval_bounds(args.num_intervals)
    everyone = list(range(args.num_intervals))
    args.interval_indices = sorted(set(args.interval_indices or everyone))
    if not set(args.interval_indices) <= set(everyone):
        raise ValueError(
            f"--interval_indices {args.interval_indices} with --num_intervals {args.num_intervals}: they count from 0 "
            f"(cleanest) to {args.num_intervals - 1} (noisiest)"
        )
    for flag in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError(f"--proportion_empty_prompts must lie in 0..1, got {args.proportion_empty_prompts}")
    if args.report_to is None:
        args.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    args.output_dir = args.output_dir or f"output/foster-n{args.num_intervals}"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_rows(folder: str | os.PathLike, args: argparse.Namespace) -> Dataset:
    """Rows {image: {path, bytes}, caption} of an image folder, undecoded. ValueError for what cannot be trained on."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}; give an image folder with a metadata.jsonl")
    check_metadata(Path(folder))
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
    for flag in ("image_column", "caption_column"):
        if getattr(args, flag) not in rows.column_names:
            raise ValueError(
                f"--{flag} {getattr(args, flag)}: {folder} has no such column, only {rows.column_names}. Captions are "
                'in metadata.jsonl beside the pictures, lines like {"file_name": "0001.png", "text": "a red circle"}'
            )
    rows = rows.select_columns([args.image_column, args.caption_column])
    return rows.cast_column(args.image_column, ImageFeature(decode=False))


def check_metadata(folder: Path) -> None:
    """ValueError for a metadata.jsonl line that cannot be read or whose picture is missing, and for no pictures."""
    for metadata in folder.rglob("metadata.jsonl"):
        for number, line in enumerate(metadata.read_text().splitlines(), 1):
            try:
                name = json.loads(line)["file_name"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{metadata}, line {number}: need {{"file_name": ..., "text": ...}}') from error
            if not (metadata.parent / name).is_file():
                raise ValueError(f"{metadata}, line {number}: there is no picture {metadata.parent / name}")
    Image.init()
    if not any(path.suffix.lower() in Image.EXTENSION for path in folder.rglob("*")):
        raise ValueError(f"{folder} holds no picture")


def split_rows(args: argparse.Namespace) -> tuple[Dataset, Dataset, str]:
    """Training rows, validation rows, and where the latter come from."""
    validation_dir = args.validation_data_dir
    if args.train_data_dir is None:
        from mini import world

        args.train_data_dir = os.path.relpath(world.image_folder("target", "train"))
        validation_dir = validation_dir or os.path.relpath(world.image_folder("target", "validation"))
    train = load_rows(args.train_data_dir, args)
    if validation_dir is not None:
        validation, origin = load_rows(validation_dir, args), str(validation_dir)
    else:
        held_out = min(args.max_validation_samples, max(2, len(train) // 10))
        order = torch.randperm(len(train), generator=rng("held out")).tolist()
        validation, train = train.select(order[:held_out]), train.select(sorted(order[held_out:]))
        origin = f"{held_out} pictures held out of {args.train_data_dir}"
    if not len(train) or len(validation) < 2:
        raise ValueError(f"{args.train_data_dir} is too small: validation takes two pictures, training needs the rest")
    train = train.select(range(min(len(train), args.max_train_samples or len(train))))
    return train, validation.select(range(min(len(validation), args.max_validation_samples))), origin


def rng(*key) -> torch.Generator:
    """A generator of its own for each key: all randomness of training is a function of (seed, interval, k), where k =
    optimiser step * global batch + position in it. So one expert alone equals that of the full run, a resumed run an
    uninterrupted one, and two processes one."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Pictures(torch.utils.data.Dataset):
    """Pictures with all that is random about their use. Keys are (index, *name of a generator)."""

    def __init__(self, rows: Dataset, args: argparse.Namespace, latent_shape: tuple[int, ...], augment: bool):
        self.rows, self.args, self.latent_shape, self.augment = rows, args, latent_shape, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple) -> dict:
        index, *name = key
        row, generator = self.rows[index], rng(*name)
        u, drop, flip, top, left = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        noise, vae_noise = torch.randn(2, *self.latent_shape, generator=generator)  # (c, h, w) each
        caption = row[self.args.caption_column]
        if not isinstance(caption, str):
            raise ValueError(f"picture {index} has the caption {caption!r}; each needs a text in metadata.jsonl")
        size, mode = self.args.resolution, InterpolationMode(self.args.image_interpolation_mode)
        image = TF.resize(open_picture(row[self.args.image_column]), size, mode)  # shorter side
        room_x, room_y = image.width - size, image.height - size
        if self.augment and not self.args.center_crop:
            room_x, room_y = 2 * int(left * (room_x + 1)), 2 * int(top * (room_y + 1))
        image = TF.crop(image, room_y // 2, room_x // 2, size, size)
        if self.augment and self.args.random_flip and flip < 0.5:
            image = TF.hflip(image)
        if self.augment and drop < self.args.proportion_empty_prompts:
            caption = ""
        pixels = TF.to_tensor(image) * 2 - 1  # (3, size, size) in [-1, 1]
        return {"pixels": pixels, "caption": caption, "u": u, "noise": noise, "vae_noise": vae_noise}


def open_picture(cell: dict) -> Image.Image:
    try:
        source = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        return ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{cell['path']} is no picture or is truncated ({error}); replace or remove it") from error


def training_keys(n_rows: int, args, interval: int, first_step: int, accelerator: Accelerator) -> Iterator[list]:
    """Keys of this process's batches from an optimiser step on: a fresh permutation of the rows per epoch."""
    batch, accumulate, processes = args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    epoch, order = -1, None
    for micro_step in range(first_step * accumulate, args.max_train_steps * accumulate):
        start = (micro_step * processes + accelerator.process_index) * batch
        keys = []
        for k in range(start, start + batch):
            if k // n_rows != epoch:
                epoch = k // n_rows
                order = torch.randperm(n_rows, generator=rng(args.seed, interval, "epoch", epoch))
            keys.append((int(order[k % n_rows]), args.seed, interval, k))
        yield keys


def loader(dataset: Pictures, keys, args: argparse.Namespace) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=args.dataloader_num_workers)


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss


class Trainee(torch.nn.Module):
    """Denoiser and text encoders under one forward, for autocast and for one exchange of gradients."""

    def __init__(self, experts: tsm_lora.Experts):
        super().__init__()
        self.components, self.experts = torch.nn.ModuleDict(experts.components), experts

    def forward(self, xt: torch.Tensor, t: torch.Tensor, captions: list[str]) -> torch.Tensor:
        return self.experts.predict(xt, t, captions)


def encode_pictures(vae, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample of the scaled latents x0 (B, c, h, w) of pixels (B, 3, H, W)."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    x0 = posterior.mean + posterior.std * noise
    return (x0 - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def sample_losses(model, experts, scheduler, batch: dict, low: int, high: int) -> torch.Tensor:
    """Diffusion loss of each sample, Eq. 1 with t drawn uniformly from the interval [low, high) (Eq. 4): (B,)."""
    backbone, vae = experts.backbone, experts.pipe.vae
    batch = {k: v.to(vae.device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad():
        x0 = encode_pictures(vae, batch["pixels"], batch["vae_noise"])  # (B, c, h, w)
    t = backbone.draw_t(batch["u"], low, high)  # (B,)
    xt, target = backbone.diffuse(scheduler, x0, batch["noise"], t)
    pred = model(xt, t, batch["caption"])
    return F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(1)


@torch.no_grad()
def validation_losses(model, experts, scheduler, rows: Dataset, args, interval: int, accelerator) -> torch.Tensor:
    """Loss of each validation picture at one fixed t and noise of the interval, whatever the run's seed: (N,)."""
    low, high = tsm_lora.interval_bounds(args.num_intervals)[interval : interval + 2]
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    keys = [[(k, "validation", interval, k) for k in mine[s : s + 32]] for s in range(0, len(mine), 32)]
    losses = torch.zeros(len(rows), device=accelerator.device)
    dataset = Pictures(rows, args, latent_shape(experts.pipe, args.resolution), augment=False)
    for chunk, batch in zip(keys, loader(dataset, keys, args)):
        losses[[k for k, *_ in chunk]] = sample_losses(model, experts, scheduler, batch, low, high)
    return accelerator.reduce(losses, "sum").cpu()


def latent_shape(pipe, resolution: int) -> tuple[int, int, int]:
    side = resolution // pipe.vae_scale_factor
    return pipe.vae.config.latent_channels, side, side


def on_cpu() -> bool:
    """Several CPU processes find each other only if Accelerator is told that it runs on the CPU."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator):
    """The base model, frozen, in the training precision (the VAE in fp32), and the resolution it works at."""
    name = args.pretrained_model_name_or_path
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"--pretrained_model_name_or_path {name}: neither a folder nor a hub id of the form owner/name"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(
        name, revision=args.revision, variant=args.variant, torch_dtype={"default": dtype, "vae": torch.float32}
    ).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    backbone = tsm_lora.backbone_of(pipe)
    args.resolution = args.resolution or getattr(pipe, backbone.denoiser).config.sample_size * pipe.vae_scale_factor
    if args.resolution % pipe.vae_scale_factor:
        raise ValueError(f"--resolution {args.resolution} is no multiple of the VAE's {pipe.vae_scale_factor} pixels")
    pipe.vae.requires_grad_(False)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blackens pictures of validation
    return pipe


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run


def claim_output_dir(args: argparse.Namespace) -> None:
    """Write args.json, or check it against an earlier run's: nothing is overwritten, nothing mixed."""
    out, path = Path(args.output_dir), Path(args.output_dir) / "args.json"
    settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    if path.exists():
        before = json.loads(path.read_text())["args"]
        differ = {f"--{k}": (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        if differ:
            raise ValueError(f"{out} holds another run, with (its, your) {differ}; choose another --output_dir")
        taken = [i for i in args.interval_indices if expert_path(args, i).exists() or checkpoints(args, i)]
        if taken and not args.resume_from_checkpoint:
            raise ValueError(
                f"{out} holds intervals {taken} of this run already; add --resume_from_checkpoint latest to go on, or "
                "choose another --output_dir"
            )
    elif out.exists() and any(out.glob("experts-n*")):
        raise ValueError(f"{out} holds experts but no args.json, so it is not a run of this script; choose another")
    if path.exists():
        return
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)} | {
        "python": platform.python_version()
    }
    write_json(path, {"args": settings, "versions": versions})


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def expert_path(args: argparse.Namespace, interval: int) -> Path:
    return Path(args.output_dir) / f"experts-n{args.num_intervals}" / f"interval-{interval:03d}.safetensors"


def checkpoints(args: argparse.Namespace, interval: int) -> list[Path]:
    """Complete checkpoints of an expert, oldest first."""
    folder = Path(args.output_dir) / "checkpoints" / f"interval-{interval:03d}"
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(experts, optimizer, lr_scheduler, scaler, args, interval: int, step: int) -> None:
    """Trainable state only, written under another name first; then the oldest beyond the limit go."""
    path = Path(args.output_dir) / "checkpoints" / f"interval-{interval:03d}" / f"checkpoint-{step}"
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    experts.save_expert(interval, partial / f"interval-{interval:03d}.safetensors", steps=step)  # can be sampled
    state = {"step": step, "experts": experts.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"lr_scheduler": lr_scheduler.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
    torch.save(state, partial / "state.pt")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    for old in checkpoints(args, interval)[: -args.checkpoints_total_limit] if args.checkpoints_total_limit else []:
        shutil.rmtree(old)


def checkpoint_to_resume(args: argparse.Namespace, interval: int) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(args, interval)), None)
    path = Path(args.resume_from_checkpoint)
    if path not in (known := [p for i in args.interval_indices for p in checkpoints(args, i)]):
        raise ValueError(f"--resume_from_checkpoint {path}: this run has {[str(p) for p in known]}")
    return path if path.parent.name == f"interval-{interval:03d}" else None


# ---------------------------------------------------------------------------------------------------------------------
# Training


def foster(pipe, train: Dataset, validation: Dataset, args: argparse.Namespace, interval: int, accelerator) -> None:
    """Train the expert of one interval from scratch (or from its last checkpoint) and write its file."""
    lora_layers = args.lora_layers.split(",") if args.lora_layers else None
    generator = rng(args.seed, interval, "A")
    experts = tsm_lora.attach_experts(
        pipe,
        args.num_intervals,
        [interval],
        args.rank,
        args.lora_alpha,
        lora_layers,
        args.train_text_encoder,
        generator,
    )
    if args.gradient_checkpointing:
        experts.enable_gradient_checkpointing()
    denoiser = experts.parameters(experts.backbone.denoiser)
    encoders = experts.parameters()[len(denoiser) :]
    text_encoder_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    groups = [{"params": denoiser, "lr": args.learning_rate}, {"params": encoders, "lr": text_encoder_lr}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(  # not prepared: a function of the optimiser step alone, on any number of processes
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    step, state = 0, None
    if (checkpoint := checkpoint_to_resume(args, interval)) is not None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        experts.load_state_dict(state["experts"])
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        step = state["step"]
        accelerator.print(f"expert {interval} goes on from {checkpoint}")
    model, optimizer = accelerator.prepare(Trainee(experts), optimizer)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"] if state else torch.amp.GradScaler().state_dict())

    low, high = tsm_lora.interval_bounds(args.num_intervals)[interval : interval + 2]
    scheduler = experts.backbone.noise_scheduler(pipe)
    dataset = Pictures(train, args, latent_shape(pipe, args.resolution), augment=True)
    keys = training_keys(len(train), args, interval, step, accelerator)
    progress = tqdm(
        initial=step,
        total=args.max_train_steps,
        desc=f"expert {interval} of {args.num_intervals} (t {low}..{high - 1})",
        disable=not accelerator.is_local_main_process,
    )
    losses, parameters = [], experts.parameters()
    earlier = args.interval_indices.index(interval) * args.max_train_steps  # trackers want one growing count
    for batch in loader(dataset, keys, args):
        with accelerator.accumulate(model):
            loss = sample_losses(model, experts, scheduler, batch, low, high).mean()
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
        if step % args.checkpointing_steps == 0 and accelerator.is_main_process:
            save_checkpoint(experts, optimizer, lr_scheduler, accelerator.scaler, args, interval, step)
        if args.validation_steps and step % args.validation_steps == 0 and len(validation):
            loss = validation_losses(model, experts, scheduler, validation, args, interval, accelerator).mean().item()
            accelerator.log({f"validation/interval-{interval:03d}": loss}, step=earlier + step)
    progress.close()
    validate(model, experts, scheduler, validation, args, interval, accelerator)
    if accelerator.is_main_process:
        experts.save_expert(interval, expert_path(args, interval), steps=args.max_train_steps, seed=args.seed)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    experts.unload()


def validate(model, experts, scheduler, validation, args, interval: int, accelerator) -> None:
    """Write the interval's validation loss, base beside expert on the same pictures, t and noise."""
    after = validation_losses(model, experts, scheduler, validation, args, interval, accelerator)
    with experts.off():
        before = validation_losses(model, experts, scheduler, validation, args, interval, accelerator)
    gain = before - after
    low, high = tsm_lora.interval_bounds(args.num_intervals)[interval : interval + 2]
    record = {
        "interval": interval,
        "timesteps": [low, high - 1],
        "pictures": len(gain),
        "base": before.mean().item(),
        "expert": after.mean().item(),
        "gain": gain.mean().item(),
        "standard_error": (gain.std() / len(gain) ** 0.5).item(),
    }
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "validation" / f"interval-{interval:03d}.json", record)


def report(pipe, validation: Dataset, origin: str, args: argparse.Namespace) -> None:
    """The table of validation losses, and, once all experts are there, pictures of base (top) and experts (bottom)."""
    out = Path(args.output_dir)
    records = [json.loads(path.read_text()) for path in sorted((out / "validation").glob("interval-*.json"))]
    write_json(out / "validation.json", {"pictures_from": origin, "intervals": records})
    print(f"\nvalidation loss on {origin}, fixed noise; t grows with noise")
    print("interval  timesteps   base    expert  gain")
    for r in records:
        timesteps = "{}..{}".format(*r["timesteps"])
        print(
            f"{r['interval']:8d}  {timesteps:9s}  {r['base']:.4f}  {r['expert']:.4f}  "
            f"{r['gain']:+.4f} ± {r['standard_error']:.4f}"
        )
    if not all(expert_path(args, i).exists() for i in range(args.num_intervals)):
        return
    prompts = args.validation_prompts or [row[args.caption_column] for row in islice(validation, 8)]
    call = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    call |= dict(height=args.resolution, width=args.resolution)

    def draw():
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        return pipe(prompts, generator=generators, **call).images

    images = draw()
    with_experts = tsm_lora.load_experts(pipe, expert_path(args, 0).parent)
    images += draw()
    with_experts.unload()
    side = max(128, args.resolution)
    images = [image.resize((side, side), Image.Resampling.NEAREST) for image in images]
    make_image_grid(images, rows=2, cols=len(prompts)).save(out / "samples.png")
    print(f"\n{out / 'samples.png'}, base above experts:")
    for k, prompt in enumerate(prompts):
        print(f"  column {k + 1}: {prompt}")


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    with accelerator.main_process_first():
        train, validation, origin = split_rows(args)
    pipe = load_pipeline(args, accelerator)
    if accelerator.is_main_process:
        claim_output_dir(args)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("train_foster", {k: str(v) for k, v in vars(args).items()})
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    accelerator.print(f"{len(args.interval_indices)} of {args.num_intervals} experts of rank {args.rank}")
    accelerator.print(f"{len(train)} pictures of {args.train_data_dir}, global batch {batch}")
    accelerator.print(f"{args.max_train_steps} steps or {batch * args.max_train_steps} pictures per expert")
    for interval in args.interval_indices:
        from_here = args.resume_from_checkpoint != "latest" and checkpoint_to_resume(args, interval) is not None
        if expert_path(args, interval).exists() and not from_here:
            accelerator.print(f"expert {interval} is finished, skipping it")
            continue
        foster(pipe, train, validation, args, interval, accelerator)
    if accelerator.is_main_process:
        report(pipe, validation, origin, args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
