"""Pretrain the bundled models: pipelines of stock classes for the mini world's 32x32 pictures (sd15, pixart, sd3) and
VideoCrafter2's for its clips (vc2).

The autoencoder sees both domains; denoiser and text encoders see the source domain only, under web captions, so that
the result draws well and obeys badly (web_caption of world.py and clips.py). All models share one autoencoder. On a
CPU, resumable, a function of --seed and of the number of processes:

    python mini/pretrain.py --stage vae       # autoencoder -> work_dir/vae.pt and mini/sd15/vae
    python mini/pretrain.py --stage decoder   # a better decoder for the same latents, in place
    python mini/pretrain.py --stage denoiser  # denoiser + text encoders -> work_dir and mini/sd15 (fp16 safetensors)
    python mini/pretrain.py --model pixart --stage denoiser   # -> mini/pixart, with the autoencoder of mini/sd15
    torchrun --nproc_per_node 2 mini/pretrain.py --model vc2 --stage denoiser   # the same with two processes
    python mini/pretrain.py --model pixart --report   # measures it: round trip, prompts of the source domain
    python mini/pretrain.py --model pixart --room     # how far a short full fine-tune lowers the target domain's loss
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.resnet import TemporalConvLayer
from tokenizers import pre_tokenizers
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbones
from mini import clips, world
from videocrafter import UNet3DVideoCrafterConditionModel, VideoCrafterDDIMScheduler

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 20
STABLE_DIFFUSION = {  # Stable Diffusion 1.5's schedule, and VideoCrafter2's
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LATENTS = 8  # channels; with 4, and as many steps, twice as many pictures lose a texture or a shape


# --- models ---


def make_vae() -> AutoencoderKL:
    """32x32x3 -> 8x8xLATENTS."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Predicts the noise of 8x8xLATENTS latents; cross attention at both levels and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads: diffusers' old name
        norm_num_groups=8,
        time_embedding_dim=128,
    )


def _symbols(word):
    return [*word[:-1], word[-1] + "</w>"]


def _merge_order(words):
    """Words in an order in which no merge of an earlier word breaks a later one: all merges are prefixes, so only a
    word's first pair can turn up inside another word, and that one must come before it."""
    left, order = sorted(set(words)), []
    while left:
        inner = {pair for w in left for pair in zip(_symbols(w)[1:], _symbols(w)[2:])}
        order.append(next(w for w in left if tuple(_symbols(w)[:2]) not in inner))
        left.remove(order[-1])
    return order


def make_tokenizer(words=world.WORDS, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """CLIP's layout (bytes, bytes that end a word, merges, bos, eos) written out by hand: trained tokenizers are not
    reproducible. Each of `words` is one token, anything else falls apart into letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = letters + [c + "</w>" for c in letters], []
    for word in _merge_order(words):
        grown, *rest = _symbols(word)
        for symbol in rest:
            if (grown, symbol) not in merges:
                merges.append((grown, symbol))
            grown += symbol
            if grown not in vocab:
                vocab.append(grown)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: k for k, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def make_clip(tokenizer, width: int, layers: int, projected: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def make_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """Two layers, 128 wide. Each of world.WORDS is one token, anything else falls apart into letters."""
    words = [("\u2581" + word, -1.0) for word in sorted(set(world.WORDS))]
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=MAX_TOKENS)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config), tokenizer


def make_sd15(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's schedule; a text encoder of two layers, 128 wide."""
    tokenizer = make_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_clip(tokenizer, 128, 2),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(**STABLE_DIFFUSION),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_pixart(vae: AutoencoderKL) -> PixArtAlphaPipeline:
    """PixArt-alpha's schedule and output (noise and a learned variance, of which the noise alone is trained)."""
    text_encoder, tokenizer = make_t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=1,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENTS,
        out_channels=2 * LATENTS,
        cross_attention_dim=128,
        caption_channels=128,
    )
    return PixArtAlphaPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def make_sd3(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """SD3's flow matching with shift 3, two CLIPs of unequal widths, no T5; latents without a mean, as SD3's."""
    with torch.no_grad():
        z = vae.encode(_pixels(world.scenes("source", "pretrain", 512))).latent_dist.mode()
    vae.register_to_config(shift_factor=round(z.mean().item(), 5))
    tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENTS,
        out_channels=LATENTS,
        caption_projection_dim=128,
        joint_attention_dim=64 + 96,
        pooled_projection_dim=64 + 96,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=make_clip(tokenizer, 64, 3, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=make_clip(tokenizer_2, 96, 2, projected=True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def make_vc2(vae: AutoencoderKL) -> TextToVideoSDPipeline:
    """VideoCrafter2's UNet and schedule, with its frame rate and its scale of x0; clips of 8 frames. It predicts v:
    at the noise levels at which motion is decided, next to nothing of the clip is left in epsilon.

    A caption says what moves which way by one word, which stock initialisation drowns: here the words are not diluted
    among much padding, cross attention starts louder, and frames differ from the first step on.
    """
    tokenizer = make_tokenizer([*world.WORDS, *clips.WORDS], 10)
    unet = UNet3DVideoCrafterConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        cross_attention_dim=96,
        attention_head_dim=8,  # the width of a head, as the name says; UNet2DConditionModel takes it as their number
        norm_num_groups=8,
        fps=clips.FPS,
        num_frames=clips.FRAMES,
    )
    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):
            module.conv4[-1].reset_parameters()  # zero in a UNet that is made of a trained one for pictures
        if isinstance(module, Transformer2DModel):
            cross = module.transformer_blocks[0].attn2
            for layer in (cross.to_v, cross.to_out[0]):
                layer.weight.data.mul_(2)
    torch.nn.init.zeros_(unet.conv_out.weight)
    return TextToVideoSDPipeline(
        vae=vae,
        text_encoder=make_clip(tokenizer, 96, 2),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=VideoCrafterDDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
    )


MODELS = {"sd15": make_sd15, "pixart": make_pixart, "sd3": make_sd3, "vc2": make_vc2}


def trained_parts(pipe) -> torch.nn.ModuleDict:
    """Denoiser and text encoders."""
    backbone = backbones.backbone_of(pipe)
    return torch.nn.ModuleDict({name: getattr(pipe, name) for name in (backbone.denoiser, *backbone.text_encoders)})


# --- shared pieces ---


def _pixels(scenes, kind=world):
    """(B[, F], 3, 32, 32) in [-1, 1]."""
    batch = np.stack([kind.render(s) for s in scenes])
    return torch.from_numpy(batch).movedim(-1, -3).float().div_(127.5).sub_(1)


def _uint8(pixels):
    """(B, 3, 32, 32) in [-1, 1] -> (B, 32, 32, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _schedule(step, steps, warmup):
    """Learning rate factor: linear warm-up, then a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(path, state):
    """torch.save under a temporary name, then renamed: a crash leaves the old checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _state(model, optimizer, step, began):
    seconds = time.time() - began
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}


def _resume(path, model, optimizer):
    """Load a checkpoint of _state; returns (next step, a start time that keeps counting)."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], time.time() - state["seconds"]


def _update(optimizer, loss, params, rate):
    params = list(params)
    optimizer.zero_grad()
    loss.backward()
    if PartialState().num_processes > 1:
        grads = [p.grad for p in params if p.grad is not None]  # all at once: each exchange costs a millisecond or two
        vector_to_parameters(reduce(parameters_to_vector(grads), "mean"), grads)
    clip_grad_norm_(params, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _publish(write, folder):
    """write(draft folder), then swap it in for `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    draft.chmod(0o755)
    write(draft)
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for the owner alone
    for file in draft.rglob("*config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # diffusers notes where a model was loaded from
        if "dtype" in config:  # else transformers loads fp16 beside the fp32 of diffusers, and sampling fails
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def _log(step, steps, loss, seconds, rate):
    print(f"step {step}/{steps} loss {loss:.4f} lr {rate:.2e} {seconds:.0f}s", flush=True)


# --- stage 1: the autoencoder ---


def train_vae(args: argparse.Namespace) -> None:
    """L1 + L2 + a small KL on both domains; the scaling factor is 1 / std of the latents."""
    torch.manual_seed(args.seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    steps, batch = args.vae_steps, args.vae_batch_size
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=0)
    path, first, began, total = args.work_dir / "vae.pt", 0, time.time(), 0.0
    if path.exists():
        first, began = _resume(path, vae, optimizer)
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng([args.seed, step])
        x = _pixels([world.make_scene(world.DOMAINS[k % 2], rng) for k in range(batch)])
        posterior = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + args.kl_weight * kl
        _update(optimizer, loss, vae.parameters(), args.vae_learning_rate * _schedule(step, steps, 50))
        total += loss.item()
        if (step + 1) % 100 == 0:
            _log(step + 1, steps, total / 100, time.time() - began, optimizer.param_groups[0]["lr"])
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save(path, _state(vae, optimizer, step + 1, began))
            print("round trip", round_trip(vae, 200), flush=True)
    vae.register_to_config(scaling_factor=latent_scale(vae))
    _publish(lambda folder: vae.half().save_pretrained(folder), HERE / "sd15/vae")


def train_decoder(args: argparse.Namespace) -> None:
    """Polish the decoder on objects (five times the weight of the background); latents stay as they are, so that this
    may run after or beside the UNet stage."""
    vae = load_vae().requires_grad_(False)
    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=args.decoder_learning_rate, betas=(0.9, 0.99), weight_decay=0)
    path, first, began, total = args.work_dir / "decoder.pt", 0, time.time(), 0.0
    if path.exists():
        first, began = _resume(path, vae, optimizer)
    for step in range(first, args.decoder_steps):
        rng = np.random.default_rng([args.seed, 1, step])
        x = _pixels([world.make_scene(world.DOMAINS[k % 3 > 0], rng) for k in range(args.vae_batch_size)])
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
        weight = 1 + 4 * ((x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > 0.3)
        error = vae.decode(z).sample - x
        loss = (weight * (error.abs() + 4 * error.square())).mean()
        _update(optimizer, loss, params, args.decoder_learning_rate * _schedule(step, args.decoder_steps, 50))
        total += loss.item()
        if (step + 1) % 100 == 0:
            _log(step + 1, args.decoder_steps, total / 100, time.time() - began, optimizer.param_groups[0]["lr"])
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == args.decoder_steps:
            _save(path, _state(vae, optimizer, step + 1, began))
            print("round trip", round_trip(vae, 200), flush=True)
    _publish(lambda folder: vae.half().save_pretrained(folder), HERE / "sd15/vae")


def load_vae() -> AutoencoderKL:
    """The one that all models share, in fp32."""
    return AutoencoderKL.from_pretrained(HERE / "sd15/vae").float().eval()


@torch.no_grad()
def latent_scale(vae: AutoencoderKL) -> float:
    """1 / std of the source domain's latents."""
    x = _pixels(world.scenes("source", "pretrain", 512))
    return round(1 / vae.encode(x).latent_dist.mode().std().item(), 5)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Share of validation pictures of each domain in which the detector reads every object right after the VAE."""
    result = {}
    for domain in world.DOMAINS:
        scenes = world.scenes(domain, "validation", count)
        x = _pixels(scenes)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        result[domain] = float(np.mean([_reads(p, s) for p, s in zip(_uint8(y), scenes)]))
        result[f"{domain}_l1"] = F.l1_loss(y, x).item()
    return result


def _reads(picture, scene):
    def key(t):
        return t.colour, t.shape, t.texture

    found, real = world.detect(picture), sorted(scene.things, key=lambda t: (t.x, t.y))
    near = all(abs(f.x - r.x) <= 1.5 and abs(f.y - r.y) <= 1.5 for f, r in zip(found, real))
    return len(found) == len(real) and near and all(key(f) == key(r) for f, r in zip(found, real))


# --- stage 2: denoiser and text encoders ---


def world_of(args: argparse.Namespace):
    """mini/world.py, or mini/clips.py of the same interface."""
    return clips if args.model == "vc2" else world


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: list, kind=world, batch: int = 128) -> torch.Tensor:
    """Scaled latents (N, C, 8, 8) of scenes or (N, C, F, 8, 8) of clips; the posterior is so narrow that its mean
    does."""
    parts = []
    for k in range(0, len(scenes), batch):
        pixels = _pixels(scenes[k : k + batch], kind)
        z = vae.encode(pixels.flatten(0, -4)).latent_dist.mode()
        parts.append(z if pixels.ndim == 4 else z.unflatten(0, pixels.shape[:2]).transpose(1, 2))
    return (torch.cat(parts) - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def _loss(pipe, x0, texts, generator, still=0, **options):
    """Per-sample squared error of the prediction, t as the model family draws it. The first `still` clips are shown
    without their motion, as noise on their middle frame alone and on less of it than t says, so that the caption is
    all that tells where things go: x_t betrays it so early that a model could leave the caption unread."""
    backbone = backbones.backbone_of(pipe)
    process = backbone.process(pipe)
    noise = torch.randn(x0.shape, generator=generator)
    u = torch.rand(len(x0), generator=generator)
    t = process.draw_t(u, 0, backbones.T)
    t[:still] = process.draw_t(u[:still], 600, backbones.T)
    xt, target = process.diffuse(x0, noise, t)
    if still:
        frame = x0[:still, :, [clips.FRAMES // 2]].expand_as(x0[:still])
        xt[:still] = process.diffuse(frame, noise[:still], t[:still] // 2)[0]
    pred = backbone.predict(pipe, xt, t, backbone.conditions(backbone.encode(pipe, texts, **options)))
    return (pred - target).square().flatten(1).mean(1)


def _captions(scenes, picks, write, rng):
    return [write(scenes[k], rng) for k in picks]


def train_denoiser(args: argparse.Namespace) -> None:
    """Joint training from scratch on source pictures with web captions; publishes the moving average. Of several
    processes each has a share of the pictures and of every batch, and its own random numbers."""
    state = PartialState(cpu=True)
    if args.batch_size % state.num_processes:
        raise ValueError(f"--batch_size {args.batch_size} must be a multiple of the {state.num_processes} processes")
    torch.manual_seed(args.seed)
    seed = args.seed + 1000 * state.process_index
    pipe = MODELS[args.model](load_vae())
    model = trained_parts(pipe).eval()  # no dropout, which VideoCrafter2's temporal convolutions have
    if args.model != "vc2":  # whose weights have five axes
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    path, first, began = args.work_dir / f"{args.model}.pt", 0, time.time()
    if path.exists():
        first, began = _resume(path, model, optimizer)
        average = torch.load(path, weights_only=True)["average"]
    kind = world_of(args)
    scenes = kind.scenes("source", "pretrain", args.pictures)[state.process_index :: state.num_processes]
    if kind is clips:
        plain = np.array([k for k, c in enumerate(scenes) if c.count == 1 and c.speed != "slowly"])
        if not len(plain):
            raise ValueError(f"--pictures {args.pictures}: too few, no clip of one object that is not slow among them")
    latents = encode(pipe.vae, scenes, kind)
    print(f"{len(scenes)} latents, std {latents.std():.3f}, {time.time() - began:.0f}s", flush=True)
    total, steps = 0.0, args.steps
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rng = np.random.default_rng([seed, step])
        picks = rng.integers(len(scenes), size=args.batch_size // state.num_processes)
        still = 0
        if kind is clips:  # first what moving is, on the plainest clips
            first_lesson = step < args.still_steps
            picks = plain[picks % len(plain)] if first_lesson else picks
            still = len(picks) if first_lesson else len(picks) // 2
        texts = _captions(scenes, picks, kind.web_caption, rng)
        # a plain pipe(prompt) of SD3 hands over 256 empty T5 tokens instead of MAX_TOKENS; both shall draw well
        options = {"max_sequence_length": 256} if args.model == "sd3" and step % 10 == 0 else {}
        loss = _loss(pipe, latents[picks], texts, generator, still, **options).mean()
        _update(optimizer, loss, model.parameters(), args.learning_rate * _schedule(step, steps, 200))
        _follow(average, model, min(args.ema_decay, (1 + step) / (10 + step)))
        total += loss.item()
        if not state.is_main_process:
            continue
        if (step + 1) % 100 == 0:
            _log(step + 1, steps, total / 100, time.time() - began, optimizer.param_groups[0]["lr"])
            total = 0.0
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps:
            _save(path, {**_state(model, optimizer, step + 1, began), "average": average})
            publish(args, average, step + 1)
    if first == steps and state.is_main_process:  # nothing was left to train: publish what there is
        publish(args, average, steps)


@torch.no_grad()
def _follow(average, model, decay):
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay) if value.is_floating_point() else average[name].copy_(value)


def _seconds(args):
    """Time spent on each stage, from its checkpoint."""
    paths = {stage: args.work_dir / f"{stage}.pt" for stage in ("vae", "decoder", args.model)}
    return {s: round(torch.load(p, weights_only=True)["seconds"]) for s, p in paths.items() if p.exists()}


def publish(args: argparse.Namespace, average: dict, step: int) -> None:
    """Write the averaged weights as a pipeline folder in fp16, with how it was made in pretraining.json."""
    pipe = MODELS[args.model](load_vae())
    trained_parts(pipe).load_state_dict(average)
    parts = {name: c.half() for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    names = "seed vae_steps vae_batch_size vae_learning_rate kl_weight steps batch_size learning_rate ema_decay"
    processes = PartialState().num_processes
    commands = [f"python mini/pretrain.py --stage {stage}" for stage in ("vae", "decoder")]
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    sizes = f"--batch_size {args.batch_size} --steps {args.steps} --pictures {args.pictures}"
    commands.append(f"{launcher} mini/pretrain.py --stage denoiser --model {args.model} {sizes}")
    made = {
        "command": " && ".join(commands),
        "settings": {name: getattr(args, name) for name in (*names.split(), "pictures", "still_steps")},
        "world_version": world.WORLD_VERSION,
        "denoiser_steps": step,
        "processes": processes,
        "seconds": _seconds(args),
        "parameters": {name: part.num_parameters() for name, part in parts.items()},
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)},
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }

    def write(folder):
        pipe.save_pretrained(folder)
        (folder / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n")

    _publish(write, args.output_dir)


# --- measurements ---


def load(folder: Path):
    """The pipeline in fp32."""
    pipe = backbones.load_pipeline(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, texts: list[str], args: argparse.Namespace) -> np.ndarray:
    """(N[, F], 32, 32, 3) uint8; picture or clip k uses seed + k."""
    parts = []
    for k in range(0, len(texts), 50):
        seeds = [torch.Generator().manual_seed(args.seed + j) for j in range(k, min(k + 50, len(texts)))]
        images = pipe(
            texts[k : k + 50],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=seeds,
            output_type="np",
            **backbones.backbone_of(pipe).sampling(pipe),
        )[0]
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def report(args: argparse.Namespace) -> dict:
    """Mean scores of source-style prompts: of clips, or of one object and of each category's validation prompts."""
    pipe, kind = load(args.output_dir), world_of(args)
    if kind is clips:
        sets = {"clips": clips.prompts("validation")}
    else:
        sets = {"one object": [f"a {c} {s}" for c in world.COLOURS for s in world.SHAPES]}
        sets |= {category: world.prompts(category, "validation") for category in world.CATEGORIES}
    result, tiles = {"steps": args.num_inference_steps, "guidance": args.guidance_scale}, []
    for name, texts in sets.items():
        texts = [texts[k % len(texts)] for k in range(args.report_pictures)]
        pictures = draw(pipe, texts, args)
        tiles += list(pictures[:32].reshape(-1, world.SIZE, world.SIZE, 3))
        values = [kind.score(p, t) for p, t in zip(pictures, texts)]
        means = {k: [v[k] for v in values if v[k] is not None] for k in values[0]}
        means = {k: round(float(np.mean(v)), 3) for k, v in means.items() if v}
        if kind is world:
            want = 1 if name == "one object" else 2
            means["count"] = round(float(np.mean([len(world.detect(p)) == want for p in pictures])), 3)
        result[name] = means
        print(name, means, flush=True)
    if args.sheet:
        world.contact_sheet(tiles).save(args.sheet)
    return result


def room(args: argparse.Namespace) -> dict:
    """Loss on held-out target pictures with true captions, before and after a short full fine-tune."""
    pipe = load(args.output_dir)
    rng, kind, data = np.random.default_rng(args.seed), world_of(args), {}
    for split, count in (("validation", 256), ("train", kind.SPLITS["train"])):
        scenes = kind.scenes("target", split, count)
        data[split] = (scenes, encode(pipe.vae, scenes, kind))

    @torch.no_grad()
    def held_out():
        scenes, x0 = data["validation"]
        texts = _captions(scenes, range(len(scenes)), kind.caption, np.random.default_rng(0))
        runs = [_loss(pipe, x0, texts, torch.Generator().manual_seed(k)).mean().item() for k in range(4)]
        return float(np.mean(runs))

    optimizer = torch.optim.AdamW(trained_parts(pipe).parameters(), lr=args.room_learning_rate)
    result = {"before": round(held_out(), 5)}
    for step in range(args.room_steps):
        scenes, x0 = data["train"]
        picks = rng.integers(len(scenes), size=args.batch_size)
        texts = _captions(scenes, picks, kind.caption, rng)
        loss = _loss(pipe, x0[picks], texts, torch.Generator().manual_seed(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result["after"] = round(held_out(), 5)
    result["lower by"] = round(1 - result["after"] / result["before"], 4)
    print(result, flush=True)
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--stage", choices=("vae", "decoder", "denoiser"))
    parser.add_argument("--report", action="store_true", help="measure output_dir and add the numbers to its JSON")
    parser.add_argument("--room", action="store_true", help="measure what a fine-tune on the target domain can gain")
    parser.add_argument("--output_dir", type=Path, help="mini/<model> if not given")
    parser.add_argument("--work_dir", type=Path, default=HERE / "data" / "pretrain", help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--vae_steps", type=int, default=5000)
    group.add_argument("--vae_batch_size", type=int, default=16)
    group.add_argument("--vae_learning_rate", type=float, default=2e-3)
    group.add_argument("--kl_weight", type=float, default=1e-4)
    group.add_argument("--decoder_steps", type=int, default=3000)
    group.add_argument("--decoder_learning_rate", type=float, default=1e-3)
    group = parser.add_argument_group("denoiser and text encoders")
    group.add_argument("--steps", type=int, default=8000)
    group.add_argument("--batch_size", type=int, default=64)
    group.add_argument("--learning_rate", type=float, default=1e-3)
    group.add_argument("--ema_decay", type=float, default=0.999)
    group.add_argument("--pictures", type=int, default=50000)
    group.add_argument("--still_steps", type=int, default=600, help="of clips: steps on clips without their motion")
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group = parser.add_argument_group("measurements")
    group.add_argument("--num_inference_steps", type=int, default=25)
    group.add_argument("--guidance_scale", type=float, default=3.0)
    group.add_argument("--report_pictures", type=int, default=100, help="pictures of each kind of prompt")
    group.add_argument("--sheet", help="PNG to write a contact sheet to")
    group.add_argument("--room_steps", type=int, default=200)
    group.add_argument("--room_learning_rate", type=float, default=3e-4)
    args = parser.parse_args()
    args.output_dir = args.output_dir or HERE / args.model
    return args


def main(args: argparse.Namespace) -> None:
    if args.stage == "vae":
        train_vae(args)
    if args.stage == "decoder":
        train_decoder(args)
    if args.stage == "denoiser":
        train_denoiser(args)
    numbers = {}
    if args.report:
        numbers["round_trip"] = round_trip(load_vae(), 512)
        numbers["report"] = report(args)
    if args.room:
        numbers["room"] = room(args)
    path = args.output_dir / "pretraining.json"
    if numbers and path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text()), **numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
