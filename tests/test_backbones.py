"""Every family of the table: in its stock pipeline a plain `pipe(prompt)` picks expert and text by t."""

import math

import pytest
import torch
from conftest import delta, tiny_pixart
from test_tsm_lora import PROMPTS, fill, relative

from tsm_lora import T, attach_experts, load_experts


def save_experts(pipe, folder, n):
    experts = fill(attach_experts(pipe, n, rank=2, generator=torch.Generator().manual_seed(1)))
    for i in range(n):
        experts.save_expert(i, folder / f"interval-{i:03d}.safetensors")
    experts.unload()
    return folder


@torch.no_grad()
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pixart_pipeline_equals_hand_written_loop(tmp_path, guidance):
    """Each expert added to the weights of plain copies at its own steps; no hook, no routing."""
    pipe, steps, n = tiny_pixart(), 6, 8
    call = dict(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
    call |= {"use_resolution_binning": False, "height": 16, "width": 16}
    experts = load_experts(pipe, save_experts(pipe, tmp_path, n))
    ours = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    again = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    deltas = [{name: delta(layer, i) for name, layer in experts.layers.items()} for i in range(n)]
    experts.unload()
    base = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    modules = {f"{c}.{k}": m for c in ("transformer", "text_encoder") for k, m in getattr(pipe, c).named_modules()}
    originals = {name: modules[name].weight.clone() for name in deltas[0]}
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        i = min(math.floor(t), T - 1) * n // T
        for name, addition in deltas[i].items():
            modules[name].weight.data = originals[name] + addition
        embeds = pipe.encode_prompt(PROMPTS["prompt"], True, PROMPTS["negative_prompt"], 2)
        preds = [
            pipe.transformer(
                x,
                cond,
                timestep=t.expand(4),
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample[:, :4]
            for cond, mask in (embeds[:2], embeds[2:])
        ]
        pred = preds[1] + guidance * (preds[0] - preds[1]) if guidance > 1 else preds[0]
        x = pipe.scheduler.step(pred, t, x).prev_sample
    assert relative(ours, x) < 1e-5 < 0.01 < relative(base, x) and torch.equal(ours, again)


@torch.no_grad()
def test_mixed_batch_equals_single_samples():
    pipe = tiny_pixart()
    experts = fill(attach_experts(pipe, 4))
    x, t, prompts = torch.randn(3, 4, 8, 8), torch.tensor([10, 990, 300]), ["a", "bc", ""]
    together = experts.predict(x, t, prompts)
    assert together.shape == x.shape  # without the learned variance
    for k in range(3):
        alone = experts.predict(x[k : k + 1], t[k : k + 1], prompts[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients_without_dropout():
    """T5's attention drops out in training mode, which checkpointing needs elsewhere."""
    grads = []
    for checkpointing in (False, True):
        pipe = tiny_pixart()
        experts = fill(attach_experts(pipe, 4, generator=torch.Generator().manual_seed(0)))
        if checkpointing:
            experts.enable_gradient_checkpointing()
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        experts.predict(x, torch.tensor([20, 400, 900]), ["a", "bc", "def"]).square().mean().backward()
        grads.append([p.grad for p in experts.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-5) and b.abs().sum() > 0 for a, b in zip(*grads))


def test_pixart_of_1024_pixels_is_told_the_size():
    pipe = tiny_pixart()
    pipe.transformer.register_to_config(sample_size=128)
    extra = attach_experts(pipe, 1).backbone.extra(pipe, torch.zeros(2, 4, 64, 128))["added_cond_kwargs"]
    assert extra["resolution"].tolist() == [[128, 256]] * 2 and extra["aspect_ratio"].tolist() == [[0.5]] * 2
