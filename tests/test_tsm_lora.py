"""The method: intervals, layers, routing, text-encoder experts, folding, files."""

import copy
import json
import math

import pytest
import torch
from accelerate import cpu_offload
from conftest import delta, tiny_sd, tiny_video
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import backbones
import tsm_lora
from tsm_lora import T, attach_experts, interval_bounds, interval_index, load_experts, unload_experts

CONV_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "downsamplers.0.conv", "ff.net.0.proj"]


def fill(experts, seed=0, size=0.3):
    """Random B, so that experts differ from the base and from each other."""
    generator = torch.Generator().manual_seed(seed)
    for layer in experts.layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * size
    return experts


def save_all(pipe, folder, n, **options):
    """A folder of n random experts made on `pipe`, which is left as it was."""
    options.setdefault("rank", 2)
    experts = fill(attach_experts(pipe, n, generator=torch.Generator().manual_seed(1), **options))
    for i in range(n):
        experts.save_expert(i, folder / f"interval-{i:03d}.safetensors", steps=7)
    experts.unload()
    return folder


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# -- intervals


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 16, 64, 1000])
def test_intervals_partition_all_timesteps(n):
    bounds = interval_bounds(n)
    index = interval_index(torch.arange(T), bounds)
    assert bounds[0] == 0 and bounds[-1] == T and len(bounds) == n + 1
    for t in range(T):  # the definition, in whole numbers
        assert index[t] == t * n // T and bounds[index[t]] <= t < bounds[index[t] + 1]


def test_interval_of_float_timesteps():
    assert interval_index(1000.0, interval_bounds(8)) == 7 and interval_index(999, interval_bounds(4)) == 3
    assert interval_index(torch.tensor([124.9, 125.0, 499.5, 500.0]), interval_bounds(8)).tolist() == [0, 1, 3, 4]
    for n in (0, -1, T + 1):
        with pytest.raises(ValueError, match="1..1000"):
            interval_bounds(n)


# -- layers


def test_one_expert_equals_peft(pipe):
    """n = 1 and given A, B: forward and gradients, Linear and Conv2d (strided too), alpha != rank."""
    pipe.unet.double()
    peft_unet = copy.deepcopy(pipe.unet)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=CONV_TARGETS)
    peft_unet = get_peft_model(peft_unet, config)
    experts = fill(attach_experts(pipe, 1, rank=3, alpha=7, lora_layers=CONV_TARGETS, train_text_encoder=False))
    for layer in experts.layers.values():
        layer.double()
    assert any(isinstance(base, nn.Conv2d) and base.stride == (2, 2) for base in experts.bases.values())
    peft_layers = dict(peft_unet.base_model.model.named_modules())
    for name, layer in experts.layers.items():
        peft = peft_layers[name.removeprefix("unet.")].double()
        peft.lora_A["default"].weight.data.copy_(layer.A)
        peft.lora_B["default"].weight.data.copy_(layer.B.t().reshape(peft.lora_B["default"].weight.shape))
    x, t, cond = torch.randn(3, 4, 8, 8).double(), torch.tensor([5, 500, 999]), torch.randn(3, 12, 16).double()
    ours, theirs = (m(x, t, encoder_hidden_states=cond).sample for m in (pipe.unet, peft_unet))
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    probe = torch.randn_like(ours)
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    for name, layer in experts.layers.items():
        peft = peft_layers[name.removeprefix("unet.")]
        grad_A, grad_B = peft.lora_A["default"].weight.grad, peft.lora_B["default"].weight.grad
        assert relative(layer.A.grad, grad_A) < 1e-6 and relative(layer.B.grad, grad_B.flatten(1).t()) < 1e-6
    assert all(p.grad is None for name, p in pipe.unet.named_parameters() if ".tsm." not in name)


def test_fresh_experts_are_the_identity(pipe):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 12, 16)
    before = pipe.unet(x, t, cond).sample
    experts = attach_experts(pipe, 8)
    assert torch.equal(pipe.unet(x, t, cond).sample, before)
    fill(experts)
    assert not torch.allclose(pipe.unet(x, t, cond).sample, before)
    with experts.off():
        assert torch.equal(pipe.unet(x, t, cond).sample, before)


def test_mixed_batch_equals_single_samples(pipe):
    fill(attach_experts(pipe, 4, lora_layers=CONV_TARGETS))
    x, t, cond = torch.randn(5, 4, 8, 8), torch.tensor([0, 249, 250, 999, 600]), torch.randn(5, 12, 16)
    mixed = pipe.unet(x, t, cond).sample
    for k in range(5):
        alone = pipe.unet(x[k : k + 1], t[k], cond[k : k + 1]).sample
        torch.testing.assert_close(mixed[k : k + 1], alone, atol=1e-5, rtol=1e-5)


def test_video_rows_follow_their_sample():
    """B*F and B*H*W rows: b is the slowest index."""

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(6, 5)

        def forward(self, sample, timestep):
            return self.to_q(sample)

    routing = tsm_lora.Routing([tsm_lora.Bank(4, (0, 1, 2, 3), 2)])
    model = Video()
    layer = tsm_lora.ExpertLayer(model.to_q, routing, 1.0)
    nn.init.normal_(layer.A), nn.init.normal_(layer.B)
    x, t = torch.randn(3, 7, 4, 6), torch.tensor([10.0, 999.0, 500.0])  # B, F, L, D
    routing.route = routing.at(t)
    rows = layer(x.flatten(0, 1), F.linear).view(3, 7, 4, 5)
    for k in range(3):
        A, B = layer.expert(int(interval_index(t[k], interval_bounds(4))))
        torch.testing.assert_close(rows[k], x[k] @ A.t() @ B)
    with pytest.raises(ValueError, match="cannot be split"):
        layer(torch.randn(4, 6), F.linear)


def test_only_the_experts_of_t_get_gradient(pipe):
    experts = fill(attach_experts(pipe, 4))
    with experts.at(torch.tensor([100, 800])):
        cond = pipe.text_encoder(torch.ones(2, 12, dtype=torch.long))[0]
    pipe.unet(torch.randn(2, 4, 8, 8), torch.tensor([100, 800]), cond).sample.square().sum().backward()
    for layer in experts.layers.values():
        touched = layer.B.grad.view(4, 4, -1).abs().sum((1, 2)) > 0
        assert touched.tolist() == [True, False, False, True]


def test_unset_and_stale_t_raise(pipe):
    experts = attach_experts(pipe, 2)
    to_q = next(base for name, base in experts.bases.items() if name.startswith("unet"))
    with pytest.raises(RuntimeError, match="no t is set"):
        to_q(torch.randn(1, 4, to_q.in_features))
    pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 12, 16))
    with pytest.raises(RuntimeError, match="no t is set"):  # a t left from the forward before
        to_q(torch.randn(1, 4, to_q.in_features))
    with pytest.raises(RuntimeError):  # also when the forward failed
        pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 12, 99))
    with pytest.raises(RuntimeError, match="no t is set"):
        to_q(torch.randn(1, 4, to_q.in_features))
    with pytest.raises(RuntimeError, match="no t is set"):
        pipe.text_encoder(torch.ones(1, 12, dtype=torch.long))
    for t in (-1, 1001):
        with pytest.raises(ValueError, match="leave 0..1000"):
            pipe.unet(torch.randn(1, 4, 8, 8), t, torch.randn(1, 12, 16))


def test_missing_expert_raises(pipe):
    attach_experts(pipe, 8, [3])
    pipe.unet(torch.randn(1, 4, 8, 8), 375, torch.randn(1, 12, 16))
    with pytest.raises(ValueError, match=r"interval\(s\) \[7\]"):
        pipe.unet(torch.randn(1, 4, 8, 8), 1000.0, torch.randn(1, 12, 16))


@pytest.mark.parametrize("other_forward", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(other_forward):
    """Also when the model ran at another t between forward and backward."""
    grads = []
    for checkpointing in (False, True):
        pipe = tiny_sd()
        experts = fill(attach_experts(pipe, 4, generator=torch.Generator().manual_seed(0)))
        if checkpointing:
            experts.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(5)
        x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([20, 400, 900])
        ids = torch.randint(0, 500, (3, 12), generator=generator)
        with experts.at(t):
            cond = pipe.text_encoder(ids)[0]
        loss = pipe.unet(x, t, cond).sample.square().mean()
        if other_forward:
            with experts.at(700):
                other = pipe.text_encoder(ids)[0]
            pipe.unet(x, 700, other)
        loss.backward()
        grads.append([p.grad for p in experts.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-5) and b.abs().sum() > 0 for a, b in zip(*grads))


def test_stock_gradient_checkpointing_fails_closed(pipe):
    fill(attach_experts(pipe, 4, train_text_encoder=False))
    pipe.unet.enable_gradient_checkpointing()
    loss = pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 12, 16)).sample.mean()
    with pytest.raises(RuntimeError, match="no t is set"):
        loss.backward()


def test_one_compiled_graph_serves_all_t(pipe):
    experts = fill(attach_experts(pipe, 4, train_text_encoder=False))
    x, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(pipe.unet, backend=count, dynamic=False)
    with torch.no_grad():
        for t in (torch.tensor(3), torch.tensor(400), torch.tensor(999)):
            torch.testing.assert_close(compiled(x, t, cond).sample, pipe.unet(x, t, cond).sample)
            assert len(graphs) == 2 and experts.routing.route is None  # the hook that reads t, and the whole UNet


@torch.no_grad()
def test_compiled_denoiser_with_text_encoder_experts(pipe, tmp_path):
    call = dict(prompt="a", num_inference_steps=4, output_type="latent")
    load_experts(pipe, save_all(pipe, tmp_path, 2))
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(pipe(**call, generator=torch.Generator().manual_seed(0)).images, expected)
    unload_experts(pipe)
    with pytest.raises(ValueError, match="before torch.compile"):
        load_experts(pipe, tmp_path)


# -- text-encoder experts and plain pipelines

PROMPTS = {"prompt": ["a red circle", "b"], "negative_prompt": ["ugly", ""], "num_images_per_prompt": 2}
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
}


def hand_written_loop(pipe, files, steps, guidance, prompt, negative_prompt, num_images_per_prompt, generator):
    """Merge the expert of each step's t into plain copies of the models: no hook, no routing, no module of ours."""
    experts = [load_file(path) for path in files]
    n = len(experts)
    unet, text_encoder = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    components = {"unet": unet, "text_encoder": text_encoder}
    original = {f"{c}.{k}": v.clone() for c, m in components.items() for k, v in m.state_dict().items()}
    parameters = {f"{c}.{k}": v for c, m in components.items() for k, v in m.named_parameters()}

    def merge(expert):
        for name, parameter in parameters.items():
            key = name.removesuffix(".weight").replace("text_encoder.", "text_encoder.text_model.")
            delta = 0
            if key + ".lora_A.weight" in expert:
                delta = expert[key + ".lora_B.weight"].flatten(1) @ expert[key + ".lora_A.weight"].flatten(1)
                delta = delta.view_as(parameter)
            parameter.data = original[name] + delta

    def encode(texts):
        tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        return text_encoder(tokens.input_ids)[0].repeat_interleave(num_images_per_prompt, 0)

    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(prompt) * num_images_per_prompt, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        merge(experts[min(math.floor(t), T - 1) * n // T])
        inputs = scheduler.scale_model_input(x, t)
        pred = unet(inputs, t, encode(prompt)).sample
        if guidance > 1:
            uncond = unet(inputs, t, encode(negative_prompt)).sample
            pred = uncond + guidance * (pred - uncond)
        x = scheduler.step(pred, t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_plain_pipeline_equals_hand_written_loop(pipe, tmp_path, name, guidance):
    cls, options = SCHEDULERS[name]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    save_all(pipe, tmp_path, 8, alpha=5)
    steps = 7
    expected = hand_written_loop(
        pipe, sorted(tmp_path.iterdir()), steps, guidance, generator=torch.Generator().manual_seed(3), **PROMPTS
    )
    call = dict(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
    base = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    load_experts(pipe, tmp_path)
    latents = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    assert relative(latents, expected) < 1e-5 and relative(base, expected) > 0.01
    again = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    assert torch.equal(latents, again)
    unload_experts(pipe)
    assert torch.equal(base, pipe(**call, generator=torch.Generator().manual_seed(3)).images)


def test_timesteps_cover_the_hard_cases(pipe):
    """What the schedulers above send: PNDM repeats a t, Euler sends halves."""
    pndm = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pndm.set_timesteps(7)
    assert len(pndm.timesteps) == 8 and len(set(pndm.timesteps.tolist())) == 7
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    euler.set_timesteps(7)
    assert any(t % 1 for t in euler.timesteps.tolist())


def test_prompt_embeds_are_refused(pipe, tmp_path):
    load_experts(pipe, save_all(pipe, tmp_path, 2))
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipe(prompt_embeds=torch.randn(1, 12, 16), num_inference_steps=1, guidance_scale=1)

    def tamper(pipe, step, t, inputs):
        return {"prompt_embeds": inputs["prompt_embeds"] * 0.5}

    with pytest.raises(ValueError, match="not what this pipeline's encode_prompt made"):
        pipe(
            "a",
            num_inference_steps=2,
            callback_on_step_end=tamper,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


@torch.no_grad()
def test_predict_equals_a_pipeline_step(pipe, tmp_path):
    """What training computes, with each sample's prompt encoded at its own t, is what sampling computes."""
    experts = load_experts(pipe, save_all(pipe, tmp_path, 4))
    pipe("a", num_inference_steps=2)  # leaves a remembered prompt behind
    x, t, prompts = torch.randn(3, 4, 8, 8), torch.tensor([10, 990, 300]), ["a", "bc", ""]
    together = experts.predict(x, t, prompts)
    for k in range(3):
        with experts.at(t[k]):
            cond = pipe.encode_prompt(prompts[k], "cpu", 1, False)[0]
        torch.testing.assert_close(together[k : k + 1], pipe.unet(x[k : k + 1], t[k], cond).sample)


@torch.no_grad()
def test_prompts_are_encoded_once_per_interval_in_use(pipe, tmp_path):
    """Image to image starts late: the noisiest intervals are not in use."""
    experts = load_experts(pipe, save_all(pipe, tmp_path, 8))
    image_pipe, encoded, original = StableDiffusionImg2ImgPipeline(**pipe.components), [], experts._encode_prompt
    unload_experts(pipe)
    load_experts(image_pipe, tmp_path)
    original = image_pipe._tsm_experts._encode_prompt
    image_pipe._tsm_experts._encode_prompt = lambda *a, **k: encoded.append(k) or original(*a, **k)
    image_pipe("a", image=torch.rand(1, 3, 16, 16), strength=0.25, num_inference_steps=16, output_type="latent")
    assert len(encoded) == 1 + 2  # the stand-in, and t < 250 spans two of eight intervals


@torch.no_grad()
def test_conditions_of_ones_own(pipe, tmp_path):
    experts = load_experts(pipe, save_all(pipe, tmp_path, 2))
    pipe("a", num_inference_steps=1)
    with experts.at(900):
        cond = pipe.text_encoder(torch.ones(1, 12, dtype=torch.long))[0]
    assert pipe.unet(torch.randn(1, 4, 8, 8), 900, cond).sample.isfinite().all()


def test_fused_projections_are_refused(pipe, tmp_path):
    load_experts(pipe, save_all(pipe, tmp_path, 2, train_text_encoder=False))
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe("a", num_inference_steps=1)
    pipe.unfuse_qkv_projections(vae=False)
    pipe("a", num_inference_steps=1)


@torch.no_grad()
def test_scale_of_a_call_acts(pipe, tmp_path):
    save_all(pipe, tmp_path, 2)
    call = dict(prompt="a", num_inference_steps=2, output_type="latent")

    def sample(**options):
        return pipe(**call, **options, generator=torch.Generator().manual_seed(0)).images

    base = sample()
    load_experts(pipe, tmp_path)
    full, none = sample(), sample(cross_attention_kwargs={"scale": 0.0})
    half = sample(cross_attention_kwargs={"scale": 0.5})
    unload_experts(pipe)
    load_experts(pipe, tmp_path, scale=0.5)
    torch.testing.assert_close(none, base)
    torch.testing.assert_close(half, sample())
    assert relative(full, half) > 1e-3


@torch.no_grad()
def test_stock_lora_on_top(pipe, tmp_path):
    """A stock LoRA and ours add up, whichever was loaded first."""
    stock = tmp_path / "stock"
    save_all(pipe, stock, 1, alpha=5)
    ours = save_all(pipe, tmp_path / "ours", 4)
    call = dict(prompt="a", num_inference_steps=3, output_type="latent")

    def sample():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    load_experts(pipe, ours)
    alone = sample()
    pipe.load_lora_weights(stock / "interval-000.safetensors")
    both = sample()
    unload_experts(pipe)
    only_stock = sample()
    load_experts(pipe, ours, check_base=True)
    torch.testing.assert_close(sample(), both)
    assert min(relative(alone, both), relative(only_stock, both)) > 1e-3
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(), alone)


@torch.no_grad()
def test_to_moves_experts_along(pipe, tmp_path):
    call = dict(prompt="a", num_inference_steps=2, output_type="latent")

    def sample():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images.float()

    base = sample()
    load_experts(pipe, save_all(pipe, tmp_path, 2))
    expected = sample()
    pipe.to(torch.bfloat16)
    assert {p.dtype for p in pipe._tsm_experts.parameters()} == {torch.bfloat16}
    assert relative(sample(), expected) < 0.1 < relative(base, expected)


@torch.no_grad()
def test_sequential_offload_calls_experts_with_their_weights(pipe, tmp_path):
    experts = load_experts(pipe, save_all(pipe, tmp_path, 2))
    x, ids = torch.randn(1, 4, 8, 8), torch.arange(12)[None]

    def forward():
        with experts.at(900):
            cond = pipe.text_encoder(ids)[0]
        return pipe.unet(x, torch.tensor(900), cond).sample

    expected = forward()
    for component in (pipe.unet, pipe.text_encoder):
        cpu_offload(component, torch.device("cpu"))  # weights wait on the meta device until their module runs
    assert next(pipe.unet.parameters()).device.type == "meta"
    torch.testing.assert_close(forward(), expected)
    with pytest.raises(ValueError, match="is offloaded"), experts.folded():
        pass


# -- folding


@torch.no_grad()
def test_folding(pipe, tmp_path):
    save_all(pipe, tmp_path, 4, lora_layers=CONV_TARGETS, alpha=5)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    call = dict(prompt="a", num_inference_steps=9, output_type="latent")
    experts = load_experts(pipe, tmp_path)
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with experts.folded():
        folded = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        changed = pipe.unet.state_dict()
        assert any(not torch.equal(changed[k], v) for k, v in before.items())
    assert relative(folded, plain) < 1e-4

    def stop(pipe, step, t, inputs):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt), experts.folded():
        pipe(**call, callback_on_step_end=stop)
    torch.testing.assert_close(pipe(**call, generator=torch.Generator().manual_seed(0)).images, plain, rtol=0, atol=0)
    unload_experts(pipe)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


@torch.no_grad()
def test_off_is_the_base_also_while_folded(pipe, tmp_path):
    experts = load_experts(pipe, save_all(pipe, tmp_path, 4, train_text_encoder=False))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(900), torch.randn(1, 12, 16)
    with experts.off():
        base = pipe.unet(*inputs).sample
    plain = pipe.unet(*inputs).sample
    with experts.folded():
        pipe.unet(*inputs)
        with pytest.raises(RuntimeError, match="folded already"), experts.folded():
            pass
        with experts.off():
            assert torch.equal(pipe.unet(*inputs).sample, base)
        torch.testing.assert_close(pipe.unet(*inputs).sample, plain)
    assert relative(plain, base) > 1e-3


def test_folding_is_refused_in_half_precision(pipe, tmp_path):
    experts = load_experts(pipe, save_all(pipe, tmp_path, 2))
    pipe.to(torch.bfloat16)
    with pytest.raises(ValueError, match="fp32"), experts.folded():
        pass


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_peft(pipe, tmp_path):
    """Experts with |BA| = 10 % of |W|, layer by layer in bf16: error against the exact result, ours and PEFT's
    unmerged, beside that of a layer without its expert."""
    experts = fill(attach_experts(pipe, 1, rank=4, train_text_encoder=False))
    for name, layer in experts.layers.items():
        layer.B.data *= 0.1 * experts.bases[name].weight.norm() / delta(layer, 0).norm()
    experts.save_expert(0, tmp_path / "interval-000.safetensors")
    deltas = {name: delta(layer, 0).double() for name, layer in experts.layers.items()}
    experts.unload()
    pipe.to(torch.bfloat16)
    inputs, errors = {}, {"ours": 0.0, "peft": 0.0, "none": 0.0}

    def measure(kind):
        modules = dict(pipe.unet.named_modules())
        for name, addition in deltas.items():
            layer = modules[name.removeprefix("unet.")]
            base = getattr(layer, "base_layer", layer)
            x = inputs.setdefault(name, torch.randn(64, addition.shape[1]).bfloat16())
            bias = 0 if base.bias is None else base.bias.double()
            exact = x.double() @ (base.weight.double() + addition).t() + bias
            errors[kind] += float((layer(x).double() - exact).norm() ** 2)

    measure("none")
    experts = load_experts(pipe, tmp_path)
    with experts.at(500):
        measure("ours")
    experts.unload()
    pipe.load_lora_weights(tmp_path / "interval-000.safetensors")
    measure("peft")
    assert errors["ours"] ** 0.5 <= 1.2 * errors["peft"] ** 0.5 < 0.2 * errors["none"] ** 0.5


# -- files


@torch.no_grad()
def test_saved_expert_opens_with_the_stock_loader(pipe, tmp_path):
    """alpha != rank, text encoder included, each interval: the stock loader's latents are ours inside the interval."""
    save_all(pipe, tmp_path, 4, alpha=9, rank=3, lora_layers=CONV_TARGETS)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # takes timesteps of one's own

    def sample(i):
        timesteps = [250 * i + 249, 250 * i + 100, 250 * i + 1]
        call = dict(prompt="a red circle", negative_prompt="b", timesteps=timesteps, output_type="latent")
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    base = [sample(i) for i in range(4)]
    load_experts(pipe, tmp_path)
    ours = [sample(i) for i in range(4)]
    unload_experts(pipe)
    for i in range(4):
        pipe.load_lora_weights(tmp_path / f"interval-{i:03d}.safetensors")
        assert relative(ours[i], sample(i)) < 1e-4 < 0.01 < relative(base[i], ours[i])
        pipe.unload_lora_weights()


def test_header_holds_every_fact(pipe, tmp_path):
    save_all(pipe, tmp_path, 8, rank=2, alpha=6)
    with safe_open(tmp_path / "interval-003.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    facts = json.loads(metadata["tsm"])
    assert facts["num_intervals"] == 8 and facts["interval_index"] == 3 and facts["timesteps"] == [375, 499]
    assert facts["rank"] == 2 and facts["alpha"] == 6 and facts["steps"] == 7 and facts["T"] == 1000
    assert facts["prediction_type"] == "epsilon" and "grows with noise" in facts["t_direction"]
    assert metadata["modelspec.timestep_range"] == "375,500"
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert not any("alpha" in key for key in keys) and len(keys) == 2 * (4 * 8 + 2 * 2)


def test_save_and_load_round_trip(pipe, tmp_path):
    experts = fill(attach_experts(pipe, 3, rank=2, alpha=4))
    expected = {name: delta(layer, 1) for name, layer in experts.layers.items()}
    for i in range(3):
        experts.save_expert(i, tmp_path / f"interval-{i:03d}.safetensors")
    experts.unload()
    loaded = load_experts(pipe, tmp_path)
    for name, layer in loaded.layers.items():
        assert torch.equal(delta(layer, 1), expected[name])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_unloading_leaves_no_trace(pipe, tmp_path):
    def state():
        modes = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in pipe.unet.modules()]
        modes += [p.requires_grad for p in pipe.text_encoder.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
        return list(pipe.unet.state_dict()), list(pipe.text_encoder.state_dict()), hooks, modes, sorted(vars(pipe))

    before = state()
    load_experts(pipe, save_all(pipe, tmp_path, 2))
    assert state() != before
    with pytest.raises(ValueError, match="unload_experts"):
        load_experts(pipe, tmp_path)
    unload_experts(pipe)
    unload_experts(pipe)
    assert state() == before
    experts = attach_experts(pipe, 2)
    experts.enable_gradient_checkpointing()
    experts.unload()
    assert state() == before


def missing(folder):
    (folder / "interval-001.safetensors").unlink()
    return r"lacks the experts of intervals \[1\] of 4"


def doubled(folder):
    (folder / "copy.safetensors").write_bytes((folder / "interval-001.safetensors").read_bytes())
    return "both are interval 1"


def truncated(folder):
    path = folder / "interval-002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "interval-002.safetensors is truncated"


def pickled(folder):
    torch.save({"a": torch.zeros(1)}, folder / "interval-002.safetensors")
    return "nothing is ever unpickled"


def pickle_suffix(folder):
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_lora_weights.bin")
    return "pickled weights are never read"


def foreign(folder):
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    return "no timestep expert"


def other_set(folder):
    save_all(tiny_sd(), folder / "n2", 2)
    (folder / "n2" / "interval-000.safetensors").rename(folder / "x.safetensors")
    return "not of one set"


def other_base(folder):
    for path in folder.iterdir():
        path.unlink()
    save_all(tiny_sd(seed=1), folder, 4)
    return "whose weights are not those of"


def other_family(folder):
    for path in folder.iterdir():
        path.unlink()
    save_all(tiny_video(), folder, 4)
    return "do not fit this pipeline's UNet2DConditionModel; load their base model"


def misshapen(folder):
    path = folder / "interval-002.safetensors"
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    key = next(k for k in tensors if k.endswith("to_q.lora_A.weight"))
    save_file(tensors | {key: torch.zeros(1, 1)}, path, metadata)
    return "this model needs"


def wrong_keys(folder):
    path = folder / "interval-002.safetensors"
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    tensors.pop(next(iter(tensors)))
    save_file(tensors | {"unet.nowhere.lora_A.weight": torch.zeros(1)}, path, metadata)
    return r"1 tensors are missing .* 1 are foreign \(unet.nowhere"


def empty(folder):
    for path in folder.iterdir():
        path.unlink()
    return "holds no .safetensors file"


SPOIL = [
    missing,
    doubled,
    truncated,
    pickled,
    pickle_suffix,
    foreign,
    other_set,
    other_base,
    other_family,
    misshapen,
    wrong_keys,
    empty,
]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__)
def test_bad_folders_are_refused(pipe, tmp_path, spoil):
    save_all(pipe, tmp_path, 4)
    with pytest.raises(ValueError, match=spoil(tmp_path)):
        load_experts(pipe, tmp_path)
    assert "_tsm_experts" not in vars(pipe) and not any(".tsm." in k for k in pipe.unet.state_dict())


def test_fingerprint_tells_finetunes_apart_but_not_precisions():
    """At SD1.5's width a fine-tune changes a weight's norm by less than rounding does, so entries are compared."""
    weight = torch.randn(1280, 1280, generator=torch.Generator().manual_seed(0)) * 0.03
    entries = weight.flatten()[:: weight.numel() // 16][:16]
    tuned = entries * (1 + 0.02 * torch.randn(16, generator=torch.Generator().manual_seed(1)))
    assert not tsm_lora._close(entries.tolist(), tuned.tolist())
    for dtype in (torch.bfloat16, torch.float16):
        assert tsm_lora._close(entries.tolist(), entries.to(dtype).tolist())


def test_other_text_encoder_is_another_base(pipe, tmp_path):
    save_all(pipe, tmp_path, 2)
    pipe.text_encoder = tiny_sd(seed=1).text_encoder
    with pytest.raises(ValueError, match="whose weights are not those of"):
        load_experts(pipe, tmp_path)


def test_other_base_on_request(pipe, tmp_path):
    save_all(tiny_sd(seed=1), tmp_path, 2)
    load_experts(pipe, tmp_path, check_base=False)


def test_parent_folder_gets_a_hint(pipe, tmp_path):
    save_all(pipe, tmp_path / "experts-n2", 2)
    with pytest.raises(ValueError, match="did you mean .*experts-n2"):
        load_experts(pipe, tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_experts(pipe, tmp_path / "nowhere")


def test_wrong_arguments(pipe):
    for options, message in (
        (dict(num_intervals=0), "1..1000"),
        (dict(num_intervals=4, indices=[4]), "interval indices must lie in 0..3"),
        (dict(num_intervals=4, rank=17), "rank 17 does not fit"),
        (dict(num_intervals=4, rank=0), "rank 0 does not fit"),
        (dict(num_intervals=4, lora_layers=["to_x"]), "'to_x'; its layers end in"),
        (dict(num_intervals=4, lora_layers=["norm1"]), "need a Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_experts(pipe, **options)
        assert "_tsm_experts" not in vars(pipe)


def test_unknown_backbone(pipe):
    class NewPipeline:
        pass

    with pytest.raises(ValueError, match="no backbone entry for NewPipeline; there are .*PixArt"):
        backbones.backbone_of(NewPipeline())
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="has no text_encoder"):
        backbones.backbone_of(pipe)


# -- the real model's sizes


def test_trainable_parameters_of_sd15():
    """152 modules, 944,640 parameters at r = 4 on the real configuration: 0.09604 % in the paper's Table 9."""
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny_sd()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        pipe.text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    base = sum(p.numel() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())
    experts = attach_experts(pipe, 1, rank=4)
    trainable = sum(p.numel() for p in experts.parameters())
    assert base == 859_520_964 + 123_060_480
    assert len(experts.layers) == 152 and trainable == 944_640
    assert f"{100 * trainable / (base + trainable):.6f}" == "0.096046"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_target(prediction_type):
    """x_t and target by the formulas, and t of the interval from uniform numbers."""
    pipe = tiny_sd(prediction_type=prediction_type)
    process = backbones.backbone_of(pipe).process(pipe)
    x0, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 3, 700, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    ab = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1).float()
    xt, target = process.diffuse(x0, noise, t)
    torch.testing.assert_close(xt, ab.sqrt() * x0 + (1 - ab).sqrt() * noise)
    expected = noise if prediction_type == "epsilon" else ab.sqrt() * noise - (1 - ab).sqrt() * x0
    torch.testing.assert_close(target, expected)
    u = torch.linspace(0, 1, 10_001)[:-1]
    t = process.draw_t(u, 375, 500)
    assert t.unique().tolist() == list(range(375, 500)) and t.bincount()[375:].float().std() < 1
