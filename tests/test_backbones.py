"""Every family of the table: in its stock pipeline a plain `pipe(prompt)` picks expert and text by t; its noise
process; its path through every script."""

import json
import math
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import delta, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from diffusers import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tsm_lora import PROMPTS, fill, relative

import backbones
import evaluate
import export
import sample
import train_assemble
import train_foster
from backbones import T, Weighting
from tsm_lora import attach_experts, interval_bounds, load_experts

STEPS, N = 6, 8


def save_experts(pipe, folder, n, **options):
    experts = fill(attach_experts(pipe, n, rank=2, generator=torch.Generator().manual_seed(1), **options))
    for i in range(n):
        experts.save_expert(i, folder / f"interval-{i:03d}.safetensors")
    experts.unload()
    return folder


# -- what each stock pipeline does at one step, written out; `x` are 4 latents of 2 prompts, texts are encoded afresh


def guided(predict, positive, negative, guidance):
    pred = predict(*positive)
    if guidance <= 1:
        return pred
    uncond = predict(*negative)
    return uncond + guidance * (pred - uncond)


def sd_step(pipe, x, t, guidance):
    positive, negative = pipe.encode_prompt(PROMPTS["prompt"], "cpu", 2, True, PROMPTS["negative_prompt"])
    return guided(lambda text: pipe.unet(x, t, text).sample, [positive], [negative], guidance)


def sdxl_step(pipe, x, t, guidance):
    text = pipe.encode_prompt(PROMPTS["prompt"], None, "cpu", 2, True, PROMPTS["negative_prompt"])
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 4)

    def predict(tokens, pooled):
        added = {"text_embeds": pooled, "time_ids": sizes}
        return pipe.unet(pipe.scheduler.scale_model_input(x, t), t, tokens, added_cond_kwargs=added).sample

    return guided(predict, text[0::2], text[1::2], guidance)


def pixart_step(pipe, x, t, guidance):
    text = pipe.encode_prompt(PROMPTS["prompt"], True, PROMPTS["negative_prompt"], 2)

    def predict(tokens, mask):
        added = {"resolution": None, "aspect_ratio": None}
        options = {"encoder_attention_mask": mask, "added_cond_kwargs": added}
        return pipe.transformer(x, tokens, timestep=t.expand(4), **options).sample[:, :4]

    return guided(predict, text[:2], text[2:], guidance)


def sd3_step(pipe, x, t, guidance):
    options = {"negative_prompt": PROMPTS["negative_prompt"], "num_images_per_prompt": 2}
    text = pipe.encode_prompt(PROMPTS["prompt"], None, None, **options)
    return guided(lambda a, b: pipe.transformer(x, a, b, t.expand(4)).sample, text[0::2], text[1::2], guidance)


def flux_step(pipe, x, t, guidance):
    tokens, pooled, ids = pipe.encode_prompt(PROMPTS["prompt"], num_images_per_prompt=2)
    places = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
    return pipe.transformer(x, tokens, pooled, t.expand(4) / 1000, places, ids, torch.full((4,), guidance)).sample


def flux_start(pipe):
    """Noise as 4x4 tokens of 2x2 latent pixels, and the shift of so few tokens."""
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mu = calculate_shift(16, 256, 4096, 0.5, 1.15)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
    return noise.view(4, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(4, 16, 16)


FAMILIES = {
    "sd2": (lambda: tiny_sd(prediction_type="v_prediction"), sd_step),
    "sdxl": (tiny_sdxl, sdxl_step),
    "pixart": (tiny_pixart, pixart_step),
    "sd3": (tiny_sd3, sd3_step),
    "sd3-without-t5": (lambda: tiny_sd3(with_t5=False), sd3_step),
    "flux": (tiny_flux, flux_step),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def latents(pipe, guidance):
    call = PROMPTS | {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    call |= {"height": 16, "width": 16, "generator": torch.Generator().manual_seed(3)}
    if type(pipe).__name__.startswith("PixArt"):
        call |= {"use_resolution_binning": False}
    if type(pipe).__name__.startswith("Flux"):
        call.pop("negative_prompt")
    return pipe(**call).images


@torch.no_grad()
@every_family
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_plain_pipeline_equals_hand_written_loop(tmp_path, family, guidance):
    """Each expert added to the weights of plain copies at its own steps; no hook, no routing."""
    make, step = FAMILIES[family]
    pipe = make()
    experts = load_experts(pipe, save_experts(pipe, tmp_path, N))
    ours, again = latents(pipe, guidance), latents(pipe, guidance)
    deltas = [{name: delta(layer, i) for name, layer in experts.layers.items()} for i in range(N)]
    assert {name.split(".")[0] for name in deltas[0]} == {experts.backbone.denoiser, *experts.backbone.text_encoders}
    experts.unload()
    base = latents(pipe, guidance)
    modules = {f"{name}.{k}": m for name in pipe.components for k, m in named_modules(getattr(pipe, name))}
    originals = {name: modules[name].weight.clone() for name in deltas[0]}
    if step is flux_step:
        x = flux_start(pipe)
    else:
        pipe.scheduler.set_timesteps(STEPS)
        noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        x = noise * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    used = set()
    for t in pipe.scheduler.timesteps:
        i = min(math.floor(t), T - 1) * N // T
        used.add(i)
        for name, addition in deltas[i].items():
            modules[name].weight.data = originals[name] + addition
        x = pipe.scheduler.step(step(pipe, x, t, guidance), t, x).prev_sample
    assert len(used) > 2 and relative(ours, x) < 1e-5 < 0.01 < relative(base, x) and torch.equal(ours, again)


def named_modules(component):
    return component.named_modules() if isinstance(component, torch.nn.Module) else ()


@torch.no_grad()
@every_family
def test_mixed_batch_equals_single_samples(family):
    """Each row runs the expert of its own t, in joint attention too."""
    pipe = FAMILIES[family][0]()
    experts = fill(attach_experts(pipe, 4))
    process = experts.backbone.process(pipe)
    x, t, prompts = torch.randn(3, 4, 8, 8), process.draw_t(torch.tensor([0.01, 0.99, 0.3]), 0, T), ["a", "bc", ""]
    together = experts.predict(x, t, prompts)
    assert together.shape == x.shape  # without a learned variance, and not as tokens
    for k in range(3):
        alone = experts.predict(x[k : k + 1], t[k : k + 1], prompts[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-5)
    with experts.off():
        assert relative(together, experts.predict(x, t, prompts)) > 0.01


@every_family
def test_gradient_checkpointing_gives_equal_gradients(family):
    """Also without dropout: T5's attention drops out in training mode, which checkpointing needs elsewhere."""
    grads = []
    for checkpointing in (False, True):
        pipe = FAMILIES[family][0]()
        experts = fill(attach_experts(pipe, 4, generator=torch.Generator().manual_seed(0)))
        if checkpointing:
            experts.enable_gradient_checkpointing()
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        experts.predict(x, torch.tensor([20, 400, 900]), ["a", "bc", "def"]).square().mean().backward()
        grads.append([p.grad for p in experts.parameters() if p.grad is not None])
        denoiser = getattr(pipe, experts.backbone.denoiser)
        assert all(".tsm." in name for name, p in denoiser.named_parameters() if p.requires_grad)
    assert len(grads[0]) == len(grads[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(*grads)) and grads[0][1].abs().sum() > 0


def test_text_encoders_without_experts_are_frozen():
    pipe = tiny_sd3()
    before = {id(p): p.requires_grad for p in pipe.text_encoder_3.parameters()}
    experts = attach_experts(pipe, 2)
    assert not any(p.requires_grad for m in (pipe.text_encoder_3, pipe.vae) for p in m.parameters())
    experts.unload()
    assert {id(p): p.requires_grad for p in pipe.text_encoder_3.parameters()} == before


def test_pixart_of_1024_pixels_is_told_the_size():
    pipe, told = tiny_pixart(), []
    pipe.transformer.register_to_config(sample_size=128)
    pipe.transformer.forward = lambda x, added_cond_kwargs, **_: told.append(added_cond_kwargs) or (x,)
    backbones.backbone_of(pipe).predict(pipe, torch.zeros(2, 4, 64, 128), torch.tensor([1, 2]), {})
    assert told[0]["resolution"].tolist() == [[128, 256]] * 2 and told[0]["aspect_ratio"].tolist() == [[0.5]] * 2


def test_sd3_expert_opens_with_the_stock_loader(tmp_path):
    """Image stream and both CLIPs, in one interval each."""
    pipe = tiny_sd3()
    save_experts(pipe, tmp_path, 2, alpha=4)
    assert len({key.split(".")[0] for key in load_file(tmp_path / "interval-001.safetensors")}) == 3
    experts = load_experts(pipe, tmp_path)
    x, prompts = torch.randn(2, 4, 8, 8), ["a", "bc"]
    for i, t in enumerate((torch.full((2,), 300.5), torch.full((2,), 1000.0))):
        with torch.no_grad():
            ours = experts.predict(x, t, prompts)
            stock = tiny_sd3()
            base = backbones.backbone_of(stock)
            plain = base.predict(stock, x, t, base.conditions(base.encode(stock, prompts)))
            stock.load_lora_weights(tmp_path, weight_name=f"interval-{i:03d}.safetensors")
            theirs = base.predict(stock, x, t, base.conditions(base.encode(stock, prompts)))
        assert relative(ours, theirs) < 1e-4 < 0.01 < relative(plain, theirs)


def test_flux_timestep_is_t_over_1000():
    """t / 1000 in fp32 times 1000 may fall below t: at a boundary that would be another expert."""
    pipe = tiny_flux()
    experts = fill(attach_experts(pipe, T, rank=1, lora_layers=["to_q"]))
    seen = []
    for layer in list(experts.layers.values())[:1]:
        layer.register_forward_pre_hook(lambda *_: seen.append(experts.routing.route.slots[0]))
    conditions = experts.backbone.conditions(experts.backbone.encode(pipe, ["a"]))
    whole = list(range(1, T, 37)) + [125, 375, 999]
    assert any(int(torch.tensor(t) / T * T) != t for t in range(T))
    with torch.no_grad():
        for t in whole:
            experts.predict(torch.zeros(1, 4, 8, 8), torch.tensor([float(t)]), [""], conditions)
    assert seen == whole


# -- the paper's models, on the meta device


def share(trainable, base):
    return f"{100 * trainable / (base + trainable):.6f}"


def test_trainable_parameters_of_pixart_and_sd3():
    """Table 9 for PixArt. For SD3 the paper's 0.05635 % comes out if the numerator counts the text encoders alone."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    pixart, sd3 = tiny_pixart(), tiny_sd3(with_t5=False)
    with torch.device("meta"):
        pixart.transformer = type(pixart.transformer)(sample_size=64, caption_channels=4096)  # 512 pixels
        t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        pixart.text_encoder = T5EncoderModel(t5)
        sd3.transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=192,
        )
        shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        sd3.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**shape, projection_dim=768))
        shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        sd3.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**shape, projection_dim=1280))
    sizes = {}
    for pipe, names in ((pixart, ("transformer", "text_encoder")), (sd3, ("transformer", *sd3_encoders()))):
        base = sum(p.numel() for name in names for p in getattr(pipe, name).parameters())
        experts = attach_experts(pipe, 1, rank=4)
        sizes[type(pipe).__name__] = [len(experts.layers), base]
        sizes[type(pipe).__name__] += [sum(p.numel() for p in experts.parameters(name)) for name in names]
    layers, base, *own = sizes["PixArtAlphaPipeline"]
    assert (layers, sum(own), base) == (272, 3_637_248, 610_856_096 + 4_762_310_656)
    assert share(sum(own), base) == "0.067647"
    layers, base, *own = sizes["StableDiffusion3Pipeline"]
    assert (layers, sum(own), base) == (272, 2_785_280, 2_028_328_000 + 123_650_304 + 694_659_840)
    assert share(sum(own), base) == "0.097749"
    assert f"{100 * sum(own[1:]) / (base + sum(own)):.6f}" == "0.056349"


def sd3_encoders():
    return backbones.BACKBONES["StableDiffusion3Pipeline"].text_encoders


# -- the noise of flow models

SCHEMES = [
    Weighting(),
    Weighting(scheme="logit_normal"),
    Weighting(scheme="logit_normal", logit_mean=0.7, logit_std=0.6),
    Weighting(scheme="mode"),
    Weighting(scheme="mode", mode_scale=-0.5),
]


def diffusers_t(weighting, count):
    """t as diffusers' SD3 example draws it, but for its rounding to 1000 values: u counts from the noisy end."""
    u = compute_density_for_timestep_sampling(
        weighting.scheme,
        count,
        weighting.logit_mean,
        weighting.logit_std,
        weighting.mode_scale,
        generator=torch.Generator().manual_seed(1),
    )
    s = 1 - u.double()
    return T * 3 * s / (1 + 2 * s)


@pytest.mark.parametrize("weighting", SCHEMES, ids=lambda w: f"{w.scheme}-{w.logit_mean:g}-{w.mode_scale:g}")
@pytest.mark.parametrize("low, high", [(0, 1000), (250, 375), (875, 1000)])
def test_flow_draws_follow_the_density_cut_to_the_interval(weighting, low, high):
    """Kolmogorov-Smirnov distance between 20,000 draws and diffusers' draws that fall into the interval; a false alarm
    has a probability of 1e-6 per case."""
    ours = backbones.Flow(tiny_sd3(), weighting).draw_t(torch.rand(20_000), low, high)
    assert ours.dtype == torch.float32 and low <= ours.min() and ours.max() < high
    theirs = diffusers_t(weighting, 2_000_000)
    theirs = theirs[(theirs >= low) & (theirs < high)].sort().values
    ours = ours.double().sort().values
    points = torch.cat([ours, theirs])
    gap = torch.searchsorted(ours, points, right=True) / len(ours)
    gap = (gap - torch.searchsorted(theirs, points, right=True) / len(theirs)).abs().max()
    critical = math.sqrt(math.log(2 / 1e-6) / 2 * (1 / len(ours) + 1 / len(theirs)))
    assert len(theirs) > 5000 and gap < critical
    assert critical < 0.05  # another density would be further away: so is the uniform one
    uniform = torch.searchsorted(ours, torch.linspace(low, high, 1001), right=True) / len(ours)
    assert (uniform - torch.linspace(0, 1, 1001)).abs().max() > critical or (low, high) == (250, 375)


def test_flux_expert_is_never_asked_for_the_next_interval():
    """The largest u: t / T in fp32, times T and rounded, stays within."""
    experts = fill(attach_experts(tiny_flux(), N, [2], rank=1, lora_layers=["to_q"]))
    process = experts.backbone.process(experts.pipe)
    t = process.draw_t(torch.tensor([1 - 2**-24, 0.0]), 250, 375)
    assert t[0] > 374.99 and t[1] == 250
    conditions = experts.backbone.conditions(experts.backbone.encode(experts.pipe, ["a", "b"]))
    with torch.no_grad():
        experts.predict(torch.zeros(2, 4, 8, 8), t, [], conditions)


def test_flow_draws_hit_every_t():
    process = backbones.Flow(tiny_sd3())
    u = torch.rand(10**6)
    assert process.draw_t(u, 0, T).long().bincount(minlength=T).min() > 0
    bounds = interval_bounds(8)
    for low, high in zip(bounds, bounds[1:]):
        assert process.draw_t(u[: 10**5], low, high).long().unique().tolist() == list(range(low, high))


def test_flow_share_inverts_its_quantiles():
    for weighting in SCHEMES:
        process = backbones.Flow(tiny_sd3(), weighting)
        for t in (3.0, 125.0, 500.0, 990.0):
            assert process.quantile(torch.tensor(process.share(t), dtype=torch.float64)).item() == pytest.approx(
                t, rel=1e-5
            )
        assert process.share(0) == 0 and process.share(T) == 1


def test_intervals_of_equal_probability():
    process = backbones.Flow(tiny_sd3(), Weighting(scheme="logit_normal"))
    bounds = process.bounds(8)
    shares = [process.share(high) - process.share(low) for low, high in zip(bounds, bounds[1:])]
    assert bounds[0] == 0 and bounds[-1] == T and max(abs(share - 1 / 8) for share in shares) < 0.002
    assert backbones.Diffusion(tiny_sd()).bounds(7) == interval_bounds(7)
    with pytest.raises(ValueError, match="take fewer"):
        process.bounds(900)


def test_flow_target_and_loss_weights():
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([250.0, 1000.0])
    xt, target = backbones.Flow(tiny_sd3()).diffuse(x0, noise, t)
    torch.testing.assert_close(xt[0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(xt[1], noise[1])
    torch.testing.assert_close(target, noise - x0)
    weights = backbones.Flow(tiny_sd3(), Weighting(scheme="sigma_sqrt")).loss_weights(t)
    torch.testing.assert_close(weights, torch.tensor([16.0, 1.0]))
    weights = backbones.Flow(tiny_sd3(), Weighting(scheme="cosmap")).loss_weights(t)
    torch.testing.assert_close(weights, 2 / (math.pi * torch.tensor([0.625, 1.0])))


@pytest.mark.parametrize(
    "process, weighting, message",
    [
        (backbones.Flow, Weighting(snr_gamma=5.0), "takes --weighting_scheme"),
        (backbones.Diffusion, Weighting(scheme="mode"), "here --snr_gamma weights"),
        (backbones.Flow, Weighting(scheme="mode", mode_scale=3.0), "must lie in -1..1.75"),
        (backbones.Flow, Weighting(scheme="logit_normal", logit_std=0.0), "--logit_std must be positive"),
        (backbones.Flow, Weighting(scheme="logitnormal"), "there are none, logit_normal"),
    ],
)
def test_weightings_of_another_kind_of_model(process, weighting, message):
    with pytest.raises(ValueError, match=message):
        process(tiny_sd(), weighting)


# -- the scripts


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3-without-t5", "flux"])
def test_every_script_takes_every_family(world, tmp_path, family):
    """Foster two scales, assemble, sample by experts of either kind; with experts on the text encoders that have
    targets, or with everything cached."""
    pipe = FAMILIES[family][0]()
    pipe.save_pretrained(tmp_path / "model")
    encoders = bool(backbones.backbone_of(pipe).text_encoders)
    flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--resolution", 16, "--num_inference_steps", 2]
    data_flags = ["--train_data_dir", world / "images", "--center_crop", "--report_to", "none", "--cache_latents"]
    data_flags += ["--max_train_steps", 3, "--train_batch_size", 4, "--max_validation_samples", 2]
    data_flags += [] if encoders else ["--cache_text_embeddings"]

    def run(script, *more, data_flags=data_flags):
        AcceleratorState._reset_state(True)
        script.main(script.parse_args([str(flag) for flag in (*flags, *data_flags, *more)]))

    folders = {n: tmp_path / f"n{n}" / f"experts-n{n}" for n in (1, 2)}
    for n, folder in folders.items():
        more = ["--train_text_encoder"] if encoders else []
        more += ["--weighting_scheme", "logit_normal"] if family == "flux" else []
        run(train_foster, "--num_intervals", n, "--learning_rate", 0.05, "--output_dir", folder.parent, *more)
    table = json.loads((tmp_path / "n2" / "validation.json").read_text())["intervals"]
    assert [r["timesteps"] for r in table] == [[0, 499], [500, 999]] and all(r["gain"] != 0 for r in table)
    scales = ["--core_experts", folders[2], "--context_experts", folders[1]]
    run(train_assemble, *scales, "--output_dir", tmp_path / "assembled", "--learning_rate", 0.05)
    pictures = {}
    for name, experts in (("base", None), ("stage 1", folders[2]), ("stage 2", tmp_path / "assembled/assembled")):
        more = ["--experts", experts] if experts else []
        run(sample, "--prompt", "a", "--output_dir", tmp_path / name, *more, data_flags=[])
        pictures[name] = np.asarray(Image.open(tmp_path / name / "samples" / "a_000000.png"))
    assert all((pictures[a] != pictures[b]).any() for a, b in combinations(pictures, 2))
    AcceleratorState._reset_state(True)
    loss = ["loss", "--experts", folders[2], "--mixed_precision", "bf16", "--output_file", tmp_path / "loss.json"]
    loss += ["--num_intervals", 2, "--train_data_dir", world / "images", "--max_validation_samples", 2]
    evaluate.evaluate_loss(evaluate.parse_args([str(flag) for flag in (*loss, *flags)]))
    records = json.loads((tmp_path / "loss.json").read_text())["intervals"]
    for record, trained in zip(records, table):
        assert record["base"] == pytest.approx(trained["base"], rel=0.05)


def test_intervals_of_equal_probability_through_the_scripts(world, tmp_path):
    """The boundaries stand in the files, and the loader follows them."""
    tiny_sd3(with_t5=False).save_pretrained(tmp_path / "model")
    flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", world / "images"]
    flags += ["--num_intervals", 4, "--interval_boundaries", "equal_probability", "--weighting_scheme", "logit_normal"]
    flags += ["--max_train_steps", 1, "--train_batch_size", 2, "--max_validation_samples", 2, "--report_to", "none"]
    flags += ["--num_inference_steps", 2, "--output_dir", tmp_path / "run"]
    AcceleratorState._reset_state(True)
    train_foster.main(train_foster.parse_args([str(flag) for flag in flags]))
    bounds = backbones.Flow(tiny_sd3(), Weighting(scheme="logit_normal")).bounds(4)
    assert bounds != interval_bounds(4)
    pipe = tiny_sd3(with_t5=False)
    experts = load_experts(pipe, tmp_path / "run" / "experts-n4")
    assert experts.routing.banks[0].bounds == tuple(bounds)
    for i, (low, high) in enumerate(zip(bounds, bounds[1:])):
        assert experts.routing.at(float(low)).slots == experts.routing.at(high - 0.01).slots == (i,)
    experts.unload()
    path = tmp_path / "run" / "experts-n4" / "interval-002.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    facts = json.loads(metadata["tsm"])
    facts["timesteps"][0] += 1
    save_file(tensors, path, metadata | {"tsm": json.dumps(facts)})
    with pytest.raises(ValueError, match="interval-002.safetensors begins at t = .*but the interval before it ends"):
        load_experts(pipe, path.parent)


def test_peft_export_of_sd3(world, tmp_path):
    """Both CLIPs' adapters arrive in PEFT, whose names they must match."""
    experts = save_experts(tiny_sd3(), tmp_path / "experts-n1", 1)
    export.main(export.parse_args([str(experts), "--format", "peft"]))
    folder = tmp_path / "experts-n1-peft" / "interval-000"
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        adapted = PeftModel.from_pretrained(getattr(tiny_sd3(), component), folder / component)
        loaded = [p.abs().max() for name, p in adapted.named_parameters() if "lora_B" in name]
        assert len(loaded) >= 8 and min(loaded) > 0


def test_4bit_leaves_t5_whole():
    """T5 casts its hidden states to the type of `wo`: quantised, they would be bytes."""
    pipe, quantized = tiny_pixart(), tiny_pixart()
    train_foster.quantize(quantized.text_encoder, torch.float32)
    kinds = {type(m).__name__ for n, m in quantized.text_encoder.named_modules() if n.endswith((".wi_0", ".wo"))}
    assert kinds == {"Linear4bit", "Linear"}
    with torch.no_grad():
        exact, near = (p.encode_prompt("a red circle", False)[0] for p in (pipe, quantized))
    assert (near - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize(
    "family, flags, message",
    [
        ("sdxl", ["--train_text_encoder"], "no experts for the text encoders"),
        ("sd2", ["--without_t5"], "--without_t5 is for SD3"),
        ("sd2", ["--max_num_frames", "8"], "for video models"),
        ("sd2", ["--weighting_scheme", "mode"], "is for flow models"),
        ("flux", ["--snr_gamma", "5"], "is for diffusion models"),
        ("sd3", ["--resolution", "18"], "multiples of this model's 4"),
    ],
)
def test_flags_for_another_family(world, tmp_path, family, flags, message):
    FAMILIES[family][0]().save_pretrained(tmp_path / "model")
    AcceleratorState._reset_state(True)
    model = ["--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", world / "images"]
    args = train_foster.parse_args([*map(str, model), *flags, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        train_foster.main(args)
    assert not (tmp_path / "run" / "args.json").exists()


def test_blocks_of_every_transformer_compile(tmp_path):
    """diffusers names the repeated blocks of some models only."""
    tiny_sd3(with_t5=False).save_pretrained(tmp_path)
    args = train_foster.parse_args(["--pretrained_model_name_or_path", str(tmp_path), "--compile"])
    AcceleratorState._reset_state(True)
    pipe = train_foster.load_pipeline(args, Accelerator(cpu=True))
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.transformer_blocks)


def test_sd3_without_t5(tmp_path):
    """A folder that declares it absent opens as it is; from one that has it, a flag leaves it out; where its files are
    missing, the message names the flag."""
    tiny_sd3(with_t5=False).save_pretrained(tmp_path / "without")
    assert backbones.load_pipeline(tmp_path / "without").text_encoder_3 is None
    tiny_sd3().save_pretrained(tmp_path / "with")
    assert backbones.load_pipeline(tmp_path / "with").text_encoder_3 is not None
    assert backbones.load_pipeline(tmp_path / "with", without_t5=True).text_encoder_3 is None
    shutil.rmtree(tmp_path / "with" / "text_encoder_3")
    with pytest.raises(ValueError, match="add --without_t5"):
        backbones.load_pipeline(tmp_path / "with")
    assert backbones.load_pipeline(tmp_path / "with", without_t5=True).text_encoder_3 is None
    shutil.rmtree(tmp_path / "without" / "text_encoder_2")
    with pytest.raises(ValueError, match="lacks its text_encoder_2$"):
        backbones.load_pipeline(tmp_path / "without")
