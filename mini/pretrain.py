"""Pretrain the bundled `mini/sd15`: a Stable Diffusion pipeline of stock classes for the world's 32x32 pictures.

The autoencoder sees both domains; the UNet and the text encoder see the source domain only, under web captions, so
that the result draws well and binds badly (world.web_caption). On a CPU, resumable, a function of --seed:

    python mini/pretrain.py --stage vae     # autoencoder -> work_dir/vae.pt and output_dir/vae
    python mini/pretrain.py --stage decoder # a better decoder for the same latents, in place
    python mini/pretrain.py --stage unet    # UNet + text encoder -> work_dir/unet.pt and output_dir (fp16 safetensors)
    python mini/pretrain.py --report        # measures output_dir: round trip, prompts of the source domain
    python mini/pretrain.py --room          # how far a short full fine-tune lowers the eps loss on the target domain
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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mini import world

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 20
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


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's layout (bytes, bytes that end a word, merges, bos, eos) written out by hand: trained tokenizers are not
    reproducible. Each of world.WORDS is one token, anything else falls apart into letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = letters + [c + "</w>" for c in letters], []
    for word in _merge_order(world.WORDS):
        grown, *rest = _symbols(word)
        for symbol in rest:
            if (grown, symbol) not in merges:
                merges.append((grown, symbol))
            grown += symbol
            if grown not in vocab:
                vocab.append(grown)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: k for k, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer) -> CLIPTextModel:
    """Two layers, 128 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# --- shared pieces ---


def _pixels(scenes):
    """(B, 3, 32, 32) in [-1, 1]."""
    batch = np.stack([world.render(s) for s in scenes])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


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
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
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
    _publish(lambda folder: vae.half().save_pretrained(folder), args.output_dir / "vae")


def train_decoder(args: argparse.Namespace) -> None:
    """Polish the decoder on objects (five times the weight of the background); latents stay as they are, so that this
    may run after or beside the UNet stage."""
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").float().requires_grad_(False)
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
    _publish(lambda folder: vae.half().save_pretrained(folder), args.output_dir / "vae")


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


# --- stage 2: UNet and text encoder ---


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: list, batch: int = 250) -> torch.Tensor:
    """Scaled latents (N, C, 8, 8) of scenes; the posterior is so narrow that its mean does."""
    parts = [vae.encode(_pixels(scenes[k : k + batch])).latent_dist.mode() for k in range(0, len(scenes), batch)]
    return torch.cat(parts) * vae.config.scaling_factor


def _token_ids(tokenizer, texts):
    """(B, MAX_TOKENS) as the pipeline pads."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _eps_loss(unet, text_encoder, tokenizer, scheduler, x0, texts, generator):
    """Per-sample squared error of the noise, t uniform."""
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), generator=generator)
    cond = text_encoder(_token_ids(tokenizer, texts))[0]
    pred = unet(scheduler.add_noise(x0, noise, t), t, cond).sample
    return (pred - noise).square().mean((1, 2, 3))


def _captions(scenes, picks, write, rng):
    return [write(scenes[k], rng) for k in picks]


def train_unet(args: argparse.Namespace) -> None:
    """Joint training from scratch on source pictures with web captions; publishes the moving average."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").float().eval()
    tokenizer, scheduler, unet = make_tokenizer(), make_scheduler(), make_unet()
    text_encoder = make_text_encoder(tokenizer)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    path, first, began = args.work_dir / "unet.pt", 0, time.time()
    if path.exists():
        first, began = _resume(path, model, optimizer)
        average = torch.load(path, weights_only=True)["average"]
    scenes = world.scenes("source", "pretrain", args.pictures)
    latents = encode(vae, scenes)
    print(f"{len(scenes)} latents, std {latents.std():.3f}, {time.time() - began:.0f}s", flush=True)
    total, steps = 0.0, args.steps
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng([args.seed, step])
        picks = rng.integers(len(scenes), size=args.batch_size)
        texts = _captions(scenes, picks, world.web_caption, rng)
        loss = _eps_loss(unet, text_encoder, tokenizer, scheduler, latents[picks], texts, generator).mean()
        _update(optimizer, loss, model.parameters(), args.learning_rate * _schedule(step, steps, 200))
        _follow(average, model, min(args.ema_decay, (1 + step) / (10 + step)))
        total += loss.item()
        if (step + 1) % 100 == 0:
            _log(step + 1, steps, total / 100, time.time() - began, optimizer.param_groups[0]["lr"])
            total = 0.0
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps:
            _save(path, {**_state(model, optimizer, step + 1, began), "average": average})
            publish(args, tokenizer, average, step + 1)
    if first == steps:  # nothing was left to train: publish what there is
        publish(args, tokenizer, average, steps)


@torch.no_grad()
def _follow(average, model, decay):
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay) if value.is_floating_point() else average[name].copy_(value)


def _seconds(work_dir):
    """Time spent on each stage, from its checkpoint."""
    paths = {stage: work_dir / f"{stage}.pt" for stage in ("vae", "decoder", "unet")}
    return {s: round(torch.load(p, weights_only=True)["seconds"]) for s, p in paths.items() if p.exists()}


def publish(args: argparse.Namespace, tokenizer, average: dict, step: int) -> None:
    """Write the averaged weights as a pipeline folder in fp16, with how it was made in pretraining.json."""
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).load_state_dict(average)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.output_dir / "vae"),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.vae.half()
    names = "seed vae_steps vae_batch_size vae_learning_rate kl_weight steps batch_size learning_rate ema_decay"
    made = {
        "command": " && ".join(f"python mini/pretrain.py --stage {stage}" for stage in ("vae", "decoder", "unet")),
        "settings": {name: getattr(args, name) for name in (*names.split(), "pictures")},
        "world_version": world.WORLD_VERSION,
        "unet_steps": step,
        "seconds": _seconds(args.work_dir),
        "parameters": {k: m.num_parameters() for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)},
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)},
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }

    def write(folder):
        pipe.save_pretrained(folder)
        (folder / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n")

    _publish(write, args.output_dir)


# --- measurements ---


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in fp32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, texts: list[str], args: argparse.Namespace) -> np.ndarray:
    """(N, 32, 32, 3) uint8; picture k uses seed + k."""
    parts = []
    for k in range(0, len(texts), 50):
        seeds = [torch.Generator().manual_seed(args.seed + j) for j in range(k, min(k + 50, len(texts)))]
        images = pipe(
            texts[k : k + 50],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=seeds,
            output_type="np",
        ).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def report(args: argparse.Namespace) -> dict:
    """Mean scores of source-style prompts: one object, and each category's validation prompts."""
    pipe = load(args.output_dir)
    one = [f"a {c} {s}" for c in world.COLOURS for s in world.SHAPES]
    sets = {"one object": [one[k % len(one)] for k in range(args.report_pictures)]}
    for category in world.CATEGORIES:
        texts = world.prompts(category, "validation")
        sets[category] = [texts[k % len(texts)] for k in range(args.report_pictures)]
    result, tiles = {"steps": args.num_inference_steps, "guidance": args.guidance_scale}, []
    for name, texts in sets.items():
        pictures = draw(pipe, texts, args)
        tiles += list(pictures[:32])
        values = [world.score(p, t) for p, t in zip(pictures, texts)]
        means = {k: [v[k] for v in values if v[k] is not None] for k in values[0]}
        means = {k: round(float(np.mean(v)), 3) for k, v in means.items() if v}
        want = 1 if name == "one object" else 2
        means["count"] = round(float(np.mean([len(world.detect(p)) == want for p in pictures])), 3)
        result[name] = means
        print(name, means, flush=True)
    if args.sheet:
        world.contact_sheet(tiles).save(args.sheet)
    return result


def room(args: argparse.Namespace) -> dict:
    """eps loss on held-out target pictures with true captions, before and after a short full fine-tune."""
    pipe = load(args.output_dir)
    rng = np.random.default_rng(args.seed)
    parts = (pipe.unet, pipe.text_encoder, pipe.tokenizer, make_scheduler())
    data = {}
    for split, count in (("validation", 512), ("train", 4000)):
        scenes = world.scenes("target", split, count)
        data[split] = (scenes, encode(pipe.vae, scenes))

    @torch.no_grad()
    def held_out():
        scenes, x0 = data["validation"]
        texts = _captions(scenes, range(len(scenes)), world.caption, np.random.default_rng(0))
        runs = [_eps_loss(*parts, x0, texts, torch.Generator().manual_seed(k)).mean().item() for k in range(4)]
        return float(np.mean(runs))

    params = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=args.room_learning_rate)
    result = {"before": round(held_out(), 5)}
    for step in range(args.room_steps):
        scenes, x0 = data["train"]
        picks = rng.integers(len(scenes), size=args.batch_size)
        texts = _captions(scenes, picks, world.caption, rng)
        loss = _eps_loss(*parts, x0[picks], texts, torch.Generator().manual_seed(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result["after"] = round(held_out(), 5)
    result["lower by"] = round(1 - result["after"] / result["before"], 4)
    print(result, flush=True)
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "unet", "decoder"))
    parser.add_argument("--report", action="store_true", help="measure output_dir and add the numbers to its JSON")
    parser.add_argument("--room", action="store_true", help="measure what a fine-tune on the target domain can gain")
    parser.add_argument("--output_dir", type=Path, default=HERE / "sd15")
    parser.add_argument("--work_dir", type=Path, default=HERE / "data" / "pretrain", help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--vae_steps", type=int, default=5000)
    group.add_argument("--vae_batch_size", type=int, default=16)
    group.add_argument("--vae_learning_rate", type=float, default=2e-3)
    group.add_argument("--kl_weight", type=float, default=1e-4)
    group.add_argument("--decoder_steps", type=int, default=3000)
    group.add_argument("--decoder_learning_rate", type=float, default=1e-3)
    group = parser.add_argument_group("UNet and text encoder")
    group.add_argument("--steps", type=int, default=8000)
    group.add_argument("--batch_size", type=int, default=64)
    group.add_argument("--learning_rate", type=float, default=1e-3)
    group.add_argument("--ema_decay", type=float, default=0.999)
    group.add_argument("--pictures", type=int, default=50000)
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group = parser.add_argument_group("measurements")
    group.add_argument("--num_inference_steps", type=int, default=25)
    group.add_argument("--guidance_scale", type=float, default=3.0)
    group.add_argument("--report_pictures", type=int, default=100, help="pictures of each kind of prompt")
    group.add_argument("--sheet", help="PNG to write a contact sheet to")
    group.add_argument("--room_steps", type=int, default=200)
    group.add_argument("--room_learning_rate", type=float, default=3e-4)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.stage == "vae":
        train_vae(args)
    if args.stage == "decoder":
        train_decoder(args)
    if args.stage == "unet":
        train_unet(args)
    numbers = {}
    if args.report:
        vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").float()
        numbers["round_trip"] = round_trip(vae, 512)
        numbers["report"] = report(args)
    if args.room:
        numbers["room"] = room(args)
    path = args.output_dir / "pretraining.json"
    if numbers and path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text()), **numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
