"""The model families: all that differs between them stands in their entries of BACKBONES, nowhere else.

Another family is one more entry. Its pipeline is the stock one of diffusers; t counts 0 .. T = 1000 and grows with
noise in all of them, whatever the denoiser's `timestep` argument is.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr

import videocrafter  # noqa: F401, its classes must be known before a pipeline that names them is loaded

T = 1000  # training timesteps of every supported model


def interval_bounds(n: int) -> list[int]:
    """The n + 1 boundaries of n equal intervals of {0 .. T-1}: interval i holds bounds[i] <= t < bounds[i + 1].

    Where n does not divide T, a ceil rule counted from t = 1 would move a few boundary steps (paper: not specified).
    Raises ValueError unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ValueError(f"the number of intervals must lie in 1..{T}, got {n}")
    return [-(-i * T // n) for i in range(n + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Noise: what a model family was trained to undo


@dataclass(frozen=True)
class Weighting:
    """How training weights the noise levels. The default is Eq. 1 and 4 as they stand for diffusion models; for flow
    models it is uniform before the scheduler's shift (paper: not specified)."""

    snr_gamma: float | None = None  # of diffusion models
    scheme: str = "none"  # of flow models, and its parameters; names and defaults as in diffusers
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


class Diffusion:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, t = 0 .. T-1, and epsilon, v or x0 as the target. With
    VideoCrafter2's scheduler, s_t x0 takes the place of x0."""

    def __init__(self, pipe, weighting: Weighting = Weighting()):
        if weighting.scheme != "none":
            raise ValueError(f"--weighting_scheme {weighting.scheme} is for flow models; here --snr_gamma weights")
        scaled = hasattr(pipe.scheduler, "signal_scale")
        self.scheduler = pipe.scheduler if scaled else DDPMScheduler.from_config(pipe.scheduler.config)
        self.gamma = weighting.snr_gamma

    def bounds(self, n: int) -> list[int]:
        """Boundaries of n intervals of equal probability: those of equal width, since t is uniform."""
        return interval_bounds(n)

    def draw_t(self, u: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Uniform integers of [low, high) from uniform u in [0, 1), Eq. 4."""
        return (low + (u * (high - low)).long()).clamp(max=high - 1)

    def diffuse(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and the regression target."""
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(x0, noise, t),
            "sample": lambda: x0,
        }
        return self.scheduler.add_noise(x0, noise, t), targets[self.scheduler.config.prediction_type]()

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio of x_t, (B,)."""
        snr = compute_snr(self.scheduler, t).clamp(min=1e-8)  # 0 at zero terminal SNR
        scaled = hasattr(self.scheduler, "signal_scale")
        return snr * self.scheduler.signal_scale.to(snr)[t] ** 2 if scaled else snr

    def loss_weights(self, t: torch.Tensor) -> torch.Tensor | float:
        """Min-SNR-gamma weights (https://arxiv.org/abs/2303.09556, Sec. 3.4), (B,): min(SNR, gamma) over what the
        prediction's own loss is in terms of x0. Within one interval they vary little."""
        if self.gamma is None:
            return 1.0
        snr = self.snr(t)
        over = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return snr.clamp(max=self.gamma) / over[self.scheduler.config.prediction_type]


class Flow:
    """x_t = (1 - sigma) x0 + sigma noise with sigma = t / T in (0, 1], and the velocity noise - x0 as the target
    (SD3, https://arxiv.org/abs/2403.03206, Sec. 2-3).

    The scheduler's `shift` maps s in (0, 1] to sigma = shift s / (1 + (shift - 1) s), and the weighting schemes are
    densities of s. They are continuous here, not one of the scheduler's 1000 values, so that every t is visited, and
    an interval's t follow the same density cut to the interval, by its inverse distribution function.
    """

    def __init__(self, pipe, weighting: Weighting = Weighting()):
        if weighting.snr_gamma is not None:
            raise ValueError("--snr_gamma is for diffusion models; a flow model takes --weighting_scheme")
        if weighting.scheme not in SCHEMES:
            raise ValueError(f"--weighting_scheme {weighting.scheme}: there are {', '.join(SCHEMES)}")
        if weighting.scheme == "mode" and not -1 <= weighting.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"--mode_scale {weighting.mode_scale} must lie in -1..1.75, or the density folds over")
        if weighting.logit_std <= 0:
            raise ValueError(f"--logit_std must be positive, got {weighting.logit_std}")
        config = pipe.scheduler.config
        # a dynamic shift belongs to sampling; training knows none (paper: not specified)
        self.shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))
        self.weighting, self.share = weighting, functools.cache(self._share)

    def quantile(self, p: torch.Tensor) -> torch.Tensor:
        """The t, in float64, below which a share p of the draws lies."""
        p, w = p.double(), self.weighting
        if w.scheme == "logit_normal":
            s = torch.sigmoid(torch.special.ndtri(p) * w.logit_std - w.logit_mean)
        elif w.scheme == "mode":  # SD3, Eq. 20
            s = p + w.mode_scale * (p - torch.sin(math.pi / 2 * p) ** 2)
        else:
            s = p
        return T * self.shift * s / (1 + (self.shift - 1) * s)

    def _share(self, t: float) -> float:
        """The share of the draws below t, by bisection of `quantile`."""
        if not 0 < t < T:
            return float(t >= T)
        low, high = 0.0, 1.0
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (
                (middle, high) if self.quantile(torch.tensor(middle, dtype=torch.float64)) < t else (low, middle)
            )
        return high

    def bounds(self, n: int) -> list[int]:
        """Boundaries of n intervals that the draws fall into equally often, rounded to whole t. ValueError where an
        interval would be empty."""
        bounds = [round(t) for t in self.quantile(torch.arange(n + 1) / n).tolist()]
        if len(set(bounds)) <= n:
            raise ValueError(f"{n} intervals of equal probability leave some without a timestep: take fewer")
        return bounds

    def draw_t(self, u: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Floats of [low, high) with the weighting's density there, from uniform u in [0, 1)."""
        before, after = self.share(low), self.share(high)
        t = self.quantile(before + u.double() * (after - before)).float()
        return t.clamp(low, high - 1e-3)  # t / T in fp32 is not exact: stay away from the next interval

    def diffuse(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and the regression target."""
        sigma = (t / T).to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise, noise - x0

    def loss_weights(self, t: torch.Tensor) -> torch.Tensor | float:
        """SD3's weights of the two schemes that weight the loss instead of the density, (B,)."""
        sigma = t / T
        if self.weighting.scheme == "sigma_sqrt":  # infinite at 0: not below the cleanest of the scheduler's 1000
            return sigma.clamp(min=self.shift / (T - 1 + self.shift)) ** -2
        if self.weighting.scheme == "cosmap":  # SD3, Eq. 21
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Families


@dataclass(frozen=True)
class Backbone:
    """What must be known of a model family. `pipe` is its stock diffusers pipeline."""

    denoiser: str  # component that takes `timestep`
    text_encoders: dict[str, tuple[str, ...]]  # component: LoRA targets of the paper
    targets: tuple[str, ...]  # LoRA targets of the denoiser
    process: Callable  # (pipe, Weighting) -> the noise process
    encode: Callable  # (pipe, prompts) -> what `pipe.encode_prompt` returns without guidance
    conditions: Callable  # what `pipe.encode_prompt` returned -> tensors by name, joined as the pipeline joins them
    predict: Callable  # (pipe, xt, t, conditions) -> the prediction, of x_t's shape
    t_scale: float = 1.0  # the denoiser's `timestep` times this is t in 0..T
    sampling: Callable = lambda pipe: {}  # (pipe) -> arguments with which pipe(...) samples as it trained
    video: bool = False  # latents are (B, c, F, h, w)


def _joined(positive: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
    return positive if negative is None else torch.cat([negative, positive])


def _sd_predict(pipe, xt: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
    return pipe.unet(xt, t, return_dict=False, **conditions)[0]


def _sdxl_predict(pipe, xt: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
    """With the size that stock sampling states: the picture is whole and as large as it was."""
    size = xt.new_tensor([x * pipe.vae_scale_factor for x in xt.shape[2:]])
    time_ids = torch.cat([size, torch.zeros_like(size), size]).expand(len(xt), 6)  # original size, crop, target size
    added = {"text_embeds": conditions["text_embeds"], "time_ids": time_ids}
    return pipe.unet(xt, t, conditions["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0]


def _text_length(pipe) -> int:
    """Tokens of a prompt: the stock pipeline's default, or fewer if the tokenizer knows fewer."""
    default = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
    return min(default, pipe.tokenizer.model_max_length)


def _pixart_conditions(encoded: tuple) -> dict[str, torch.Tensor]:
    prompt, mask, negative, negative_mask = encoded
    return {
        "encoder_hidden_states": _joined(prompt, negative),
        "encoder_attention_mask": _joined(mask, None if negative is None else negative_mask),
    }


def _pixart_predict(pipe, xt: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
    """Models of 1024 pixels alone are told the size and the aspect ratio. The output's other half, if any, is a
    learned variance."""
    added = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == 128:
        size = xt.new_tensor(xt.shape[2:]).repeat(len(xt), 1) * pipe.vae_scale_factor  # (B, 2)
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    options = {"timestep": t, "added_cond_kwargs": added, "return_dict": False}
    return pipe.transformer(xt, **options, **conditions)[0][:, : xt.shape[1]]


def _sd3_encode(pipe, prompts: list[str], **options) -> tuple:
    """With 77 tokens of T5 (zeros without one), as SD3 was trained; the stock pipeline's default is 256."""
    options = {"device": pipe.transformer.device, "max_sequence_length": pipe.tokenizer_max_length, **options}
    return pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)


def _flux_sampling(pipe) -> dict:
    """FLUX.1-schnell, which has no guidance embedding, knows 256 tokens instead of 512."""
    return {} if pipe.transformer.config.guidance_embeds else {"max_sequence_length": 256}


def _sd3_predict(pipe, xt: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
    return pipe.transformer(xt, timestep=t, return_dict=False, **conditions)[0]


def _flux_predict(pipe, xt: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
    """2x2 latent pixels are one token. Guidance-distilled models train at 3.5, diffusers' default."""
    b, c, h, w = xt.shape
    options = {"img_ids": pipe._prepare_latent_image_ids(b, h // 2, w // 2, xt.device, xt.dtype)}
    options["txt_ids"] = xt.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)
    options["guidance"] = xt.new_full((b,), 3.5) if pipe.transformer.config.guidance_embeds else None
    tokens = pipe._pack_latents(xt, b, c, h, w)  # (B, h/2 * w/2, 4 c)
    pred = pipe.transformer(tokens, timestep=t / T, return_dict=False, **options, **conditions)[0]
    return pred.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(xt.shape)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# By the name of the pipeline's class.
BACKBONES = {
    "StableDiffusionPipeline": Backbone(  # SD1.x and SD2.x; appendix A.1
        denoiser="unet",
        text_encoders={"text_encoder": ("q_proj", "v_proj")},
        targets=ATTENTION,
        process=Diffusion,
        encode=lambda pipe, prompts: pipe.encode_prompt(prompts, pipe.unet.device, 1, False),
        conditions=lambda encoded: {"encoder_hidden_states": _joined(*encoded)},
        predict=_sd_predict,
    ),
    "StableDiffusionXLPipeline": Backbone(  # not in the paper: SD1.5's targets, the text encoders frozen
        denoiser="unet",
        text_encoders={},
        targets=ATTENTION,
        process=Diffusion,
        encode=lambda pipe, prompts: pipe.encode_prompt(prompts, None, pipe.unet.device, 1, False),
        conditions=lambda encoded: {
            "encoder_hidden_states": _joined(*encoded[:2]),
            "text_embeds": _joined(*encoded[2:]),
        },
        predict=_sdxl_predict,
    ),
    "TextToVideoSDPipeline": Backbone(  # VideoCrafter2 and ModelScope; appendix A.2.2: spatial and temporal attention
        denoiser="unet",
        text_encoders={"text_encoder": ("out_proj",)},
        targets=("to_k", "to_v"),
        process=Diffusion,
        encode=lambda pipe, prompts: pipe.encode_prompt(prompts, pipe.unet.device, 1, False),
        conditions=lambda encoded: {"encoder_hidden_states": _joined(*encoded)},
        predict=_sd_predict,
        sampling=lambda pipe: {"num_frames": pipe.unet.config.get("num_frames", 16)},
        video=True,
    ),
    "PixArtAlphaPipeline": Backbone(  # alpha and Sigma; appendix A.1 and A.2
        denoiser="transformer",
        text_encoders={"text_encoder": ("q", "v")},
        targets=ATTENTION,
        process=Diffusion,
        encode=lambda pipe, prompts: pipe.encode_prompt(
            prompts, False, device=pipe.transformer.device, max_sequence_length=_text_length(pipe)
        ),
        conditions=_pixart_conditions,
        predict=_pixart_predict,
        # the size that is asked for, and captions as they are
        sampling=lambda pipe: {"use_resolution_binning": False, "clean_caption": False},
    ),
    "StableDiffusion3Pipeline": Backbone(  # appendix A.1: image stream and both CLIPs; T5 frozen, may be absent
        denoiser="transformer",
        text_encoders={"text_encoder": CLIP_ATTENTION, "text_encoder_2": CLIP_ATTENTION},
        targets=ATTENTION,
        process=Flow,
        encode=_sd3_encode,
        conditions=lambda encoded: {
            "encoder_hidden_states": _joined(*encoded[:2]),
            "pooled_projections": _joined(*encoded[2:]),
        },
        predict=_sd3_predict,
        sampling=lambda pipe: {"max_sequence_length": pipe.tokenizer_max_length},
    ),
    "FluxPipeline": Backbone(  # not in the paper: SD3's targets, the text encoders frozen
        denoiser="transformer",
        text_encoders={},
        targets=ATTENTION,
        process=Flow,
        encode=lambda pipe, prompts: pipe.encode_prompt(
            prompts, device=pipe.transformer.device, **_flux_sampling(pipe)
        ),
        conditions=lambda encoded: {"encoder_hidden_states": encoded[0], "pooled_projections": encoded[1]},
        predict=_flux_predict,
        sampling=_flux_sampling,
        t_scale=T,
    ),
}


BACKBONES["StableDiffusionImg2ImgPipeline"] = BACKBONES["StableDiffusionPipeline"]
BACKBONES["PixArtSigmaPipeline"] = BACKBONES["PixArtAlphaPipeline"]


def _entry(name: str) -> Backbone:
    if name not in BACKBONES:
        raise ValueError(f"no backbone entry for {name}; there are {sorted(BACKBONES)} (BACKBONES in backbones.py)")
    return BACKBONES[name]


def entry_of(name: str | os.PathLike, revision: str | None = None) -> Backbone:
    """The table's entry for a pipeline folder or hub id, without loading it. ValueError for an unknown family."""
    return _entry(DiffusionPipeline.load_config(name, revision=revision)["_class_name"])


def backbone_of(pipe) -> Backbone:
    """The table's entry for a pipeline. ValueError for an unknown family or a pipeline that lacks a component."""
    name = type(pipe).__name__
    backbone = _entry(name)
    missing = [c for c in (backbone.denoiser, *backbone.text_encoders) if getattr(pipe, c, None) is None]
    if missing:
        raise ValueError(f"this {name} has no {', '.join(missing)}; load it from a complete pipeline folder")
    return backbone


def text_encoders(pipe) -> dict[str, torch.nn.Module]:
    """All that the pipeline has, with experts or without."""
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part}


def native_resolution(pipe) -> int:
    """Pixels of the pictures that the model was trained on. ValueError where the model does not say."""
    size = getattr(pipe, "default_sample_size", None) or getattr(pipe, backbone_of(pipe).denoiser).config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"this model's sample_size is {size}: give --height and --width")
    return size * pipe.vae_scale_factor


def resolution_multiple(pipe) -> int:
    """Pixels whose multiples a picture's sides must be: transformers take patches of 2x2 latent pixels."""
    return pipe.vae_scale_factor * (2 if backbone_of(pipe).denoiser == "transformer" else 1)


def load_pipeline(name: str | os.PathLike, without_t5: bool = False, **options):
    """`DiffusionPipeline.from_pretrained`, which wants to be told again of components that the folder itself declares
    absent (SD3 without T5). ValueError where one is missing that it does not."""
    config = DiffusionPipeline.load_config(name, revision=options.get("revision"))
    parts = {key: value for key, value in config.items() if isinstance(value, (list, tuple))}
    t5 = {"text_encoder_3", "tokenizer_3"} & parts.keys()
    if without_t5 and not t5:
        raise ValueError(f"--without_t5 is for SD3, {name} is a {config['_class_name']}")
    absent = {key for key, (library, _) in parts.items() if library is None} | (t5 if without_t5 else set())
    if missing := [key for key in parts if Path(name).is_dir() and key not in absent and not Path(name, key).is_dir()]:
        hint = "; add --without_t5 to leave out T5 (text_encoder_3, tokenizer_3)" if t5 & set(missing) else ""
        raise ValueError(f"the pipeline folder {name} lacks its {', '.join(missing)}{hint}")
    return DiffusionPipeline.from_pretrained(name, **options, **dict.fromkeys(absent))
