"""Distil a few-step student with DMD2 (https://arxiv.org/abs/2405.14867) as a LoRA or as timestep experts: the third
task of TimeStep Master (arXiv:2503.07416, Sec. 4.3, appendix A.3).

    # four experts on the bundled mini model, one per student timestep, 999 first: 1,000 student updates
    accelerate launch distill_dmd2.py --num_intervals 4
    # DMD2+LoRA, then the routers (stage 2) over both
    accelerate launch distill_dmd2.py --num_intervals 1
    accelerate launch distill_dmd2.py --core_experts output/dmd2-n4/experts-n4 \
        --context_experts output/dmd2-n1/experts-n1
    # the paper's experts of SD1.5; its LoRA has --num_intervals 1, 40000 and 5000 steps, batches 128 and 64; its
    # routers --steps_with_gan 2000; rank, alpha and rates are DMD2's, but for --gan_learning_rate, which is ours
    accelerate launch --multi_gpu --num_processes 4 distill_dmd2.py --num_intervals 4 --rank 64 --lora_alpha 8 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir laion \
        --resolution 512 --mixed_precision bf16 --gradient_checkpointing --update_ratio 10 --gan_loss_weight 1e-3 \
        --real_guidance_scale 1.75 --lr_warmup_steps 500 --train_batch_size 8 --gan_train_batch_size 4 \
        --steps_without_gan 20000 20000 5000 5000 --steps_with_gan 5000 5000 20000 40000 \
        --learning_rate 5e-5 --guidance_learning_rate 1e-5 --gan_learning_rate 2.5e-6 --gan_guidance_learning_rate 5e-7

t grows with noise, and experts are distilled from the noisiest interval down: expert k starts from what the finished
experts before it make of fresh noise. Steps are DMD2's iterations: each updates the fake score, every
--update_ratio-th the student too. Writes into --output_dir (default output/dmd2-n<num_intervals>)
    experts-n4/interval-003.safetensors   one ordinary LoRA file per expert, for sample.py and load_experts;
                                          of stage 2 assembled/, of --full_finetuning student/, a pipeline folder
    checkpoints/interval-003/checkpoint-N to go on from with --resume_from_checkpoint latest
    samples.png, training.json            teacher above student; counts of updates and seconds
    args.json, logs/                      every setting with versions; the tracker's files
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers import LCMScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

import backbones
import data
import sample
import train_assemble
import train_foster
import tsm_lora
from backbones import T

# Appendix A.3, and DMD2's own; all layers of SD1.5's UNet but conv_in, conv_out and the embedding of t.
LORA_LAYERS = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut".split()
LORA_LAYERS += ["downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
LOGGING_STEPS = train_foster.LOGGING_STEPS
NORMALISER_FLOOR = 1e-5  # DMD2 divides by the mean as it is: infinite where the student's x is the teacher's
DRAWS = ("matching", "denoising", "generator", "discriminator", "real")  # each needs a t and a noise of its own
# Flags of train_foster.py that mean nothing here.
IDLE = ("max_train_steps", "streaming", "corrupt_records", "video_column", "reward_column", "max_num_frames")
IDLE += ("frame_stride", "fps", "proportion_empty_prompts", "gradient_accumulation_steps", "text_encoder_lr")
IDLE += ("adam_weight_decay_text_encoder", "snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")
IDLE += ("cache_text_embeddings", "load_in_4bit", "compile", "channels_last", "use_8bit_adam", "validation_steps")
IDLE += ("push_to_hub", "hub_model_id", "hub_token", "without_t5")
HELP = {
    "learning_rate": "of the student; the default suits the mini model (paper: not specified; DMD2's LoRA: 5e-5)",
    "train_batch_size": "per process, without GAN (paper: 32 in all, of vanilla LoRA 128)",
    "train_data_dir": "pictures with metadata.jsonl, .tar shards or .parquet, real ones for the GAN; the mini world's",
    "output_dir": "output/dmd2-n<num_intervals>, -full or -router if not given",
    "num_inference_steps": "of the teacher in samples.png",
    "guidance_scale": "of the teacher in samples.png",
    "lr_warmup_steps": "in iterations of each phase (DMD2: 500)",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("tsm").add_argument
    add("--num_intervals", type=int, default=4, help="n, experts in all; 1 is DMD2+LoRA")
    add("--rank", type=int, default=16, help="(DMD2: 64, with alpha 8)")
    add("--lora_alpha", type=float, default=8, help="scale of the addition is alpha / rank")
    add("--lora_layers", help="comma-separated names in the denoiser; in a UNet the paper's 14 if not given")
    add("--core_experts", help="train routers instead (stage 2): folder of distilled experts, not gated")
    add("--context_experts", nargs="+", help="one or more folders, gated")
    add("--router_inputs", default="both", choices=["both", "feature", "timestep"], help="of the gates")
    add("--full_finetuning", action="store_true", help="train all weights of the student, as DMD2 does")

    add = parser.add_argument_group("distillation").add_argument
    add("--student_timesteps", type=int, nargs="+", default=[999, 749, 499, 249], help="falling, in [0, 1000)")
    add("--steps_without_gan", type=int, nargs="+", help="one number, or one per expert, noisiest first (paper: A.3)")
    add("--steps_with_gan", type=int, nargs="+", help="the same, of the phase that follows (paper: A.3)")
    add("--gan_train_batch_size", type=int, default=16, help="per process in that phase (paper: 16 in all)")
    add("--update_ratio", type=int, default=3, help="fake-score updates per student update (DMD2: 10)")
    add("--real_guidance_scale", type=float, default=1.75, help="of the teacher (DMD2: 1.75)")
    add("--min_step_percent", type=float, default=0.02, help="noise of distribution matching")
    add("--max_step_percent", type=float, default=0.98)
    add("--gan_max_timestep", type=int, default=T, help="noise of the GAN, t in [0, this)")
    add("--dm_loss_weight", type=float, default=1.0)
    # the gradient of distribution matching has a factor 1 / (c h w), that of the GAN has none: 1e-3 is for 64x64
    add("--gan_loss_weight", type=float, default=0.03, help="of the student; the default suits the mini model's 8x8")
    add("--discriminator_loss_weight", type=float, default=0.01)
    add("--guidance_learning_rate", type=float, default=5e-4, help="fake score (DMD2: 1e-5; its LoRA: 5e-5)")
    add("--gan_learning_rate", type=float, default=5e-4, help="student in the GAN phase (paper: not specified)")
    add("--gan_guidance_learning_rate", type=float, default=1e-4, help="fake score and head then (DMD2: 5e-7)")
    add("--prompts_file", help="a prompt per line for the student; the captions of the pictures if not given")
    add("--initial_guidance", help="guidance/*.safetensors of another run; else the fake score begins as the teacher")
    add("--save_guidance", action="store_true", help="keep fake score and head of each expert in guidance/")
    add("--low_memory", action="store_true", help="one frozen network in all, the fake score a LoRA (not as DMD2)")

    train_foster.add_training_flags(parser)
    parser.set_defaults(max_grad_norm=10.0, learning_rate=1e-3, train_batch_size=16)
    parser.set_defaults(lr_scheduler="constant_with_warmup")
    for action in parser._actions:  # the flags are train_foster.py's, some of their help is not
        action.help = argparse.SUPPRESS if action.dest in IDLE else HELP.get(action.dest, action.help)
    args = parser.parse_args(argv)
    if idle := [f"--{flag}" for flag in IDLE if getattr(args, flag) != parser.get_default(flag)]:
        raise ValueError(f"{', '.join(idle)} has no effect in distillation: drop it")
    train_foster.check_args(args)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Resolve the defaults that depend on others; ValueError for flags that cannot work."""
    steps, args.moe_experts, args.symmetric = args.student_timesteps, None, False
    if any(a <= b for a, b in zip(steps, steps[1:])) or not 0 <= steps[-1] <= steps[0] < T:
        raise ValueError(f"--student_timesteps {steps} must fall and lie in 0..{T - 1}, as 999 749 499 249")
    for flag in ("update_ratio", "gan_train_batch_size", "gan_max_timestep", "rank"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if args.gan_max_timestep > T or not 0 <= args.min_step_percent < args.max_step_percent <= 1:
        raise ValueError(f"need --gan_max_timestep <= {T} and 0 <= --min_step_percent < --max_step_percent <= 1")
    if bool(args.core_experts) != bool(args.context_experts):
        raise ValueError("--core_experts and --context_experts belong together: give both or none")
    if args.full_finetuning and (args.core_experts or args.num_intervals != 1 or args.low_memory):
        raise ValueError("--full_finetuning trains one set of weights: --num_intervals 1, no experts, no --low_memory")
    if args.low_memory and args.gradient_checkpointing:
        raise ValueError("--low_memory shares one network, whose state recomputation would mix up: drop one flag")
    if args.core_experts:
        args.num_intervals = 1  # one set of routers
        for _, folder, _ in train_assemble.banks(args):
            other = tsm_lora.read_folder(folder)[0][0].get("student_timesteps")
            if other != steps:
                raise ValueError(f"the experts in {folder} are of --student_timesteps {other}, not {steps}")
    args.interval_bounds = tsm_lora.interval_bounds(args.num_intervals)
    if empty := [i for i in range(args.num_intervals) if not own_steps(args, i)]:
        raise ValueError(
            f"--num_intervals {args.num_intervals}: no student timestep of {steps} falls into interval(s) {empty}"
        )
    default = (0, 300) if args.core_experts else (2400 // args.num_intervals, 600 // args.num_intervals)  # for mini
    for flag, count in zip(("steps_without_gan", "steps_with_gan"), default):
        counts = getattr(args, flag) or [count]
        if len(counts) not in (1, args.num_intervals) or min(counts) < 0:
            raise ValueError(f"--{flag} {counts}: one number or {args.num_intervals}, each at least 0")
        setattr(args, flag, counts * (args.num_intervals // len(counts)))
    if 0 in map(sum, zip(args.steps_without_gan, args.steps_with_gan)):
        raise ValueError("--steps_without_gan and --steps_with_gan are both 0 for an expert: nothing would be trained")
    name = "router" if args.core_experts else "full" if args.full_finetuning else f"n{args.num_intervals}"
    args.output_dir = args.output_dir or f"output/dmd2-{name}"


def own_steps(args: argparse.Namespace, interval: int) -> list[int]:
    """Which student steps (0 is the noisiest) the expert of an interval makes."""
    index = tsm_lora.interval_index(torch.tensor(args.student_timesteps), args.interval_bounds)
    return [k for k, i in enumerate(index.tolist()) if i == interval]


# ---------------------------------------------------------------------------------------------------------------------
# Networks. c is the condition, a dict of tensors; eps(x_t, t, c) predicts the noise


class Schedule:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, and x0 of x_t and eps. In fp64, since SD's 1 / sqrt(abar_999) is
    14.6: the cast comes last, as in DMD2. t is (B,) or 0-dim."""

    def __init__(self, pipe):
        scheduler = pipe.scheduler
        if scheduler.config.get("prediction_type") != "epsilon" or not hasattr(scheduler, "alphas_cumprod"):
            kind = scheduler.config.get("prediction_type", "flow matching")
            raise ValueError(f"DMD2 needs a teacher that predicts epsilon, this one is of {kind}")
        if scheduler.alphas_cumprod[-1] <= 0:
            raise ValueError("x0 cannot be told at zero terminal SNR: the scheduler has rescale_betas_zero_snr")
        self.alpha_bar = scheduler.alphas_cumprod.double().to(pipe.device)

    def factors(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, sigma = self.factors(t, x0)
        return (signal * x0 + sigma * noise).float()

    def x0(self, xt: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, sigma = self.factors(t, xt)
        return (xt.double() - sigma * eps.double()) / signal


class Denoiser(nn.Module):
    """A network of the pipeline's family as eps(x_t, t, c), in whatever `mode` a shared network must be in."""

    def __init__(self, pipe, network: nn.Module, mode=nullcontext):
        super().__init__()
        self.backbone, self.network, self.mode = backbones.backbone_of(pipe), network, mode
        self.pipe = SimpleNamespace(**{self.backbone.denoiser: network, "vae_scale_factor": pipe.vae_scale_factor})

    def forward(self, xt: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        if t.ndim == 0 and self.backbone.denoiser != "unet":  # a UNet spreads t itself, and no device is read for it
            t = t.expand(len(xt)).to(xt.device)
        with self.mode():
            return self.backbone.predict(self.pipe, xt, t, c).float()


class Reached(Exception):
    """The mid block's output is there: the up blocks need not run."""


class Guidance(nn.Module):
    """The fake score, eps of what the student draws, and the GAN's head on its mid block (DMD2, Sec. 4.3)."""

    def __init__(self, fake: nn.Module):
        super().__init__()
        self.fake, self.head = fake, None

    def add_head(self, shape: tuple[int, ...], c: dict[str, torch.Tensor], seed: int) -> None:
        """A fresh classifier for latents of `shape` (c, h, w): SD1.5's 1280 channels of 8x8 give DMD2's 52,437,761
        parameters. `c` is the condition of one prompt. ValueError for a network without a mid block."""
        if not hasattr(self.fake.network, "mid_block"):
            raise ValueError("the GAN reads a UNet's mid block, which this model lacks: set --steps_with_gan 0")
        xt = next(iter(c.values())).new_zeros(1, *shape)
        with torch.no_grad():
            width, h, w = self.feature(xt, torch.tensor(0), c).shape[1:]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = []
            while min(h, w) > 4:
                layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), *norm_and_act(width)]
                h, w = h // 2, w // 2
            layers += [nn.Conv2d(width, width, (h, w)), *norm_and_act(width), nn.Conv2d(width, 1, 1)]
            self.head = nn.Sequential(*layers).to(xt.device)

    def feature(self, xt: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mid block's output (B, C, h', w')."""

        def stop(module, inputs, output):
            raise Reached(output)

        handle = self.fake.network.mid_block.register_forward_hook(stop)
        try:
            self.fake(xt, t, c)
        except Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()

    def logit(self, xt: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        """How real x_t looks, (B,)."""
        feature = self.feature(xt, t, c).float()
        with torch.autocast(feature.device.type, enabled=False):
            return self.head(feature).flatten()


def norm_and_act(width: int) -> list[nn.Module]:
    # 32 groups in SD1.5; few channels on one pixel would leave nothing but signs of a finer group
    return [nn.GroupNorm(math.gcd(32, width // 8 or 1, width), width), nn.SiLU()]


class FakeLoRA(nn.Module):
    """--low_memory: the fake score as a LoRA on the layers of the shared frozen network, added inside `on()` only. Not
    DMD2's (a full copy): its memory is that of the copy, its gradients and moments."""

    def __init__(self, experts: tsm_lora.Experts, rank: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.experts, self.routing = experts, tsm_lora.Routing([tsm_lora.Bank(1, (0,), rank)])
        self.routing.enabled, self.routing.route = False, self.routing.at(0)
        self.layers, self.handles = nn.ModuleList(), []
        for base in experts.bases.values():
            layer = tsm_lora.ExpertLayer(base, self.routing, scaling)
            layer.A.data.copy_(nn.init.kaiming_uniform_(torch.empty(layer.A.shape), math.sqrt(5), generator=generator))
            self.handles.append(base.register_forward_hook(partial(self.add, layer)))
            self.layers.append(layer)

    def add(self, layer: nn.Module, base: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self.routing.enabled:
            return None
        project = base._conv_forward if isinstance(base, nn.Conv2d) else F.linear
        return output + layer(args[0], project).to(output.dtype)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def on(self):
        self.routing.enabled = True
        try:
            with self.experts.off():
                yield
        finally:
            self.routing.enabled = False


def last_layer(network: nn.Module) -> nn.Module:
    return network.conv_out if hasattr(network, "conv_out") else network.proj_out


def in_fp32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A last layer outside autocast: eps rounded to bf16 alone puts noise of 0.024 rms into x0 at t = 999 (it does
    in DMD2's training passes)."""
    with torch.autocast(x.device.type, enabled=False):
        return type(layer).forward(layer, x.float())


# ---------------------------------------------------------------------------------------------------------------------
# DMD2: three losses, the simulation, the alternation


def guided(teacher, xt, t, c, empty, scale: float) -> torch.Tensor:
    """Classifier-free guidance, e_u + w (e_c - e_u); one batched call."""
    if scale == 1:
        return teacher(xt, t, c)
    both = {name: torch.cat([empty[name].expand_as(c[name]), c[name]]) for name in c}
    without, with_c = teacher(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
    return without + scale * (with_c - without)


def matching_gradient(x, c, empty, teacher, fake, schedule, t, noise, scale: float) -> torch.Tensor:
    """g = (x_fake - x_real) / mean|x - x_real|, the mean over each sample: from what the teacher would draw to what
    the student does (DMD2, Sec. 3; the normaliser is Eq. 8 of https://arxiv.org/abs/2311.18828)."""
    xt = schedule.add_noise(x, noise, t)
    x_fake = schedule.x0(xt, fake(xt, t, c), t)
    x_real = schedule.x0(xt, guided(teacher, xt, t, c, empty, scale), t)
    size = (x - x_real).abs().flatten(1).mean(1).clamp(min=NORMALISER_FLOOR)  # (B,)
    return (x_fake - x_real) / size.view(-1, *[1] * (x.ndim - 1))


def matching_loss(x, *others) -> torch.Tensor:
    """Distribution matching: a loss of x whose gradient is g / x.numel(); its value is no distance."""
    with torch.no_grad():
        g = matching_gradient(x, *others)
    return 0.5 * F.mse_loss(x.double(), x.detach().double() - g)


def denoising_loss(x, c, fake, schedule, t, noise) -> torch.Tensor:
    """The fake score learns eps of the student's x (DMD2, Sec. 3), without guidance or dropped captions."""
    eps = fake(schedule.add_noise(x.detach(), noise, t), t, c)
    return F.mse_loss(eps, noise)


def generator_gan_loss(logit: torch.Tensor) -> torch.Tensor:
    """-log sigmoid D(x): the student wants to look real (DMD2, Sec. 4.3)."""
    return F.softplus(-logit).mean()


def discriminator_loss(logit: torch.Tensor, real_logit: torch.Tensor) -> torch.Tensor:
    return F.softplus(logit).mean() + F.softplus(-real_logit).mean()


@torch.no_grad()
def backward_simulation(student, schedule, c, noises: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """x_t at timesteps[k] as the student's own sampling reaches it (DMD2, Sec. 4.5): pure noise for k = 0, else its x0
    of the step before with fresh noise. `noises` (B, k + 1, c, h, w), all independent, in the order of use."""
    k = noises.shape[1] - 1
    xt = noises[:, 0]
    for j in range(k):
        t, later = torch.tensor(timesteps[j]), torch.tensor(timesteps[j + 1])
        x0 = schedule.x0(xt, student(xt, t, c), t)
        xt = schedule.add_noise(x0, noises[:, j + 1], later)
    return xt


class Updates:
    """AdamW, its schedule and the parameters of one of the two players. Of a pair (whole, own), the gradient arrives
    at `whole`; `own` is itself, or its first rows, which share its memory."""

    def __init__(self, name: str, pairs: list[tuple[nn.Parameter, nn.Parameter]], lr: float, args, iterations: int):
        self.name, self.pairs, self.max_grad_norm = name, pairs, args.max_grad_norm
        betas, options = (args.adam_beta1, args.adam_beta2), {"weight_decay": args.adam_weight_decay}
        self.parameters = [own for _, own in pairs]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas, args.adam_epsilon, fused=True, **options)
        counts = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": iterations}
        self.schedule = get_scheduler(args.lr_scheduler, self.optimizer, **counts)

    def step(self, loss: torch.Tensor, accelerator) -> torch.Tensor:
        """One update by a loss, which leaves all other parameters without a gradient. Returns the gradient's norm."""
        accelerator.backward(loss, inputs=[whole for whole, _ in self.pairs])
        for whole, own in self.pairs:
            if own is not whole and whole.grad is not None:
                own.grad, whole.grad = whole.grad[: len(own)], None
        if accelerator.num_processes > 1:  # in place of DDP, which expects one forward per backward
            for grad in (p.grad for p in self.parameters if p.grad is not None):
                grad.copy_(accelerator.reduce(grad, "mean"))
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict:
        state = {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict()}
        return state | {"schedule": self.schedule.state_dict()}

    def load(self, state: dict) -> None:
        if [p.shape for p in self.parameters] != [p.shape for p in state["parameters"]]:
            raise ValueError(f"the checkpoint's {self.name} has other layers or another rank than this run's")
        for own, tensor in zip(self.parameters, state["parameters"]):
            own.data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@dataclass
class Players:
    """Who takes part in the updates of one expert. Each expert has a fake score of its own, which models what it alone
    draws (paper: not specified)."""

    student: nn.Module  # with `experts` on it, unless all weights train
    teacher: nn.Module
    guidance: Guidance
    schedule: Schedule
    draw_t: Callable  # (u in [0, 1), low, high) -> t
    empty: dict[str, torch.Tensor]  # the condition of no prompt
    pairs: list[tuple[nn.Parameter, nn.Parameter]]  # of the student, for `Updates`
    experts: tsm_lora.Experts | None = None
    student_updates: Updates | None = None
    guidance_updates: Updates | None = None


def iterate(players: Players, batch: dict, k: int, student_turn: bool, gan: bool, args, accelerator) -> dict:
    """One iteration of DMD2 (its Algorithm 1) at student step k: on its turn the student, then always the fake score
    and the head, on the same x. Returns losses and norms of gradients by name."""
    student, teacher, guidance, schedule = players.student, players.teacher, players.guidance, players.schedule
    c, losses, timesteps = batch["c"], {}, args.student_timesteps
    low, high = int(args.min_step_percent * T), min(int(args.max_step_percent * T) + 1, T)
    ranges = {"matching": (low, high), "denoising": (0, T)}
    t = {name: players.draw_t(batch[name]["u"], *ranges.get(name, (0, args.gan_max_timestep))) for name in DRAWS}
    noise = {name: batch[name]["noise"] for name in DRAWS}

    with accelerator.autocast():
        xt, t_k = backward_simulation(student, schedule, c, batch["noises"][:, : k + 1], timesteps), timesteps[k]
    # left in between: in older torch, the rollout's bf16 copies of weights, without gradient, would serve here too
    with accelerator.autocast(), torch.set_grad_enabled(student_turn):  # the gradient flows through this call alone
        x = schedule.x0(xt, student(xt, torch.tensor(t_k), c), torch.tensor(t_k)).float()
    if student_turn:
        with accelerator.autocast():
            others = (teacher, guidance.fake, schedule, t["matching"], noise["matching"], args.real_guidance_scale)
            losses["distribution matching"] = matching_loss(x, c, players.empty, *others)
            loss = args.dm_loss_weight * losses["distribution matching"]
            if gan:
                xt = schedule.add_noise(x, noise["generator"], t["generator"])
                losses["generator GAN"] = generator_gan_loss(guidance.logit(xt, t["generator"], c))
                loss = loss + args.gan_loss_weight * losses["generator GAN"]
        losses["student's gradient norm"] = players.student_updates.step(loss, accelerator)
    with accelerator.autocast():
        x = x.detach()
        losses["fake score"] = denoising_loss(x, c, guidance.fake, schedule, t["denoising"], noise["denoising"])
        loss = losses["fake score"]
        if gan:
            xt = schedule.add_noise(x, noise["discriminator"], t["discriminator"])
            real = schedule.add_noise(batch["real_x0"], noise["real"], t["real"])
            logits = guidance.logit(xt, t["discriminator"], c), guidance.logit(real, t["real"], batch["real_c"])
            losses["discriminator"] = discriminator_loss(*logits)
            loss = loss + args.discriminator_loss_weight * losses["discriminator"]
    losses["fake score's gradient norm"] = players.guidance_updates.step(loss, accelerator)
    players.student_updates.schedule.step()
    players.guidance_updates.schedule.step()
    return {name: value.detach() for name, value in losses.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Data and files


class Prompts(torch.utils.data.Dataset):
    """Prompts for the student with all that is random about an iteration but the student step. Keys are (index, *name
    of a generator), so that it depends on a sample's place in the global batch, not on the number of processes."""

    def __init__(self, prompts: list[str], latent_shape: tuple[int, ...], student_steps: int):
        self.prompts, self.latent_shape, self.student_steps = prompts, latent_shape, student_steps

    def __getitem__(self, key: tuple) -> dict:
        index, *name = key
        generator = data.rng(*name, "distillation")
        u = torch.rand(len(DRAWS), generator=generator)
        noises = torch.randn(self.student_steps + len(DRAWS), *self.latent_shape, generator=generator)
        drawn = {name: {"u": u[j], "noise": noises[j]} for j, name in enumerate(DRAWS)}
        return {"caption": self.prompts[index], "noises": noises[len(DRAWS) :], **drawn}


def batches(pipe, prompts, pictures, cache, args, interval: int, gan: bool, step: int, accelerator):
    """The batches of a phase from an iteration on, conditions encoded; with real latents for the GAN."""
    backbone, size = backbones.backbone_of(pipe), args.gan_train_batch_size if gan else args.train_batch_size
    count = (args.steps_with_gan if gan else args.steps_without_gan)[args.num_intervals - 1 - interval]
    phase = argparse.Namespace(**vars(args) | {"train_batch_size": size, "max_train_steps": count})
    shape, key = data.latent_shape(pipe, args), (interval, "gan" if gan else "plain")
    drawn = Prompts(prompts, shape, len(args.student_timesteps))
    keys = data.training_keys(len(prompts), phase, (*key, "prompts"), step, accelerator)
    loaders = [data.loader(drawn, keys, args)]
    if gan:
        real = data.Pictures(pictures, args, shape, augment=True, cache=cache)
        loaders.append(data.training_loader(real, phase, (*key, "pictures"), step, accelerator, None))
    for parts in zip(*loaders):
        with torch.no_grad():
            batch, *real = (send_to_device(part, accelerator.device, non_blocking=True) for part in parts)
            batch["c"] = backbone.conditions(backbone.encode(pipe, batch["caption"]))
            for part in real:
                batch["real_x0"] = data.latents(pipe.vae, part)
                batch["real_c"] = backbone.conditions(backbone.encode(pipe, part["caption"]))
        yield batch


def load_data(args: argparse.Namespace):
    """Pictures (None where neither the GAN nor the prompts need them), prompts of training and of samples.png."""
    pictures, prompts = None, sample.read_prompts(args.prompts_file) if args.prompts_file else []
    shown = prompts
    if any(args.steps_with_gan) or not prompts:
        if not (args.train_data_dir or args.dataset_name):
            from mini import world  # the domain that the mini teacher knows

            args.train_data_dir = os.path.relpath(world.image_folder("source", "train"))
            args.validation_data_dir = os.path.relpath(world.image_folder("source", "validation"))
        pictures, validation, _ = data.split_rows(args)
        shown = validation[args.caption_column]
        prompts = prompts or list(pictures[args.caption_column])
    return pictures, prompts, args.validation_prompts or list(shown[:8])


def load_pipeline(args: argparse.Namespace, accelerator):
    """The teacher in fp32; autocast does the rest. ValueError for a model that DMD2 cannot distil here."""
    pipe = backbones.load_pipeline(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=torch.float32
    ).to(accelerator.device)
    Schedule(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blackens samples.png
    if not (args.height and args.width):
        args.resolution = args.resolution or backbones.native_resolution(pipe)
    if any(side % (multiple := backbones.resolution_multiple(pipe)) for side in data.size_of(args)):
        raise ValueError(f"{data.size_of(args)} pixels: height and width must be multiples of this model's {multiple}")
    if accelerator.mixed_precision != "no":
        last = last_layer(getattr(pipe, backbones.backbone_of(pipe).denoiser))
        last.forward = partial(in_fp32, last)  # copies of the network get their own
    return pipe


def result_path(args: argparse.Namespace, interval: int) -> Path:
    """What marks an expert (or the routers, or the student) as finished."""
    out = Path(args.output_dir)
    if args.core_experts:
        return train_assemble.assembled_dir(args) / tsm_lora.ROUTER_FILE
    return out / "student" / "model_index.json" if args.full_finetuning else train_foster.expert_path(args, interval)


def claim_output_dir(pipe, args: argparse.Namespace) -> None:
    """Write args.json, or check it against an earlier run's: nothing is overwritten, nothing mixed."""
    folders = {i: train_foster.checkpoint_dir(args, i) for i in range(args.num_intervals)}
    known = [str(path) for folder in folders.values() for path in train_foster.checkpoints(folder)]
    finished = [i for i in folders if result_path(args, i).exists()]
    if not known and not finished:
        if args.core_experts:
            train_assemble.claim_output_dir(pipe, args)  # copies the experts too
        else:
            train_foster.write_args(args)
        return
    train_foster.check_same_run(args)
    if not args.resume_from_checkpoint:
        raise ValueError(
            f"{args.output_dir} holds this run already; add --resume_from_checkpoint latest to go on, or choose "
            "another --output_dir"
        )
    named = [train_foster.named_checkpoint(args, folder) for folder in folders.values()]
    if args.resume_from_checkpoint != "latest" and not any(named):
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: this run has {known}")


def save_result(pipe, players: Players, args: argparse.Namespace, interval: int, step: int) -> None:
    """The finished expert, routers or student; what can be sampled."""
    path, facts = result_path(args, interval), {"method": "DMD2", "student_timesteps": args.student_timesteps}
    facts |= {"steps": step, "seed": args.seed, "base_revision": args.revision}
    if args.save_guidance:
        file = Path(args.output_dir) / "guidance" / f"interval-{interval:03d}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(guidance_parameters(players.guidance), file.with_suffix(".partial"))
        os.replace(file.with_suffix(".partial"), file)
    if args.core_experts:
        names = [name for name, _, _ in train_assemble.banks(args)]
        players.experts.save_router(path, names, **facts)
    elif args.full_finetuning:
        partial_folder = path.parent.with_name("student.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        pipe.save_pretrained(partial_folder)
        shutil.rmtree(path.parent, ignore_errors=True)  # of a run that is repeated from a named checkpoint
        os.replace(partial_folder, path.parent)
    else:
        players.experts.save_expert(interval, path, **facts)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def attach(pipe, args: argparse.Namespace, interval: int) -> tuple[tsm_lora.Experts | None, list]:
    """The student's experts on the pipeline, and what of them trains, as pairs (whole, own) for `Updates`.

    One expert trains. The finished ones before it, of noisier intervals, are held in the same bank, since the rollout
    runs through them; of the stacked A and B the first `rank` rows are the one that trains.
    """
    network = getattr(pipe, backbones.backbone_of(pipe).denoiser)
    if args.full_finetuning:
        return None, [(p, p) for p in network.requires_grad_(True).parameters()]
    if args.core_experts:
        folders = [train_assemble.assembled_dir(args) / name for name, _, _ in train_assemble.banks(args)]
        experts = tsm_lora.assemble_experts(pipe, folders[0], folders[1:], args.router_inputs)
        return experts, [(p, p) for p in experts.router_parameters()]
    unet = backbones.backbone_of(pipe).denoiser == "unet"
    layers = args.lora_layers and [name.strip() for name in args.lora_layers.split(",")]
    experts = tsm_lora.attach_experts(
        pipe,
        args.num_intervals,
        range(interval, args.num_intervals),
        rank=args.rank,
        alpha=args.lora_alpha,
        lora_layers=layers or (LORA_LAYERS if unet else None),
        train_text_encoder=False,  # as in DMD2
        generator=data.rng(args.seed, interval, "A"),
    )
    for slot, earlier in enumerate(range(interval + 1, args.num_intervals), 1):
        experts.read_expert(slot, train_foster.expert_path(args, earlier))
        for layer in experts.layers.values():
            layer.expert(slot)[1].data.div_(layer.scaling)  # which the file has baked in
    return experts, [(whole, nn.Parameter(whole.detach()[: args.rank])) for whole in experts.parameters()]


def make_players(pipe, args: argparse.Namespace, interval: int, accelerator) -> Players:
    backbone = backbones.backbone_of(pipe)
    network = getattr(pipe, backbone.denoiser)
    if not args.low_memory:  # copies of the bare network, before experts
        teacher, fake = Denoiser(pipe, copy.deepcopy(network)), Denoiser(pipe, copy.deepcopy(network))
        if accelerator.mixed_precision == "bf16":
            teacher.bfloat16()
            last_layer(teacher.network).float().load_state_dict(last_layer(network).state_dict())
    experts, pairs = attach(pipe, args, interval)
    if args.low_memory:
        lora = FakeLoRA(experts, args.rank, args.lora_alpha / args.rank, data.rng(args.seed, interval, "fake"))
        teacher, fake = Denoiser(pipe, network, experts.off), Denoiser(pipe, network, lora.on)
        fake.lora = lora
    else:
        fake.requires_grad_(True)
        if args.gradient_checkpointing:
            for part in (fake.network, experts or network):
                part.enable_gradient_checkpointing()
    with torch.no_grad():
        empty = backbone.conditions(backbone.encode(pipe, [""]))
    others = (Guidance(fake), Schedule(pipe), backbone.process(pipe).draw_t, empty, pairs, experts)
    return Players(Denoiser(pipe, network), teacher, *others)


def guidance_parameters(guidance: Guidance) -> dict[str, nn.Parameter]:
    """Of fake score and head, all that trains; never the student's, with whom --low_memory shares the network."""
    parts = {"fake": getattr(guidance.fake, "lora", guidance.fake.network), "head": guidance.head}
    return {f"{name}.{k}": p for name, part in parts.items() if part is not None for k, p in part.named_parameters()}


def begin_phase(pipe, players: Players, args: argparse.Namespace, interval: int, gan: bool, count: int) -> None:
    """Fresh optimisers, and for the GAN a fresh head; the student and the fake score go on. Where those of stage 2
    come from is open (paper: not specified): from the teacher, or --initial_guidance of DMD2+LoRA."""
    if gan:
        seed = data.rng(args.seed, interval, "head").initial_seed()
        players.guidance.add_head(data.latent_shape(pipe, args), players.empty, seed)
    if args.initial_guidance and players.student_updates is None:  # the first phase of this expert
        saved, own = load_file(args.initial_guidance), guidance_parameters(players.guidance)
        needed = {name: p.shape for name, p in own.items() if name.startswith("fake.") or name in saved}
        if wrong := [name for name, shape in needed.items() if name not in saved or saved[name].shape != shape]:
            what = "lacks" if wrong[0] not in saved else "has another shape of"
            raise ValueError(f"--initial_guidance {args.initial_guidance} is another model's, it {what} {wrong[0]}")
        for name in own.keys() & saved.keys():
            own[name].data.copy_(saved[name])
    rates = args.learning_rate, args.guidance_learning_rate
    rates = (args.gan_learning_rate, args.gan_guidance_learning_rate) if gan else rates
    guidance = [(p, p) for p in guidance_parameters(players.guidance).values()]
    players.student_updates = Updates("student", players.pairs, rates[0], args, count)
    players.guidance_updates = Updates("guidance", guidance, rates[1], args, count)


def student_step(args: argparse.Namespace, interval: int, gan: bool, iteration: int) -> int:
    """Which student step an iteration trains: one for the batch and all processes, at random among the expert's own
    (a constant with an expert per timestep)."""
    steps = own_steps(args, interval)
    generator = data.rng(args.seed, interval, gan, iteration, "student step")
    return steps[torch.randint(len(steps), (), generator=generator).item()]


def distill(pipe, pictures, prompts, cache, args: argparse.Namespace, interval: int, accelerator) -> None:
    """Both phases of one expert (or the LoRA, the routers, the full student), from its last checkpoint if it has one.

    Raises FloatingPointError that names a loss which is not finite; checkpoints are written after that check only.
    """
    place = args.num_intervals - 1 - interval  # flags count from the noisiest
    lengths = {False: args.steps_without_gan[place], True: args.steps_with_gan[place]}
    players, folder = make_players(pipe, args, interval, accelerator), train_foster.checkpoint_dir(args, interval)
    state, seconds = None, 0.0
    earlier = sum(args.steps_without_gan[:place] + args.steps_with_gan[:place])  # trackers want one growing count
    if (checkpoint := train_foster.checkpoint_to_resume(args, folder)) is not None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        accelerator.print(f"expert {interval} goes on from {checkpoint}")
    for gan, before in ((False, 0), (True, lengths[False])):
        if not lengths[gan] or (state and state["gan"] and not gan):  # that phase is over
            continue
        begin_phase(pipe, players, args, interval, gan, lengths[gan])
        first = 0
        if state and state["gan"] == gan:
            players.student_updates.load(state["student"])
            players.guidance_updates.load(state["guidance"])
            first, state = state["step"] - before, None
        own, named = [args.student_timesteps[k] for k in own_steps(args, interval)], "with" if gan else "without"
        progress = tqdm(
            batches(pipe, prompts, pictures, cache, args, interval, gan, first, accelerator),
            initial=first,
            total=lengths[gan],
            desc=f"t {own} {named} GAN",
            disable=not accelerator.is_local_main_process,
        )
        recent, start = [], time.perf_counter()
        for iteration, batch in enumerate(progress, first):
            student_turn = iteration % args.update_ratio == 0  # the first iteration too, as in DMD2
            k = student_step(args, interval, gan, iteration)
            losses = iterate(players, batch, k, student_turn, gan, args, accelerator)
            step = before + iteration + 1
            recent.append((step, losses))
            save = step % args.checkpointing_steps == 0
            if save or step % LOGGING_STEPS == 0 or iteration + 1 == lengths[gan]:
                means = check_and_average(recent, accelerator)
                recent.clear()
                progress.set_postfix(fake=f"{means['fake score']:.4f}")
                scalars = {f"{name}/interval-{interval:03d}": value for name, value in means.items()}
                accelerator.log(scalars, step=earlier + step)
            if save and accelerator.is_main_process:
                now = {"step": step, "gan": gan, "student": players.student_updates.state()}
                now["guidance"] = players.guidance_updates.state()
                with train_foster.new_checkpoint(folder, now, args.checkpoints_total_limit):
                    pass  # what can be sampled comes at the end
        seconds += time.perf_counter() - start
    if accelerator.is_main_process:
        save_result(pipe, players, args, interval, sum(lengths.values()))
        record = {"without_gan": lengths[False], "with_gan": lengths[True], "seconds": seconds}
        record |= {"student_updates": sum(-(-length // args.update_ratio) for length in lengths.values())}
        record |= {"seconds_since": checkpoint and checkpoint.name}  # a resumed run knows its own time alone
        train_foster.write_json(Path(args.output_dir) / "training" / f"interval-{interval:03d}.json", record)
    accelerator.wait_for_everyone()
    if args.low_memory:
        players.guidance.fake.lora.remove()
    if players.experts is not None:
        players.experts.unload()


def check_and_average(recent: list[tuple[int, dict]], accelerator) -> dict[str, float]:
    """Means by name over iterations and processes; FloatingPointError where one is not finite."""
    names = {name: None for _, losses in recent for name in losses}
    values = [torch.stack([losses[name] for _, losses in recent if name in losses]).mean() for name in names]
    means = dict(zip(names, accelerator.reduce(torch.stack(values).float(), "mean").tolist()))
    if not all(map(math.isfinite, means.values())):
        found = ((step, [n for n, v in losses.items() if not v.isfinite()]) for step, losses in recent)
        step, bad = next(((step, bad) for step, bad in found if bad), (recent[-1][0], list(names)))
        raise FloatingPointError(
            f"not finite at iteration {step}: {', '.join(bad)}. The checkpoints before are whole, but would lead here "
            "again: start anew in another --output_dir with lower learning rates, a higher --update_ratio or a lower "
            "--gan_loss_weight"
        )
    return means


def draw_student(pipe, prompts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """A picture per prompt at the student's timesteps, each from its own noise. diffusers' LCMScheduler takes exactly
    these steps: its boundary scalings differ from 1 and 0 by 4e-8 at t = 249, and its own default are other t."""
    before, (height, width) = pipe.scheduler, data.size_of(args)
    pipe.scheduler = LCMScheduler.from_config(before.config)
    images = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(k) for k in range(len(prompts))],
        timesteps=args.student_timesteps,
        guidance_scale=0.0,
        height=height,
        width=width,
        **backbones.backbone_of(pipe).sampling(pipe),
    ).images
    pipe.scheduler, larger = before, -(-128 // width)
    return [image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST) for image in images]


def report(pipe, teacher, prompts: list[str], args: argparse.Namespace) -> None:
    """samples.png, the teacher's pictures above the student's from the same noise; training.json."""
    images, folder, out = train_foster.draw(teacher, prompts, args), result_path(args, 0).parent, Path(args.output_dir)
    if args.full_finetuning:
        pipe = backbones.load_pipeline(folder).to(pipe.device)
        pipe.set_progress_bar_config(disable=True)
    else:
        tsm_lora.load_experts(pipe, folder)
    images += draw_student(pipe, prompts, args)
    make_image_grid(images, rows=2, cols=len(prompts)).save(out / "samples.png")
    records = {path.stem: json.loads(path.read_text()) for path in sorted((out / "training").glob("*.json"))}
    train_foster.write_json(out / "training.json", records)
    print(f"\n{out / 'samples.png'}, the teacher at {args.num_inference_steps} steps above the student")
    for name, record in records.items():
        print(f"{name}: {record['student_updates']} student updates, {record['seconds']:.0f} s")


def main(args: argparse.Namespace) -> None:
    accelerator = train_foster.make_accelerator(args)
    args.global_gan_batch = args.gan_train_batch_size * accelerator.num_processes
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16: distillation diverges in it; use bf16 or no")
    if train_foster.is_video(args):
        raise ValueError(f"{args.pretrained_model_name_or_path} makes clips: distillation is for models of pictures")
    with accelerator.main_process_first():
        pictures, prompts, shown = load_data(args)
    pipe = load_pipeline(args, accelerator)
    if accelerator.is_main_process:
        claim_output_dir(pipe, args)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("distill_dmd2", {k: str(v) for k, v in vars(args).items()})
    accelerator.print(f"{len(prompts)} prompts; students at t = {args.student_timesteps}")
    cache = data.build_caches(pipe, pictures, pictures, args, accelerator)["train"] if pictures else None
    for interval in reversed(range(args.num_intervals)):
        folder = train_foster.checkpoint_dir(args, interval)
        if result_path(args, interval).exists() and train_foster.named_checkpoint(args, folder) is None:
            accelerator.print(f"expert {interval} is finished, skipping it")
            continue
        distill(pipe, pictures, prompts, cache, args, interval, accelerator)
    if accelerator.is_main_process:
        report(pipe, load_pipeline(args, accelerator) if args.full_finetuning else pipe, shown, args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
