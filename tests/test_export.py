"""export.py: kohya keys, PEFT folders, ComfyUI keyframes."""

import copy
import json

import pytest
import torch
from conftest import tiny_pixart, tiny_sd
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import PeftModel
from test_tsm_lora import CONV_TARGETS, relative, save_all

import export
import tsm_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    pipe = tiny_sd()
    pipe.save_pretrained(root / "model")
    save_all(pipe, root / "experts", 3, alpha=7, lora_layers=CONV_TARGETS)
    return root


def run(world, kind, out):
    flags = ["--format", kind, "--output_dir", str(out), "--pretrained_model_name_or_path", str(world / "model")]
    export.main(export.parse_args([str(world / "experts"), *flags]))
    return out


@torch.no_grad()
def outputs(world, t):
    """Denoiser and text encoder with our experts at t, on fixed inputs."""
    pipe = tiny_sd()
    experts = tsm_lora.load_experts(pipe, world / "experts")
    with experts.at(t):
        cond = pipe.text_encoder(torch.arange(12)[None])[0]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, cond, pipe.unet(x, t, cond).sample


@torch.no_grad()
def test_kohya_file_loads_in_diffusers(world, tmp_path):
    run(world, "kohya", tmp_path / "out")
    for i, t in enumerate((10, 500, 999)):
        x, cond, expected = outputs(world, t)
        pipe = tiny_sd()
        pipe.load_lora_weights(tmp_path / "out" / f"interval-{i:03d}.safetensors")
        assert relative(pipe.text_encoder(torch.arange(12)[None])[0], cond) < 1e-5
        assert relative(pipe.unet(x, t, cond).sample, expected) < 1e-5


@torch.no_grad()
def test_peft_folder_loads_in_peft(world, tmp_path):
    run(world, "peft", tmp_path / "out")
    x, cond, expected = outputs(world, 500)
    pipe, folder = tiny_sd(), tmp_path / "out" / "interval-001"
    text_encoder = PeftModel.from_pretrained(copy.deepcopy(pipe.text_encoder), folder / "text_encoder")
    unet = PeftModel.from_pretrained(copy.deepcopy(pipe.unet), folder / "unet")
    assert relative(text_encoder(torch.arange(12)[None])[0], cond) < 1e-5
    assert relative(unet(x, 500, encoder_hidden_states=cond).sample, expected) < 1e-5
    assert relative(pipe.unet(x, 500, cond).sample, expected) > 1e-3


@torch.no_grad()
def test_peft_folder_loads_in_peft_on_pixart(tmp_path):
    """PixArt has no LoRA loader in diffusers: a PEFT folder is what its users load."""
    pipe = tiny_pixart()
    pipe.save_pretrained(tmp_path / "model")
    save_all(pipe, tmp_path / "experts", 3, alpha=7)
    run(tmp_path, "peft", tmp_path / "out")
    experts = tsm_lora.load_experts(pipe, tmp_path / "experts")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    ours = experts.predict(x, t, ["a red circle", "b"])
    experts.unload()
    fresh, folder = tiny_pixart(), tmp_path / "out" / "interval-001"
    fresh.text_encoder = PeftModel.from_pretrained(fresh.text_encoder, folder / "text_encoder")
    cond, mask, _, _ = fresh.encode_prompt(["a red circle", "b"], False)
    transformer = PeftModel.from_pretrained(fresh.transformer, folder / "transformer")
    options = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": mask}
    assert relative(transformer(x, cond, timestep=t, **options).sample[:, :4], ours) < 1e-5
    with transformer.disable_adapter():
        assert relative(transformer(x, cond, timestep=t, **options).sample[:, :4], ours) > 1e-3


def percent_to_sigma(percent, sigmas, shift):
    """ComfyUI's, for a discrete schedule (sigmas of t = 0..999) and for a flow with a shift."""
    if percent <= 0:
        return float("inf")
    if percent >= 1:
        return 0.0
    if sigmas is None:
        return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))
    t = 999 * (1 - percent)
    low, high = int(t), min(int(t) + 1, 999)
    return float(torch.exp((1 - (t - low)) * sigmas[low].log() + (t - low) * sigmas[high].log()))


@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "flow"])
def test_keyframes_cover_every_step_once_by_the_expert_of_its_t(name, n):
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigmas, shift = None, 3.0
    if name == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        cls = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[name]
        scheduler = cls(**betas)
        ab = scheduler.alphas_cumprod.double()
        sigmas = ((1 - ab) / ab).sqrt()
    frames = export.keyframes(tsm_lora.interval_bounds(n), scheduler)
    for steps in (4, 20, 28, 50):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            sigma = t / 1000 if sigmas is None else float(sigmas[int(t)])
            # an expert is on from its start keyframe until its end keyframe
            active = [
                i
                for i, (start, end) in enumerate(frames)
                if sigma <= percent_to_sigma(start, sigmas, shift)
                and (end >= 1 or not sigma <= percent_to_sigma(end, sigmas, shift))
            ]
            assert active == [int(tsm_lora.interval_index(t, tsm_lora.interval_bounds(n)))], (t, frames)


def test_keyframe_file(world, tmp_path):
    out = run(world, "comfyui", tmp_path / "out")
    table = json.loads((out / "keyframes.json").read_text())
    assert [row["timesteps"] for row in table] == [[0, 333], [334, 666], [667, 999]]
    assert table[2]["start_percent"] == 0 and table[0]["end_percent"] == 1
    assert all(a["start_percent"] == b["end_percent"] for a, b in zip(table, table[1:]))
    assert all((out / row["file"]).is_file() for row in table)
    with pytest.raises(ValueError, match="exists already"):
        run(world, "comfyui", tmp_path / "out")


def test_other_models_are_refused_for_kohya():
    with pytest.raises(ValueError, match="--format peft serves"):
        export.to_kohya({"transformer.a.lora_A.weight": torch.zeros(1, 1)})
