"""TimeStep Master (arXiv:2503.07416): one LoRA expert per timestep interval.

Use it on any stock pipeline (`sample.py` is the long form):

    pipe = StableDiffusionPipeline.from_pretrained("mini/sd15")
    experts = load_experts(pipe, "output/foster-n8/experts-n8")
    image = pipe("a red circle and a blue square").images[0]   # each step runs the expert of its own t
    experts.unload()                                           # leaves no trace

Direction of time. The T = 1000 training timesteps t in {0 .. T-1} GROW WITH NOISE. Of n intervals, interval i holds
the t with floor(t * n / T) == i: interval 0 is the cleanest, interval n-1 the noisiest. The field uses both
directions, so every expert file states this one.

Fostering (stage 1, Sec. 3.1, Eq. 3-4). For a scale n there are n independent LoRAs, and LoRA i only ever sees t of
interval i; n = 1 is vanilla LoRA. A layer with base weight W computes at timestep t

    y = W x + b + (alpha / r) * B_i A_i x,   i = floor(t * n / T),   B_i = 0 at the start.

Symbols: T training timesteps, n intervals, i interval index, t timestep, S experts held, r rank, B batch, L tokens,
A (r, d_in) and B (d_out, r) the two factors of an expert. Shapes stand at line ends where they change.
"""

import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

T = 1000  # training timesteps of every supported model
FORMAT_VERSION = 1
# What a loader needs of a header; from the third on, all experts of a set agree.
FACTS = ("interval_index", "base_fingerprint", "num_intervals", "rank", "backbone", "targets", "prediction_type")
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def interval_bounds(n: int) -> list[int]:
    """The n + 1 boundaries of n equal intervals of {0 .. T-1}: interval i holds bounds[i] <= t < bounds[i + 1].

    Where n does not divide T, a ceil rule counted from t = 1 would move a few boundary steps (paper: not specified).
    Raises ValueError unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ValueError(f"the number of intervals must lie in 1..{T}, got {n}")
    return [-(-i * T // n) for i in range(n + 1)]


def interval_index(t: torch.Tensor | float, n: int) -> torch.Tensor:
    """Interval of each timestep, floor(t * n / T); a float t in (0, T] counts as min(floor(t), T - 1). Any shape."""
    return torch.as_tensor(t).floor().long().clamp(max=T - 1) * n // T


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Route:
    """Which experts the layers run now: `slot` is an int or 0-dim tensor (one for all rows) or a (B,) tensor."""

    slot: int | torch.Tensor
    scale: float
    folded: bool = False  # the denoiser's weights hold the expert already


class Routing:
    """The one place that knows t while a forward (or its recomputation in the backward pass) is running."""

    def __init__(self, n: int, indices: list[int], scale: float):
        self.n, self.indices, self.scale = n, indices, scale
        self.slot_of = {i: slot for slot, i in enumerate(indices)}
        self.route: Route | None = None
        self.enabled = True
        self._tables: dict[torch.device, torch.Tensor] = {}  # interval -> slot

    def slots(self, t: torch.Tensor | float) -> int | torch.Tensor:
        """Slots of the experts that serve t; an int where all of t share one. ValueError where there is none.

        Reading t costs a device synchronisation, so it is done in sampling only: a training loop draws t itself.
        """
        t = torch.as_tensor(t)
        on_host = t.device.type == "cpu" or not torch.is_grad_enabled()
        if on_host and not torch.compiler.is_compiling():
            t_host = t.cpu()
            if t_host.min() < 0 or t_host.max() > T:
                raise ValueError(f"timesteps {t_host.tolist()} leave 0..{T}; t must count {T} training steps")
            intervals = interval_index(t_host, self.n).unique().tolist()
            missing = [i for i in intervals if i not in self.slot_of]
            if missing:
                raise ValueError(
                    f"t falls into interval(s) {missing} of {self.n}, but only the experts of {self.indices} are here"
                )
            if len(intervals) == 1:
                return self.slot_of[intervals[0]]
        elif len(self.indices) == 1:
            return 0
        index = interval_index(t, self.n)
        if len(self.indices) == self.n:
            return index
        if t.device not in self._tables:
            table = [self.slot_of.get(i, -1) for i in range(self.n)]
            self._tables[t.device] = torch.tensor(table, device=t.device)
        return self._tables[t.device].take(index)

    def current(self) -> Route:
        """The route of the running forward; RuntimeError outside of one, since a guessed t would be a silent error."""
        if self.route is None:
            raise RuntimeError(
                "a layer with timestep experts ran, but no t is set. Call the denoiser itself (its hook reads "
                "`timestep`), run text encoders inside `with experts.at(t):`, and turn on gradient checkpointing by "
                "`experts.enable_gradient_checkpointing()`, which remembers t for the backward pass."
            )
        return self.route

    def recompute_context(self):
        """`context_fn` of torch.utils.checkpoint: recompute under the route of the forward, whatever ran since."""
        route, enabled = self.route, self.enabled

        @contextmanager
        def recompute():
            later = self.route, self.enabled
            self.route, self.enabled = route, enabled
            try:
                yield
            finally:
                self.route, self.enabled = later

        return nullcontext(), recompute()


class ExpertLayer(nn.Module):
    """All S experts of one Linear or Conv2d, stacked into one LoRA of rank S * r with a one-hot weight between.

    A is (S * r, d_in) or (S * r, c_in, kh, kw), B is stored transposed as (S * r, d_out), so that one expert is a
    contiguous slice of both. It is a child of the adapted layer, which stays the object that it was.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, num_experts: int, rank: int, alpha: float, routing: Routing):
        super().__init__()
        shape_in, d_out = _layer_shape(base)
        self.rank, self.scaling, self.routing = rank, alpha / rank, routing
        device = base.weight.device
        self.A = nn.Parameter(torch.zeros(num_experts * rank, *shape_in, device=device))  # (S*r, d_in[, kh, kw])
        self.B = nn.Parameter(torch.zeros(num_experts * rank, d_out, device=device))  # (S*r, d_out)

    def expert(self, slot: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors A (r, d_in[, kh, kw]) and B (r, d_out) of one slot; a 0-dim tensor keeps one compiled graph."""
        if isinstance(slot, int):
            rows = slice(slot * self.rank, (slot + 1) * self.rank)
            return self.A[rows], self.B[rows]
        rows = slot * self.rank + torch.arange(self.rank, device=slot.device)
        return self.A.index_select(0, rows), self.B.index_select(0, rows)

    def forward(self, x: torch.Tensor, project: Callable) -> torch.Tensor:
        """The experts' addition to `base(x)`: x (rows, ..., d_in) or (rows, c_in, h, w), rows = B * k, b slowest.

        `project(x, weight, None)` is F.linear or the base's convolution (its stride, padding, dilation).
        """
        route = self.routing.current()
        if isinstance(route.slot, int) or route.slot.ndim == 0:
            A, B = self.expert(route.slot)
            weight = None
        else:
            A, B = self.A, self.B
            if x.shape[0] % len(route.slot):
                raise ValueError(f"{x.shape[0]} rows cannot be split over a batch of {len(route.slot)} timesteps")
            slot = route.slot.repeat_interleave(x.shape[0] // len(route.slot))  # video: B*F or B*H*W rows
            weight = F.one_hot(slot, len(A) // self.rank).repeat_interleave(self.rank, 1)  # (rows, S*r)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        z = project(x, A, None)  # (rows, ..., S*r) or (rows, S*r, h', w')
        if weight is not None:
            shape = (*weight.shape, 1, 1) if A.ndim == 4 else (len(weight), *[1] * (z.ndim - 2), weight.shape[1])
            z = z * weight.view(shape).to(z.dtype)
        z = z * (self.scaling * route.scale)
        return F.conv2d(z, B.t()[:, :, None, None]) if A.ndim == 4 else F.linear(z, B.t())

    def delta(self, slot: int) -> torch.Tensor:
        """What one expert adds to the base weight, alpha / r * B A in fp32: (d_out, d_in[, kh, kw])."""
        A, B = (factor.detach().float() for factor in self.expert(slot))
        return (B.t() @ A.flatten(1)).view(B.shape[1], *A.shape[1:]) * self.scaling


def _layer_shape(base: nn.Module) -> tuple[tuple[int, ...], int]:
    if isinstance(base, nn.Conv2d):
        return (base.in_channels, *base.kernel_size), base.out_channels
    return (base.in_features,), base.out_features


def _add_experts(base: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted layer."""
    routing = base.tsm.routing
    if not routing.enabled or (routing.route is not None and routing.route.folded):
        return output
    project = base._conv_forward if isinstance(base, nn.Conv2d) else F.linear
    return output + base.tsm(args[0], project).to(output.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: all that differs between model families


def _ddpm_scheduler(pipe):
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def _ddpm_t(u: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Uniform integers of [low, high) from uniform u in [0, 1), Eq. 4."""
    return (low + (u * (high - low)).long()).clamp(max=high - 1)


def _ddpm_diffuse(scheduler, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x_t and the regression target of epsilon, v or x0 prediction."""
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(x0, noise, t),
        "sample": lambda: x0,
    }
    return scheduler.add_noise(x0, noise, t), targets[scheduler.config.prediction_type]()


def _sd_conditions(encoded: tuple) -> dict[str, torch.Tensor]:
    prompt, negative = encoded
    return {"encoder_hidden_states": prompt if negative is None else torch.cat([negative, prompt])}


@dataclass(frozen=True)
class Backbone:
    """What the method must know of a model family. `pipe` is its stock diffusers pipeline."""

    denoiser: str  # component that takes `timestep`
    text_encoders: dict[str, tuple[str, ...]]  # component: LoRA targets of the paper
    targets: tuple[str, ...]  # LoRA targets of the denoiser
    encode: Callable  # (pipe, prompts) -> what `pipe.encode_prompt` returns without guidance
    conditions: Callable  # what `pipe.encode_prompt` returned -> denoiser arguments, joined as the pipeline joins them
    noise_scheduler: Callable  # (pipe) -> scheduler of the training process
    draw_t: Callable  # (u in [0, 1), low, high) -> t of the interval
    diffuse: Callable  # (scheduler, x0, noise, t) -> x_t, target
    t_scale: float = 1.0  # the denoiser's `timestep` times this is t in 0..T


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# By the beginning of the pipeline's class name; the longest that fits counts.
BACKBONES = {
    "StableDiffusion": Backbone(  # SD1.x and SD2.x; appendix A.1
        denoiser="unet",
        text_encoders={"text_encoder": ("q_proj", "v_proj")},
        targets=ATTENTION,
        encode=lambda pipe, prompts: pipe.encode_prompt(prompts, pipe.unet.device, 1, False),
        conditions=_sd_conditions,
        noise_scheduler=_ddpm_scheduler,
        draw_t=_ddpm_t,
        diffuse=_ddpm_diffuse,
    ),
}
# Families whose names begin like a known one, but which need an entry of their own.
WITHOUT_ENTRY = ("StableDiffusionXL", "StableDiffusion3")


def backbone_of(pipe) -> Backbone:
    """The table's entry for a pipeline. ValueError for an unknown family or a pipeline that lacks a component."""
    name = type(pipe).__name__
    known = sorted((key for key in BACKBONES if name.startswith(key)), key=len)
    if not known or any(name.startswith(other) and len(other) > len(known[-1]) for other in WITHOUT_ENTRY):
        raise ValueError(f"no backbone entry for {name}; there are {sorted(BACKBONES)} (BACKBONES in tsm_lora.py)")
    backbone = BACKBONES[known[-1]]
    missing = [c for c in (backbone.denoiser, *backbone.text_encoders) if getattr(pipe, c, None) is None]
    if missing:
        raise ValueError(f"this {name} has no {', '.join(missing)}; load it from a complete pipeline folder")
    return backbone


# ---------------------------------------------------------------------------------------------------------------------
# Experts on a pipeline


def attach_experts(
    pipe,
    num_intervals: int,
    indices: Iterable[int] | None = None,
    rank: int = 4,
    alpha: float | None = None,
    lora_layers: Iterable[str] | None = None,
    train_text_encoder: bool = True,
    generator: torch.Generator | None = None,
) -> "Experts":
    """Put fresh, trainable experts (A Kaiming, B = 0: the identity) on a pipeline whose weights are frozen.

    Args:
        indices: the intervals to hold an expert for; all n by default.
        alpha: the addition is scaled by alpha / rank; alpha = rank by default (paper: not specified).
        lora_layers: module names of the denoiser (suffixes); the paper's of that backbone by default.
        generator: CPU generator of A.

    Raises ValueError for an interval out of range, a module name that matches nothing, a rank beyond a layer's width.
    """
    backbone = backbone_of(pipe)
    bounds = interval_bounds(num_intervals)
    indices = list(range(num_intervals)) if indices is None else sorted(set(indices))
    if not indices or indices[0] < 0 or indices[-1] >= num_intervals:
        raise ValueError(f"interval indices must lie in 0..{len(bounds) - 2}, got {indices}")
    targets = {backbone.denoiser: tuple(lora_layers or backbone.targets)}
    if train_text_encoder:
        targets |= backbone.text_encoders
    experts = Experts(pipe, backbone, targets, num_intervals, indices, rank, rank if alpha is None else alpha)
    for layer in experts.layers.values():
        A = torch.empty(layer.A.shape)
        # PEFT's default, https://github.com/huggingface/peft/blob/v0.11.0/src/peft/tuners/lora/layer.py#L132
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        layer.A.data.copy_(A)
    for component in experts.components.values():
        component.requires_grad_(False)
    for parameter in experts.parameters():
        parameter.requires_grad_(True)
    return experts


def load_experts(pipe, folder: str | os.PathLike, scale: float = 1.0, check_base: bool = True) -> "Experts":
    """Put the experts of a folder on a pipeline: from now on `pipe(prompt)` runs, at each step, the expert of its t.

    Args:
        folder: one `interval-*.safetensors` per interval, as `train_foster.py` writes them.
        scale: strength of all experts; `cross_attention_kwargs={"scale": s}` of a call multiplies it.
        check_base: refuse experts whose base model has other weights than this pipeline.

    Raises ValueError that lists what is there and what is missing, doubled, foreign, truncated or misshapen.
    """
    backbone = backbone_of(pipe)
    denoiser = getattr(pipe, backbone.denoiser)
    if hasattr(denoiser, "_orig_mod") or any(p.is_meta for p in denoiser.parameters()):
        raise ValueError("load experts before torch.compile and before offloading, which hide the layers")
    files = read_folder(folder)
    facts = files[0][0]
    targets = {component: tuple(names) for component, names in facts["targets"].items()}
    if facts["backbone"] != type(denoiser).__name__:
        raise ValueError(f"experts of a {facts['backbone']} ({facts['base_model']}) do not fit this pipeline")
    n, rank = facts["num_intervals"], facts["rank"]
    experts = Experts(pipe, backbone, targets, n, list(range(n)), rank, rank, scale)
    try:
        if check_base and not experts.same_base(facts["base_fingerprint"]):
            raise ValueError(
                f"the experts in {folder} were trained on {facts['base_model']!r}, whose weights are not those of "
                f"{base_name(pipe)!r}; load that base model, or pass check_base=False to use them all the same"
            )
        for slot, (_, path) in enumerate(files):
            experts.read_expert(slot, path)
        for name, layer in experts.layers.items():
            layer.requires_grad_(False).to(dtype=_floating(experts.bases[name].weight.dtype))
        experts.follow_prompts()
    except Exception:
        experts.unload()
        raise
    return experts


def unload_experts(pipe) -> None:
    """Take the experts off a pipeline, without a trace; nothing happens where there are none."""
    if "_tsm_experts" in vars(pipe):
        pipe._tsm_experts.unload()


class Experts:
    """The experts attached to a pipeline; made by `attach_experts` (to train) or `load_experts` (to sample)."""

    def __init__(self, pipe, backbone, targets, n, indices, rank, alpha, scale=1.0):
        if "_tsm_experts" in vars(pipe):
            raise ValueError("this pipeline carries experts already; call unload_experts(pipe) first")
        self.pipe, self.backbone, self.targets, self.rank, self.alpha = pipe, backbone, targets, rank, alpha
        self.routing = Routing(n, indices, scale)
        self.components = {name: getattr(pipe, name) for name in (backbone.denoiser, *backbone.text_encoders)}
        self.bases: dict[str, nn.Module] = {}  # "<component>.<module>": the adapted layer
        for component, names in targets.items():
            self.bases |= _find_layers(component, getattr(pipe, component), names)
        for name, base in self.bases.items():
            shape_in, d_out = _layer_shape(base)
            if not 1 <= rank <= min(math.prod(shape_in), d_out):
                raise ValueError(f"rank {rank} does not fit {name}, which maps {math.prod(shape_in)} to {d_out}")
        self.layers: dict[str, ExpertLayer] = {}
        self._handles = []
        for name, base in self.bases.items():
            base.tsm = self.layers[name] = ExpertLayer(base, len(indices), rank, alpha, self.routing)
            self._handles.append(base.register_forward_hook(_add_experts))
        denoiser = self.components[backbone.denoiser]
        self._argument_names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._handles.append(denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True))
        self._handles.append(denoiser.register_forward_hook(self._after_denoiser, always_call=True))
        modules = [module for component in self.components.values() for module in component.modules()]
        self._attention = [module for module in modules if hasattr(module, "fuse_projections")]
        parameters = [p for component in self.components.values() for p in component.parameters()]
        self._before = [(p, "requires_grad", p.requires_grad) for p in parameters]  # what `unload` restores
        for name in ("training", "gradient_checkpointing", "_gradient_checkpointing_func"):
            self._before += [(m, name, getattr(m, name)) for m in modules if name in vars(m)]
        self._encode_prompt: Callable | None = None  # the pipeline's own, once text-encoder experts follow prompts
        self._prompt: tuple | None = None
        self._originals: dict[str, torch.Tensor] = {}  # base weights while `folded`
        self._folded: tuple | None = None  # the (slot, scale) that the weights hold, None for the base
        pipe._tsm_experts = self

    def parameters(self, component: str = "") -> list[nn.Parameter]:
        """A and B of every layer (of one component), in a fixed order."""
        layers = [layer for name, layer in self.layers.items() if component in ("", name.split(".")[0])]
        return [p for layer in layers for p in (layer.A, layer.B)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Raw A and B by layer (alpha not baked in): what a checkpoint needs."""
        return {f"{name}.{k}": getattr(layer, k).detach() for name, layer in self.layers.items() for k in ("A", "B")}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise ValueError("the checkpoint holds other layers or another rank than this run")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @contextmanager
    def at(self, t: torch.Tensor | float, scale: float = 1.0):
        """Run text encoders at t, a number or (B,): `with experts.at(t): encoder(ids)`."""
        self._prompt = None  # from here on the caller brings the conditions
        with self._at(t, scale):
            yield

    @contextmanager
    def _at(self, t: torch.Tensor | float, scale: float):
        self.routing.route = Route(self.routing.slots(t), self.routing.scale * scale)
        try:
            yield
        finally:
            self.routing.route = None

    @contextmanager
    def off(self):
        """The base model alone."""
        before, self.routing.enabled = self.routing.enabled, False
        try:
            yield
        finally:
            self.routing.enabled = before

    def predict(self, xt: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The denoiser's output for x_t (B, c, h, w) at t (B,), each prompt encoded at its own t: for training."""
        with self.at(t):
            conditions = self.backbone.conditions(self.backbone.encode(self.pipe, prompts))
        denoiser = self.components[self.backbone.denoiser]
        return denoiser(xt, timestep=t / self.backbone.t_scale, return_dict=False, **conditions)[0]

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing whose recomputation runs at the t of its own forward, also if t has changed since."""
        func = functools.partial(checkpoint, use_reentrant=False, context_fn=self.routing.recompute_context)
        for component in self.components.values():
            component.train()  # transformers checkpoints in training mode only
            for module in component.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing, module._gradient_checkpointing_func = True, func

    def unload(self) -> None:
        """Restore the pipeline as it was before: weights, hooks, child modules, modes, `encode_prompt`."""
        self._unfold()
        for handle in self._handles:
            handle.remove()
        for base in self.bases.values():
            del base.tsm
        if self._encode_prompt is not None:
            del self.pipe.encode_prompt
        for owner, name, value in self._before:
            setattr(owner, name, value)
        del self.pipe._tsm_experts

    # -- the denoiser's hooks

    def _before_denoiser(self, denoiser: nn.Module, args: tuple, kwargs: dict):
        if not self.routing.enabled:
            self._unfold()
            return None
        if any(type(module.processor).__name__.startswith("Fused") for module in self._attention):
            raise ValueError("fused q, k, v projections bypass the experts: call unfuse_qkv_projections()")
        arguments = dict(zip(self._argument_names, args)) | kwargs
        t = torch.as_tensor(arguments["timestep"]) * self.backbone.t_scale
        scale = self.routing.scale * _call_scale(arguments)
        slot = self.routing.slots(t)
        if self._prompt is not None:
            arguments |= self._conditions(t, slot, arguments)
        if self._originals:
            self._fold(t, slot, scale)
        self.routing.route = Route(slot, scale, folded=bool(self._originals))
        return (), arguments

    def _after_denoiser(self, *_) -> None:
        self.routing.route = None

    # -- text-encoder experts under a plain `pipe(prompt)`

    def follow_prompts(self) -> None:
        """Encode each prompt once per interval in use. Pipelines encode before they know their timesteps, so remember
        the arguments of `encode_prompt`, and at the denoiser swap in the conditions of its t."""
        if len(self.targets) == 1:
            return  # no text encoder has experts
        if not hasattr(self.pipe, "encode_prompt"):
            raise ValueError(f"{type(self.pipe).__name__} has no encode_prompt: text-encoder experts cannot follow it")
        self._encode_prompt = self.pipe.encode_prompt
        signature = inspect.signature(self._encode_prompt)

        def encode_prompt(*args, **kwargs):
            if self.routing.route is not None:  # inside `with experts.at(t)`: the caller routes
                self._prompt = None
                return self._encode_prompt(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            given = [k for k in arguments if k.endswith("prompt_embeds") and arguments[k] is not None]
            if given:
                raise ValueError(
                    f"got {', '.join(given)}: text-encoder experts encode the prompt at each t, give text"
                )
            with self.off():  # a stand-in of the right shape, which the denoiser never sees
                encoded = self._encode_prompt(*args, **kwargs)
            stand_in = self.backbone.conditions(encoded)
            self._prompt = (functools.partial(self._encode_prompt, *args, **kwargs), stand_in, {})
            self._prompt_scale = 1.0 if arguments.get("lora_scale") is None else arguments["lora_scale"]
            return encoded

        self.pipe.encode_prompt = encode_prompt

    @torch.compiler.disable
    @torch.no_grad()
    def _conditions(self, t: torch.Tensor, slot: int | torch.Tensor, arguments: dict) -> dict[str, torch.Tensor]:
        encode, stand_in, encoded = self._prompt
        slot = slot if isinstance(slot, int) else self.routing.slots(t)  # a tensor in a compiled denoiser
        for name, tensor in stand_in.items():
            if arguments[name] is not tensor:
                if arguments[name].shape != tensor.shape or not torch.equal(arguments[name], tensor):
                    raise ValueError(
                        f"{name} {tuple(arguments[name].shape)} is not what this pipeline's encode_prompt made of the "
                        f"prompt, {tuple(tensor.shape)}: text-encoder experts cannot tell how to encode it at t"
                    )
                stand_in[name] = arguments[name]  # the pipeline passes the same tensor at every step
        if not isinstance(slot, int):
            raise ValueError("text-encoder experts need one t per denoiser call in sampling, got several")
        if slot not in encoded:  # encode for the rest of the schedule at once, while the encoders are on the device
            t = t.flatten()[0].item()
            for step in [t] + [step for step in self.pipe.scheduler.timesteps.tolist() if step < t]:
                if (key := self.routing.slots(step)) not in encoded:
                    with self._at(step, self._prompt_scale):
                        encoded[key] = self.backbone.conditions(encode())
        return encoded[slot]

    # -- folding

    @contextmanager
    def folded(self):
        """Sample at the speed of the base: `with experts.folded(): pipe(prompt)`.

        The expert of the current interval is added to the denoiser's weights in fp32 and swapped when t enters
        another interval; on leaving, also by an exception, the weights are restored bit for bit. Costs a copy of the
        adapted weights. Raises ValueError for offloaded, half-precision or quantised weights: W + BA rounded to bf16
        loses about half of an expert of |BA| = 0.2 % |W|.
        """
        bases = {name: base for name, base in self.bases.items() if name.split(".")[0] == self.backbone.denoiser}
        for name, base in bases.items():
            if base.weight.dtype != torch.float32 or base.weight.is_meta:
                kind = "offloaded" if base.weight.is_meta else base.weight.dtype
                raise ValueError(f"{name} is {kind}, experts fold into fp32 weights only: run unfolded")
        self._originals = {name: base.weight.detach().clone() for name, base in bases.items()}
        try:
            yield self
        finally:
            self._unfold()
            self._originals = {}

    @torch.compiler.disable
    @torch.no_grad()
    def _fold(self, t: torch.Tensor, slot: int | torch.Tensor, scale: float) -> None:
        slot = slot if isinstance(slot, int) else self.routing.slots(t)
        if not isinstance(slot, int):
            raise ValueError("folded experts serve one interval per denoiser call, this call mixes several")
        if self._folded == (slot, scale):
            return
        self._folded = (None, scale)  # half done is neither base nor expert
        for name, weight in self._originals.items():
            base = self.bases[name].weight.data
            base.copy_(weight.to(base.device) + self.layers[name].delta(slot).to(base.device) * scale)
        self._folded = (slot, scale)

    def _unfold(self) -> None:
        if self._folded is not None:
            for name, weight in self._originals.items():
                self.bases[name].weight.data.copy_(weight)
            self._folded = None

    # -- files

    def fingerprint(self) -> list[float]:
        """16 entries of the first and the last adapted base weight of each component; 0 for quantised weights."""
        entries = []
        for component in self.targets:
            own = [base.weight.detach() for name, base in self.bases.items() if name.split(".")[0] == component]
            for weight in (own[0].flatten(), own[-1].flatten()):
                picked = weight[:: max(1, len(weight) // 16)][:16].float()
                entries += picked.tolist() if weight.is_floating_point() else [0.0] * 16
        return entries

    def same_base(self, fingerprint: list[float]) -> bool:
        return _close(self.fingerprint(), fingerprint)

    def save_expert(self, index: int, path: str | os.PathLike, **facts) -> None:
        """Write the expert of one interval as an ordinary LoRA file, with alpha / r baked into B: loaders that know
        nothing of alpha give the same result. The header holds every fact about it. `facts` are added to it."""
        slot = self.routing.slot_of[index]
        bounds = interval_bounds(self.routing.n)
        tensors = {}
        for name, layer in self.layers.items():
            A, B = (factor.detach().float() for factor in layer.expert(slot))
            B = (B * layer.scaling).t()  # (d_out, r)
            key = _file_key(name)
            tensors[f"{key}.lora_A.weight"] = A.contiguous().cpu()
            tensors[f"{key}.lora_B.weight"] = (B[:, :, None, None] if A.ndim == 4 else B).contiguous().cpu()
        header = {
            "format_version": FORMAT_VERSION,
            "base_model": base_name(self.pipe),
            "base_fingerprint": self.fingerprint(),
            "backbone": type(self.components[self.backbone.denoiser]).__name__,
            "T": T,
            "t_direction": "t grows with noise, interval 0 is the cleanest",
            "num_intervals": self.routing.n,
            "interval_index": index,
            "timesteps": [bounds[index], bounds[index + 1] - 1],
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": self.targets,
            "prediction_type": self.pipe.scheduler.config.get("prediction_type"),
            **facts,
        }
        metadata = {
            "format": "pt",
            "tsm": json.dumps(header),
            # https://github.com/Stability-AI/ModelSpec as kohya's trainers write it: drawn from [min, max)
            "modelspec.timestep_range": f"{bounds[index]},{bounds[index + 1]}",
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, metadata)
        os.replace(partial, path)

    def read_expert(self, slot: int, path: Path) -> None:
        """Copy one expert file into a slot; ValueError where it does not hold exactly this model's layers."""
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            wanted = {f"{_file_key(name)}.lora_{k}.weight" for name in self.layers for k in "AB"}
            if keys != wanted:
                raise ValueError(
                    f"{path} does not fit this model: {len(wanted - keys)} tensors are missing{_some(wanted - keys)}, "
                    f"{len(keys - wanted)} are foreign{_some(keys - wanted)}"
                )
            for name, layer in self.layers.items():
                A, B = (file.get_tensor(f"{_file_key(name)}.lora_{k}.weight") for k in "AB")
                B = B.flatten(1).t()
                own_A, own_B = layer.expert(slot)
                if A.shape != own_A.shape or B.shape != own_B.shape:
                    raise ValueError(f"{path}: {name} has A {tuple(A.shape)}, this model needs {tuple(own_A.shape)}")
                own_A.data.copy_(A)
                own_B.data.copy_(B)


def _find_layers(component: str, model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers whose name ends in one of `names`; below a stock LoRA, the layer that it wraps."""
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for target in names:
        matches = [name for name in modules if name == target or name.endswith("." + target)]
        if not matches:
            leaves = {n.rsplit(".", 1)[-1] for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
            raise ValueError(f"no module of {component} is called {target!r}; its layers end in {sorted(leaves)}")
        for name in matches:
            layer = modules.get(name + ".base_layer", modules[name])
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) != 1:
                kind = type(layer).__name__
                raise ValueError(f"{component}.{name} is a {kind}; experts need a Linear or plain Conv2d")
            found[f"{component}.{name}"] = layer
    return {f"{component}.{name}": found[f"{component}.{name}"] for name in modules if f"{component}.{name}" in found}


def _call_scale(arguments: dict) -> float:
    """`scale` of a pipeline call, which diffusers hands down to the denoiser."""
    for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
        if arguments.get(name):
            return arguments[name].get("scale", 1.0)
    return 1.0


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _file_key(name: str) -> str:
    """Key of a layer in a file: CLIP encoders carry `text_model.`, which recent transformers dropped from the module
    names and LoRA loaders accept in either case."""
    component, module = name.split(".", 1)
    return f"{component}.text_model.{module}" if module.startswith("encoder.layers.") else name


def _some(names: set[str]) -> str:
    return f" ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def base_name(pipe) -> str:
    """Model id or folder that a pipeline was loaded from."""
    return str(pipe.config.get("_name_or_path") or type(pipe).__name__)


def read_facts(path: str | os.PathLike) -> dict:
    """The header of an expert file. ValueError if it is truncated, no safetensors file, or not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("tsm", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); nothing is ever unpickled") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is a safetensors file, but no timestep expert (its header has no 'tsm' entry)")
    if facts.get("format_version") != FORMAT_VERSION or facts.get("T") != T:
        version = facts.get("format_version"), facts.get("T")
        raise ValueError(f"{path} has format version and T {version}, this program reads {(FORMAT_VERSION, T)}")
    if absent := [name for name in FACTS if name not in facts]:
        raise ValueError(f"the header of {path} lacks {absent}")
    return facts


def read_folder(folder: str | os.PathLike) -> list[tuple[dict, Path]]:
    """Headers and paths of a folder's experts, from interval 0 to n - 1. ValueError unless it is one complete set."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that train_foster.py wrote, such as .../experts-n8")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ValueError(f"{folder} holds {pickles}: pickled weights are never read, only .safetensors files")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        inside = sorted(str(p) for p in folder.glob("experts-n*"))
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"{folder} holds no .safetensors file{hint}")
    files = [(read_facts(path), path) for path in paths]
    first, first_path = files[0]
    for facts, path in files[1:]:
        differ = [name for name in FACTS[2:] if facts[name] != first[name]]
        differ += [] if _close(facts["base_fingerprint"], first["base_fingerprint"]) else ["base_model"]
        if differ:
            other = {k: (first[k], facts[k]) for k in differ}
            raise ValueError(f"{first_path.name} and {path.name} in {folder} are not of one set: {other}")
    by_index: dict[int, Path] = {}
    for facts, path in files:
        if facts["interval_index"] in by_index:
            double = by_index[facts["interval_index"]].name
            raise ValueError(f"{double} and {path.name} in {folder} both are interval {facts['interval_index']}")
        by_index[facts["interval_index"]] = path
    missing = sorted(set(range(first["num_intervals"])) - set(by_index))
    if missing:
        raise ValueError(
            f"{folder} lacks the experts of intervals {missing} of {first['num_intervals']}; it holds "
            f"{[p.name for p in paths]}. Train them with --interval_indices {' '.join(map(str, missing))}"
        )
    return sorted(files, key=lambda file: file[0]["interval_index"])


def _close(a: list[float], b: list[float]) -> bool:
    """True where fingerprints agree to 0.4 % (bf16 rounds by up to 0.2 %); zeros stand for quantised weights."""
    x, y = ([p[k] for p in zip(a, b) if 0 not in p] for k in (0, 1))
    return len(a) == len(b) and math.dist(x, y) <= 4e-3 * math.hypot(*x)
