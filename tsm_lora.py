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

Assembling (stage 2, Sec. 3.2, Eq. 5-7). Core i of one scale and contexts j of others, each the expert of its own
interval that holds t, and gates that read the layer's input and the timestep; experts frozen, W_r = 0 and E = 0 at the
start, so that it is the stage-1 model:

    y = W x + b + core_i(x) + sum_j g_j(x, t) context_j(x),   g(x, t) = W_r x + E[t].

Symbols: T training timesteps, n intervals, i interval index, t timestep, S experts held, r rank, B batch, L tokens,
A (r, d_in) and B (d_out, r) the two factors of an expert; a bank is the experts of one scale, R all their ranks
together, m the number of contexts, W_r (m, d_in), E (T, m). Shapes stand at line ends where they change.
"""

import bisect
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones import T, backbone_of, interval_bounds

FORMAT_VERSION = 1
SHARED_FACTS = ("backbone", "targets", "prediction_type")  # equal in all experts that work together
# What a loader needs of a header.
FACTS = ("interval_index", "num_intervals", "timesteps", "rank", "base_fingerprint", *SHARED_FACTS)
ROUTER_FACTS = ("banks", "router", "experts", "base_fingerprint", *SHARED_FACTS)
ROUTER_FILE = "router.safetensors"
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def timestep_index(t: torch.Tensor | float) -> torch.Tensor:
    """The whole timestep that a float t in (0, T] counts as, min(floor(t), T - 1). Any shape."""
    return torch.as_tensor(t).floor().long().clamp(max=T - 1)


def interval_index(t: torch.Tensor | float, bounds: list[int] | tuple[int, ...]) -> torch.Tensor:
    """The i with bounds[i] <= t < bounds[i + 1] of each timestep, of any shape."""
    index = timestep_index(t)
    return torch.bucketize(index, torch.tensor(bounds[1:-1], device=index.device), right=True)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Bank:
    """The experts of one scale: of n intervals, those in `indices` (sorted). `gated` marks a context, Eq. 5."""

    n: int
    indices: tuple[int, ...]
    rank: int
    gated: bool = False
    bounds: tuple[int, ...] = ()  # n + 1 boundaries of the intervals; of equal width if not given

    def __post_init__(self):
        object.__setattr__(self, "bounds", tuple(self.bounds or interval_bounds(self.n)))
        if len(self.bounds) != self.n + 1 or (self.bounds[0], self.bounds[-1]) != (0, T):
            raise ValueError(f"{self.n} intervals of 0..{T} need {self.n + 1} boundaries, got {self.bounds}")
        if any(a >= b for a, b in zip(self.bounds, self.bounds[1:])):
            raise ValueError(f"the boundaries of intervals must grow, got {self.bounds}")

    def slots(self) -> torch.Tensor:
        """(T,): the place in `indices` of the expert of each timestep, -1 where it is not here."""
        place = {i: k for k, i in enumerate(self.indices)}
        intervals = (bisect.bisect_right(self.bounds, t) - 1 for t in range(T))
        return torch.tensor([place.get(i, -1) for i in intervals], device="cpu")


@dataclass(frozen=True)
class Router:
    """How gates come about: g(x, t) = W_r x + E[t] (Eq. 6) from both terms or from one; `top_k` makes them a softmax
    over the k largest instead (MixLoRA, https://arxiv.org/abs/2404.15159, Eq. 4-5)."""

    inputs: str = "both"  # or "feature" or "timestep"
    top_k: int | None = None

    def __post_init__(self):
        if self.inputs not in ("both", "feature", "timestep"):
            raise ValueError(f"router inputs are both, feature or timestep, got {self.inputs!r}")


@dataclass(frozen=True)
class Route:
    """What the layers run now. An index is an int or a 0-dim tensor (one for all rows) or a (B,) tensor."""

    slots: tuple[int | torch.Tensor, ...]  # one per bank
    row: int | torch.Tensor  # of the routers' E: min(floor(t), T - 1)
    scale: float
    folded: bool = False  # the denoiser's weights hold the core expert already

    @property
    def shared(self) -> bool:
        return all(map(_is_one, self.slots))


def _is_one(index: int | torch.Tensor) -> bool:
    return isinstance(index, int) or index.ndim == 0


class Routing:
    """The one place that knows t while a forward (or its recomputation in the backward pass) is running."""

    def __init__(self, banks: Iterable[Bank], scale: float = 1.0):
        self.banks, self.scale = tuple(banks), scale
        self.route: Route | None = None
        self.enabled = True
        self._tables = [{"cpu": bank.slots()} for bank in self.banks]  # (T,) each, on the kinds of device in use

    def at(self, t: torch.Tensor | float, scale: float = 1.0) -> Route:
        """The route of t; indices are ints where all of t share one. ValueError where a bank has no expert for t.

        Reading t costs a device synchronisation, so it is done once, and in sampling only: a training loop draws t
        itself.
        """
        t = torch.as_tensor(t)
        on_host = (t.device.type == "cpu" or not torch.is_grad_enabled()) and not torch.compiler.is_compiling()
        if on_host and ((host := t.cpu()).min() < 0 or host.max() > T):
            raise ValueError(f"timesteps {host.tolist()} leave 0..{T}; t must count {T} training steps")
        rows = timestep_index(host if on_host else t)
        slots = tuple(self._slot(k, rows, t.device, on_host) for k in range(len(self.banks)))
        row = rows.flatten()[0].item() if on_host and rows.unique().numel() == 1 else rows.to(t.device)
        return Route(slots, row, self.scale * scale)

    def _slot(self, k: int, rows: torch.Tensor, device: torch.device, on_host: bool) -> int | torch.Tensor:
        bank, tables = self.banks[k], self._tables[k]
        if not on_host and len(bank.indices) == 1:
            return 0
        if rows.device.type not in tables:
            tables[rows.device.type] = tables["cpu"].to(rows.device)
        slots = tables[rows.device.type].take(rows)
        if on_host and slots.min() < 0:
            missing = interval_index(rows, bank.bounds)[slots < 0].unique().tolist()
            raise ValueError(
                f"t falls into interval(s) {missing} of {bank.n}, but only the experts of {list(bank.indices)} "
                "are here"
            )
        if on_host and slots.unique().numel() == 1:
            return slots.flatten()[0].item()
        return slots.to(device)

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
    """All experts of one Linear or Conv2d, stacked into one LoRA, z = A x, B (w * z), with weights w between: one-hot
    by t within a bank, and times the gate g(x, t) where the bank is a context.

    R = sum of S * r over the banks. A is (R, d_in) or (R, c_in, kh, kw), B is stored transposed as (R, d_out), so that
    one expert is a contiguous slice of both. It is a child of the adapted layer, which stays the object that it was.
    Of m contexts, W_r is (m, d_in) or (m, c_in) and E is (T, m); both start at zero. The gate of a convolution stands
    at the output's positions: W_r is the centre of a kernel, which moves with the base's stride.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, routing: Routing, scaling: float, router: Router | None = None):
        super().__init__()
        shape_in, d_out = _layer_shape(base)
        self.scaling, self.routing, self.router = scaling, routing, router
        device, stacked = base.weight.device, [len(bank.indices) * bank.rank for bank in routing.banks]
        self.starts = [sum(stacked[:k]) for k in range(len(stacked) + 1)]
        self.A = nn.Parameter(torch.zeros(sum(stacked), *shape_in, device=device))  # (R, d_in[, kh, kw])
        self.B = nn.Parameter(torch.zeros(sum(stacked), d_out, device=device))  # (R, d_out)
        self.W_r = self.E = None
        m = sum(bank.gated for bank in routing.banks)
        if router is not None and router.inputs != "timestep":
            self.W_r = nn.Parameter(torch.zeros(m, shape_in[0], device=device))
        if router is not None and router.inputs != "feature":
            self.E = nn.Parameter(torch.zeros(T, m, device=device))
        self.balance: torch.Tensor | None = None  # load-balance loss of the last forward, top-k gates only
        self.watch: Callable | None = None  # called with the gates (..., m) of each forward

    def expert(self, slot: int | torch.Tensor, bank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors A (r, d_in[, kh, kw]) and B (r, d_out) of one slot; a 0-dim tensor keeps one compiled graph."""
        rank, start = self.routing.banks[bank].rank, self.starts[bank]
        if isinstance(slot, int):
            rows = slice(start + slot * rank, start + (slot + 1) * rank)
            return self.A[rows], self.B[rows]
        rows = start + slot * rank + torch.arange(rank, device=slot.device)
        return self.A.index_select(0, rows), self.B.index_select(0, rows)

    def forward(self, x: torch.Tensor, project: Callable) -> torch.Tensor:
        """The experts' addition to `base(x)`: x (rows, ..., d_in) or (rows, c_in, h, w), rows = B * k, b slowest.

        `project(x, weight, None)` is F.linear or the base's convolution (its stride, padding, dilation).
        """
        route, banks = self.routing.current(), self.routing.banks
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        core = [k for k, bank in enumerate(banks) if not bank.gated and not route.folded]
        contexts = [k for k, bank in enumerate(banks) if bank.gated]
        # One t for all rows: core and contexts share two products. Else the core alone is exactly stage 1.
        groups = [core + contexts] if route.shared else [core, contexts]
        return functools.reduce(torch.add, (self._add(x, project, route, group) for group in groups if group))

    def _add(self, x: torch.Tensor, project: Callable, route: Route, group: list[int]) -> torch.Tensor:
        dim = 1 if self.A.ndim == 4 else -1
        factors = [self._factors(k, route.slots[k]) for k in group]
        down = [A for A, _, _ in factors]
        gated = self.routing.banks[group[-1]].gated  # contexts come last
        if gated and self.W_r is not None:
            down.append(self.W_r if dim == -1 else self._centred(self.W_r))
        z = project(x, torch.cat(down) if len(down) > 1 else down[0], None)  # (rows, ..., R') or (rows, R', h', w')
        parts = list(z.split([len(A) for A in down], dim)) if len(down) > 1 else [z]
        if gated:
            logits = parts.pop() if self.W_r is not None else 0
            if self.E is not None:
                logits = logits + self._spread(self.E[route.row], z, dim)
            gates = self._gates(logits, dim)
        for j, (k, (_, _, one_hot)) in enumerate(zip(group, factors)):
            if one_hot is not None:
                parts[j] = parts[j] * self._spread(one_hot, z, dim).to(z.dtype)
            if self.routing.banks[k].gated:
                parts[j] = parts[j] * next(gates)
        z = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        if self.scaling * route.scale != 1:
            z = z * (self.scaling * route.scale)
        B = torch.cat([B for _, B, _ in factors]) if len(factors) > 1 else factors[0][1]
        z = z if torch.is_autocast_enabled(x.device.type) else z.to(B.dtype)
        return F.conv2d(z, B.t()[:, :, None, None]) if dim == 1 else F.linear(z, B.t())

    def _factors(self, bank: int, slot: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A and B of one expert, or of the whole bank with the rows that serve each sample, (B, S*r)."""
        if _is_one(slot):
            return *self.expert(slot, bank), None
        rows = slice(self.starts[bank], self.starts[bank + 1])
        one_hot = F.one_hot(slot, len(self.routing.banks[bank].indices))
        return self.A[rows], self.B[rows], one_hot.repeat_interleave(self.routing.banks[bank].rank, 1)

    def _gates(self, logits: torch.Tensor, dim: int):
        """Iterator over the m gates, each with one channel."""
        if self.router.top_k is not None:
            shares = logits.float().softmax(dim)
            kept = torch.zeros_like(shares).scatter(dim, shares.topk(self.router.top_k, dim).indices, 1.0)
            others = [d for d in range(shares.ndim) if d != dim % shares.ndim]
            # https://arxiv.org/abs/2404.15159, Eq. 6: m * sum_j (fraction of tokens sent to j) * (mean share of j)
            fraction = kept.mean(others) / self.router.top_k
            self.balance = shares.shape[dim] * (fraction * shares.mean(others)).sum()
            shares = shares * kept
            logits = (shares / shares.sum(dim, keepdim=True)).to(logits.dtype)
        if self.watch is not None:
            self.watch(logits.movedim(dim, -1))
        return iter(logits.split(1, dim))

    def _spread(self, values: torch.Tensor, z: torch.Tensor, dim: int) -> torch.Tensor:
        """(B, k) by sample or (k,) for all, in the shape that multiplies z row by row."""
        if values.ndim == 1:
            return values if dim == -1 else values[None, :, None, None]
        if z.shape[0] % len(values):
            raise ValueError(f"{z.shape[0]} rows cannot be split over a batch of {len(values)} timesteps")
        values = values.repeat_interleave(z.shape[0] // len(values), 0)  # video: B*F or B*H*W rows
        return values[:, :, None, None] if dim == 1 else values.view(len(values), *[1] * (z.ndim - 2), -1)

    def _centred(self, W_r: torch.Tensor) -> torch.Tensor:
        """(m, c_in) as the centre of an otherwise empty kernel, (m, c_in, kh, kw)."""
        kh, kw = self.A.shape[2:]
        return F.pad(W_r[:, :, None, None], (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2))


def _layer_shape(base: nn.Module) -> tuple[tuple[int, ...], int]:
    if isinstance(base, nn.Conv2d):
        return (base.in_channels, *base.kernel_size), base.out_channels
    return (base.in_features,), base.out_features


def _add_experts(base: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted layer."""
    routing = base.tsm.routing
    if not routing.enabled or (routing.route is not None and routing.route.folded and base.tsm.router is None):
        return output
    project = base._conv_forward if isinstance(base, nn.Conv2d) else F.linear
    return output + base.tsm(args[0], project).to(output.dtype)


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
    bounds: Iterable[int] = (),
) -> "Experts":
    """Put fresh, trainable experts (A Kaiming, B = 0: the identity) on a pipeline whose weights are frozen.

    Args:
        indices: the intervals to hold an expert for; all n by default.
        alpha: the addition is scaled by alpha / rank; alpha = rank by default (paper: not specified).
        lora_layers: module names of the denoiser (suffixes); the paper's of that backbone by default.
        generator: CPU generator of A.
        bounds: n + 1 boundaries of the intervals; of equal width by default, as in the paper.

    Raises ValueError for an interval out of range, a module name that matches nothing, a rank beyond a layer's width.
    """
    bounds = tuple(bounds) or tuple(interval_bounds(num_intervals))
    indices = list(range(num_intervals)) if indices is None else sorted(set(indices))
    if not indices or indices[0] < 0 or indices[-1] >= num_intervals:
        raise ValueError(f"interval indices must lie in 0..{num_intervals - 1}, got {indices}")
    banks = [Bank(num_intervals, tuple(indices), rank, bounds=bounds)]
    return _fresh(pipe, banks, generator, None, alpha, lora_layers, train_text_encoder)


def attach_moe(
    pipe,
    num_experts: int,
    top_k: int = 2,
    rank: int = 4,
    generator: torch.Generator | None = None,
    **options,
) -> "Experts":
    """MoE LoRA, the paper's rival (appendix C.2, after MixLoRA): `num_experts` fresh LoRAs that all serve every t,
    mixed by a softmax over the `top_k` largest gates of the layer's input. Experts and routers train, with
    `experts.balance_loss()` beside the diffusion loss. `options` and errors are those of `attach_experts`."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts}, the number of experts, got {top_k}")
    banks, router = [Bank(1, (0,), rank, gated=True)] * num_experts, Router("feature", top_k)
    experts = _fresh(pipe, banks, generator, router, **options)
    for layer in experts.layers.values():  # equal gates would never send a token beyond the first k experts
        layer.W_r.data.copy_(torch.empty(layer.W_r.shape).normal_(std=0.02, generator=generator))
    return experts


def _fresh(pipe, banks, generator, router, alpha=None, lora_layers=None, train_text_encoder=True) -> "Experts":
    backbone = backbone_of(pipe)
    targets = {backbone.denoiser: tuple(lora_layers or backbone.targets)}
    if train_text_encoder:
        targets |= backbone.text_encoders
    experts = Experts(pipe, backbone, targets, banks, banks[0].rank if alpha is None else alpha, router=router)
    for layer in experts.layers.values():
        A = torch.empty(layer.A.shape)
        # PEFT's default, https://github.com/huggingface/peft/blob/v0.11.0/src/peft/tuners/lora/layer.py#L132
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        layer.A.data.copy_(A)
    experts.train_only(experts.parameters())
    return experts


def assemble_experts(
    pipe, core: str | os.PathLike | None, contexts: Iterable[str | os.PathLike], inputs: str = "both"
) -> "Experts":
    """Stage 2 (Sec. 3.2, Eq. 5-7): frozen experts of several scales, and fresh routers to train.

    Args:
        core: folder of the core's experts, which are not gated: the start is exactly that stage-1 model. None is the
            symmetric variant: every scale is gated, and the finest one starts with gate 1.
        contexts: folders of the contexts' experts, in any number and of any scales.
        inputs: of the routers, both | feature | timestep (Table 7).

    Raises ValueError for no context, for folders that do not belong together or to this base model.
    """
    contexts = list(contexts)
    if not contexts:
        raise ValueError("assembling needs at least one context folder beside the core")
    if core is None and inputs == "feature":
        raise ValueError("the symmetric variant starts at E = 1, so its routers need the timestep")
    folders = [
        (Path(folder), gated) for gated, some in ((False, [core]), (True, contexts)) for folder in some if folder
    ]
    experts = _read(pipe, folders, Router(inputs))
    if core is None:
        finest = max(range(len(contexts)), key=lambda k: experts.routing.banks[k].n)
        for layer in experts.layers.values():
            layer.E.data[:, finest] = 1
    experts.train_only(experts.router_parameters())
    return experts


def load_experts(pipe, folder: str | os.PathLike, scale: float = 1.0, check_base: bool = True) -> "Experts":
    """Put the experts of a folder on a pipeline: from now on `pipe(prompt)` runs, at each step, the experts of its t.

    Args:
        folder: of fostered experts, as `train_foster.py` writes it, or an assembled one with a router.safetensors.
        scale: strength of all experts; `cross_attention_kwargs={"scale": s}` of a call multiplies it.
        check_base: refuse experts whose base model has other weights than this pipeline.

    Raises ValueError that lists what is there and what is missing, doubled, foreign, truncated or misshapen.
    """
    denoiser = getattr(pipe, backbone_of(pipe).denoiser)
    if hasattr(denoiser, "_orig_mod") or any(p.is_meta for p in denoiser.parameters()):
        raise ValueError("load experts before torch.compile and before offloading, which hide the layers")
    router_file = Path(folder) / ROUTER_FILE
    if router_file.exists():
        facts = read_facts(router_file, ROUTER_FACTS)
        folders = [(Path(folder) / bank["folder"], bank["gated"]) for bank in facts["banks"]]
        experts = _read(pipe, folders, Router(**facts["router"]), scale, check_base)
    else:
        experts = _read(pipe, [(Path(folder), False)], None, scale, check_base)
    try:
        if router_file.exists():
            experts.read_router(router_file)
        for name, layer in experts.layers.items():
            layer.requires_grad_(False).to(dtype=_floating(experts.bases[name].weight.dtype))
        experts.follow_prompts()
    except Exception:
        experts.unload()
        raise
    return experts


def _read(pipe, folders: list[tuple[Path, bool]], router: Router | None, scale=1.0, check_base=True) -> "Experts":
    """The frozen experts of several folders, one bank each, in fp32."""
    sets = [(folder, read_folder(folder), gated) for folder, gated in folders]
    first, facts = sets[0][0], sets[0][1][0][0]
    backbone = backbone_of(pipe)
    if facts["backbone"] != (kind := type(getattr(pipe, backbone.denoiser)).__name__):
        raise ValueError(
            f"the experts in {first} are of a {facts['backbone']} and do not fit this pipeline's {kind}; load "
            f"their base model, {facts['base_model']!r}"
        )
    for folder, files, _ in sets[1:]:
        if differ := _differences(facts, files[0][0], SHARED_FACTS):
            raise ValueError(f"the experts in {first} and in {folder} do not belong together: {differ}")
    targets = {component: tuple(names) for component, names in facts["targets"].items()}
    banks = [
        Bank(len(files), tuple(range(len(files))), files[0][0]["rank"], gated, tuple(bounds_of(files)))
        for _, files, gated in sets
    ]
    experts = Experts(pipe, backbone, targets, banks, None, scale, router)
    denoiser = experts.components[backbone.denoiser]
    if facts.get("fps") and hasattr(denoiser, "fps"):
        experts._before.append((denoiser, "fps", denoiser.fps))
        denoiser.fps = facts["fps"]
    try:
        if check_base and not experts.same_base(facts["base_fingerprint"]):
            raise ValueError(
                f"the experts in {first} were trained on {facts['base_model']!r}, whose weights are not those of "
                f"{base_name(pipe)!r}; load that base model, or pass check_base=False to use them all the same"
            )
        for bank, (_, files, _) in enumerate(sets):
            for slot, (_, path) in enumerate(files):
                experts.read_expert(slot, path, bank)
    except Exception:
        experts.unload()
        raise
    return experts


def unload_experts(pipe) -> None:
    """Take the experts off a pipeline, without a trace; nothing happens where there are none."""
    if "_tsm_experts" in vars(pipe):
        pipe._tsm_experts.unload()


class Experts:
    """The experts attached to a pipeline; made by `attach_experts`, `assemble_experts` or `attach_moe` (to train), or
    by `load_experts` (to sample)."""

    def __init__(self, pipe, backbone, targets, banks, alpha, scale=1.0, router=None):
        if "_tsm_experts" in vars(pipe):
            raise ValueError("this pipeline carries experts already; call unload_experts(pipe) first")
        self.pipe, self.backbone, self.targets, self.router = pipe, backbone, targets, router
        self.alpha = alpha  # of experts that train; alpha / r is baked into those of a file
        self.routing = Routing(banks, scale)
        self.components = {name: getattr(pipe, name) for name in (backbone.denoiser, *backbone.text_encoders)}
        self.bases: dict[str, nn.Module] = {}  # "<component>.<module>": the adapted layer
        for component, names in targets.items():
            self.bases |= _find_layers(component, getattr(pipe, component), names)
        for name, base in self.bases.items():
            shape_in, d_out = _layer_shape(base)
            misfit = [bank.rank for bank in banks if not 1 <= bank.rank <= min(math.prod(shape_in), d_out)]
            if misfit:
                raise ValueError(f"rank {misfit[0]} does not fit {name}, which maps {math.prod(shape_in)} to {d_out}")
        self.layers: dict[str, ExpertLayer] = {}
        self._handles = []
        for name, base in self.bases.items():
            scaling = 1.0 if alpha is None else alpha / banks[0].rank
            base.tsm = self.layers[name] = ExpertLayer(base, self.routing, scaling, router)
            self._handles.append(base.register_forward_hook(_add_experts))
        denoiser = self.components[backbone.denoiser]
        self._denoiser_modules = list(denoiser.modules())
        self._argument_names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._handles.append(denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True))
        self._handles.append(denoiser.register_forward_hook(self._after_denoiser, always_call=True))
        modules = [module for component in self.components.values() for module in component.modules()]
        self._attention = [module for module in modules if hasattr(module, "fuse_projections")]
        everything = [c for c in pipe.components.values() if isinstance(c, nn.Module)]  # also encoders without experts
        self._all_parameters = [p for component in everything for p in component.parameters()]
        self._before = [(p, "requires_grad", p.requires_grad) for p in self._all_parameters]  # what `unload` restores
        for name in ("training", "gradient_checkpointing", "_gradient_checkpointing_func"):
            self._before += [(m, name, getattr(m, name)) for m in modules if name in vars(m)]
        self._encode_prompt: Callable | None = None  # the pipeline's own, once text-encoder experts follow prompts
        self._prompt: tuple | None = None
        self._originals: dict[str, torch.Tensor] = {}  # base weights while `folded`
        self._folded: tuple | None = None  # the (slot, scale) that the weights hold, None for the base
        pipe._tsm_experts = self

    def parameters(self, component: str = "") -> list[nn.Parameter]:
        """All that can train in every layer (of one component), in a fixed order: A and B, W_r and E."""
        layers = [layer for name, layer in self.layers.items() if component in ("", name.split(".")[0])]
        return [p for layer in layers for p in layer.parameters()]

    def router_parameters(self) -> list[nn.Parameter]:
        """W_r and E of every layer."""
        return [parameter for _, parameter in self._router_entries()]

    def train_only(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze everything else: the pipeline's weights, and experts while routers train."""
        for parameter in self._all_parameters:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def balance_loss(self) -> torch.Tensor:
        """Load-balance loss of the last forward, the mean over the layers; 1 where tokens spread evenly."""
        return torch.stack([layer.balance for layer in self.layers.values()]).mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What trains, by layer (alpha not baked in): what a checkpoint needs."""
        named = ((f"{name}.{k}", p) for name, layer in self.layers.items() for k, p in layer.named_parameters())
        return {name: p.detach() for name, p in named if p.requires_grad}

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
        self.routing.route = self.routing.at(t, scale)
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

    def predict(
        self, xt: torch.Tensor, t: torch.Tensor, prompts: list[str], conditions: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The denoiser's output for x_t (B, c, h, w) at t (B,), each prompt encoded at its own t: for training.
        `conditions` of the prompts may be given where the text encoders have no experts."""
        if conditions is None:
            with self.at(t):
                conditions = self.backbone.conditions(self.backbone.encode(self.pipe, prompts))
        return self.backbone.predict(self.pipe, xt, t, conditions)

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing whose recomputation runs at the t of its own forward, also if t has changed since."""
        denoiser = self.components[self.backbone.denoiser]
        if not denoiser._supports_gradient_checkpointing:
            raise ValueError(f"diffusers' {type(denoiser).__name__} cannot checkpoint: train without")
        func = functools.partial(checkpoint, use_reentrant=False, context_fn=self.routing.recompute_context)
        for component in self.components.values():
            component.eval()  # no dropout anywhere
            for module in component.modules():
                if hasattr(module, "gradient_checkpointing"):
                    # transformers checkpoints in training mode only; T5's attention would drop out in that mode
                    module.training = not isinstance(getattr(module, "dropout", None), float)
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
        t = torch.as_tensor(arguments["timestep"])
        if self.backbone.t_scale != 1:  # t / T in fp32 is 374.99997 / T where t was 375
            t = (t.float() * self.backbone.t_scale).round(decimals=3)
        route = self.routing.at(t, _call_scale(arguments))
        if self._prompt is not None:
            arguments |= self._conditions(t, route, arguments)
        if self._originals:
            self._fold(t, route)
        if any(module._compiled_call_impl is not None for module in self._denoiser_modules):

            def tensor(index):  # an int would be compiled in, and each t would be compiled anew
                return torch.tensor(index, device=t.device) if isinstance(index, int) else index

            route = replace(route, slots=tuple(map(tensor, route.slots)), row=tensor(route.row))
        self.routing.route = replace(route, folded=bool(self._originals))
        return (), arguments

    def _after_denoiser(self, *_) -> None:
        self.routing.route = None

    # -- text-encoder experts under a plain `pipe(prompt)`

    def follow_prompts(self) -> None:
        """Encode each prompt once per interval in use, or per timestep where routers read it. Pipelines encode
        before they know their timesteps, so remember the arguments of `encode_prompt`, and at the denoiser swap in the
        conditions of its t."""
        if len(self.targets) == 1:
            return  # no text encoder has experts
        if not hasattr(self.pipe, "encode_prompt"):
            raise ValueError(f"{type(self.pipe).__name__} has no encode_prompt: text-encoder experts cannot follow it")
        self._encode_prompt = self.pipe.encode_prompt
        signature = inspect.signature(self._encode_prompt)

        @functools.wraps(self._encode_prompt)
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
    def _conditions(self, t: torch.Tensor, route: Route, arguments: dict) -> dict[str, torch.Tensor]:
        encode, stand_in, encoded = self._prompt
        key = self._key(self.routing.at(t) if torch.is_tensor(route.row) else route)  # tensors in a compiled denoiser
        for name, tensor in stand_in.items():
            if arguments[name] is not tensor:
                if arguments[name].shape != tensor.shape or not torch.equal(arguments[name], tensor):
                    raise ValueError(
                        f"{name} {tuple(arguments[name].shape)} is not what this pipeline's encode_prompt made of the "
                        f"prompt, {tuple(tensor.shape)}: text-encoder experts cannot tell how to encode it at t"
                    )
                stand_in[name] = arguments[name]  # the pipeline passes the same tensor at every step
        if key is None:
            raise ValueError("text-encoder experts need one t per denoiser call in sampling, got several")
        if key not in encoded:  # encode for the rest of the schedule at once, while the encoders are on the device
            t = t.flatten()[0].item()
            for step in [t] + [step for step in self.pipe.scheduler.timesteps.tolist() if step < t]:
                if (later := self._key(self.routing.at(step))) not in encoded:
                    with self._at(step, self._prompt_scale):
                        encoded[later] = self.backbone.conditions(encode())
        return encoded[key]

    def _key(self, route: Route) -> tuple[int, ...] | None:
        """What text-encoder experts depend on at one t; None where a batch mixes several."""
        by_timestep = self.router is not None and self.router.inputs != "feature"
        key = (*route.slots, route.row) if by_timestep else route.slots
        return key if all(isinstance(index, int) for index in key) else None

    # -- folding

    @contextmanager
    def folded(self):
        """Sample at the speed of the base: `with experts.folded(): pipe(prompt)`.

        The (core) expert of the current interval is added to the denoiser's weights in fp32 and swapped when t enters
        another interval; on leaving, also by an exception, the weights are restored bit for bit. Costs a copy of the
        adapted weights. Contexts and their gates stay beside the weights, in two small products; without a core,
        nothing is folded. Raises ValueError for offloaded, half-precision or quantised weights: W + BA rounded to bf16
        loses about half of an expert of |BA| = 0.2 % |W|.
        """
        if self._originals:
            raise RuntimeError("these experts are folded already")
        core = not all(bank.gated for bank in self.routing.banks)
        bases = {
            name: base for name, base in self.bases.items() if core and name.split(".")[0] == self.backbone.denoiser
        }
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
    def _fold(self, t: torch.Tensor, route: Route) -> None:
        slot, scale = route.slots[0], route.scale
        slot = slot if isinstance(slot, int) else self.routing.at(t).slots[0]  # a tensor in a compiled denoiser
        if not isinstance(slot, int):
            raise ValueError("folded experts serve one interval per denoiser call, this call mixes several")
        if self._folded == (slot, scale):
            return
        self._folded = (None, scale)  # half done is neither base nor expert
        for name, weight in self._originals.items():
            base, layer = self.bases[name].weight.data, self.layers[name]
            A, B = (factor.to(base.device, torch.float32) for factor in layer.expert(slot))
            merged = torch.addmm(weight.to(base.device).flatten(1), B.t(), A.flatten(1), alpha=layer.scaling * scale)
            base.copy_(merged.view(base.shape))
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

    def save_expert(self, index: int, path: str | os.PathLike, bank: int = 0, **facts) -> None:
        """Write the expert of one interval as an ordinary LoRA file, with alpha / r baked into B: loaders that know
        nothing of alpha give the same result. The header holds every fact about it. `facts` are added to it."""
        n, rank, bounds = (getattr(self.routing.banks[bank], name) for name in ("n", "rank", "bounds"))
        slot = self.routing.banks[bank].indices.index(index)
        tensors = {}
        for name, layer in self.layers.items():
            A, B = (factor.detach().float() for factor in layer.expert(slot, bank))
            B = (B * layer.scaling).t()  # (d_out, r)
            key = _file_key(name)
            tensors[f"{key}.lora_A.weight"] = A.contiguous().cpu()
            tensors[f"{key}.lora_B.weight"] = (B[:, :, None, None] if A.ndim == 4 else B).contiguous().cpu()
        header = {
            **self._header(),
            "t_direction": "t grows with noise, interval 0 is the cleanest",
            "num_intervals": n,
            "interval_index": index,
            "timesteps": [bounds[index], bounds[index + 1] - 1],
            "rank": rank,
            "alpha": rank if self.alpha is None else self.alpha,
            **facts,
        }
        # https://github.com/Stability-AI/ModelSpec as kohya's trainers write it: drawn from [min, max)
        _write(tensors, header, path, {"modelspec.timestep_range": f"{bounds[index]},{bounds[index + 1]}"})

    def save_router(self, path: str | os.PathLike, folders: list[str], **facts) -> None:
        """Write the routers, for a folder that holds the experts' own folders, one per bank, beside them. Keys
        `<component>.<module>.router_W.weight` (m, d_in) and `.router_E.weight` (T, m)."""
        banks = [
            {"folder": folder, "gated": bank.gated, "num_intervals": bank.n, "rank": bank.rank}
            for folder, bank in zip(folders, self.routing.banks, strict=True)
        ]
        header = {**self._header(), "banks": banks, "router": asdict(self.router), "experts": self.digest(), **facts}
        tensors = {key: p.detach().float().contiguous().cpu() for key, p in self._router_entries()}
        _write(tensors, header, path)

    def read_router(self, path: Path) -> None:
        """Copy a router file; ValueError where it was trained with other experts or does not fit this model."""
        if read_facts(path, ROUTER_FACTS)["experts"] != self.digest():
            raise ValueError(f"the experts beside {path} are not those that its routers were trained with")
        with safe_open(path, "pt") as file:
            entries = dict(self._router_entries())
            _check_keys(path, set(file.keys()), set(entries))
            for key, parameter in entries.items():
                tensor = file.get_tensor(key)
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{path}: {key} is {tuple(tensor.shape)}, this model needs {tuple(parameter.shape)}"
                    )
                parameter.data.copy_(tensor)

    def _router_entries(self) -> list[tuple[str, nn.Parameter]]:
        named = (
            (name, k, getattr(layer, p)) for name, layer in self.layers.items() for k, p in (("W", "W_r"), ("E", "E"))
        )
        return [(f"{_file_key(name)}.router_{k}.weight", p) for name, k, p in named if p is not None]

    def digest(self) -> str:
        """SHA-256 of the experts in the first and the last layer, in fp32."""
        layers = list(self.layers.values())
        factors = [factor for layer in (layers[0], layers[-1]) for factor in (layer.A, layer.B * layer.scaling)]
        content = b"".join(factor.detach().float().cpu().numpy().tobytes() for factor in factors)
        return hashlib.sha256(content).hexdigest()[:16]

    def _header(self) -> dict:
        """What every file of experts or routers states of their model."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": base_name(self.pipe),
            "base_fingerprint": self.fingerprint(),
            "backbone": type(self.components[self.backbone.denoiser]).__name__,
            "classes": {name: type(component).__name__ for name, component in self.components.items()},
            "T": T,
            "targets": self.targets,
            "prediction_type": self.pipe.scheduler.config.get("prediction_type"),
            "fps": getattr(self.components[self.backbone.denoiser], "fps", None),  # that VideoCrafter2 was told
        }

    def read_expert(self, slot: int, path: Path, bank: int = 0) -> None:
        """Copy one expert file into a slot; ValueError where it does not hold exactly this model's layers."""
        with safe_open(path, "pt") as file:
            _check_keys(
                path, set(file.keys()), {f"{_file_key(name)}.lora_{k}.weight" for name in self.layers for k in "AB"}
            )
            for name, layer in self.layers.items():
                A, B = (file.get_tensor(f"{_file_key(name)}.lora_{k}.weight") for k in "AB")
                B = B.flatten(1).t()
                own_A, own_B = layer.expert(slot, bank)
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


def _check_keys(path: Path, keys: set[str], wanted: set[str]) -> None:
    if keys != wanted:
        raise ValueError(
            f"{path} does not fit this model: {len(wanted - keys)} tensors are missing{_some(wanted - keys)}, "
            f"{len(keys - wanted)} are foreign{_some(keys - wanted)}"
        )


def _write(tensors: dict, header: dict, path: str | os.PathLike, metadata: dict | None = None) -> None:
    """A safetensors file whose header holds our facts as JSON; written under another name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial, {"format": "pt", "tsm": json.dumps(header), **(metadata or {})})
    os.replace(partial, path)


def _some(names: set[str]) -> str:
    return f" ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def base_name(pipe) -> str:
    """Model id or folder that a pipeline was loaded from."""
    return str(pipe.config.get("_name_or_path") or type(pipe).__name__)


def read_facts(path: str | os.PathLike, needed: tuple[str, ...] = FACTS) -> dict:
    """The header of an expert or router file. ValueError if it is truncated, no safetensors file, or not ours."""
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
    if absent := [name for name in needed if name not in facts]:
        raise ValueError(f"the header of {path} lacks {absent}")
    return facts


def read_folder(folder: str | os.PathLike) -> list[tuple[dict, Path]]:
    """Headers and paths of a folder's experts, from interval 0 to n - 1. ValueError unless it is one complete set."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that train_foster.py wrote, such as .../experts-n8")
    if (folder / ROUTER_FILE).exists():
        raise ValueError(f"{folder} is an assembled folder; here belongs one of fostered experts, such as those in it")
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
        if differ := _differences(first, facts, ("num_intervals", "rank", *SHARED_FACTS)):
            raise ValueError(f"{first_path.name} and {path.name} in {folder} are not of one set: {differ}")
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
    files.sort(key=lambda file: file[0]["interval_index"])
    for facts, path in files:
        if facts["timesteps"][0] != (low := bounds_of(files)[facts["interval_index"]]):
            raise ValueError(f"{path} begins at t = {facts['timesteps'][0]}, but the interval before it ends at {low}")
    return files


def bounds_of(files: list[tuple[dict, Path]]) -> list[int]:
    """The boundaries of the intervals of a folder's experts, from their headers."""
    return [0] + [facts["timesteps"][1] + 1 for facts, _ in files]


def _differences(a: dict, b: dict, names: tuple[str, ...]) -> dict[str, tuple]:
    """The facts in which two headers disagree, and their base model where its weights differ."""
    differ = [name for name in names if a[name] != b[name]]
    differ += [] if _close(a["base_fingerprint"], b["base_fingerprint"]) else ["base_model"]
    return {name: (a[name], b[name]) for name in differ}


def _close(a: list[float], b: list[float]) -> bool:
    """True where fingerprints agree to 0.4 % (bf16 rounds by up to 0.2 %); zeros stand for quantised weights."""
    x, y = ([p[k] for p in zip(a, b) if 0 not in p] for k in (0, 1))
    return len(a) == len(b) and math.dist(x, y) <= 4e-3 * math.hypot(*x)
