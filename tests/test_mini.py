"""The bundled base model keeps its promises, and the default job adapts it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

import train_foster
from mini import world

MODEL = Path(train_foster.__file__).parent / "mini" / "sd15"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scores(pipe, prompts, key):
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    images = pipe(prompts, generator=generators, num_inference_steps=20, guidance_scale=3.0).images
    return np.mean([world.score(image, prompt)[key] for image, prompt in zip(images, prompts)])


def test_it_is_a_regular_small_pipeline(pipe):
    classes = [type(pipe.components[name]) for name in ("unet", "vae", "text_encoder", "scheduler")]
    assert classes == [UNet2DConditionModel, AutoencoderKL, CLIPTextModel, DDIMScheduler]
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 5e6
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.config.num_train_timesteps == 1000


def test_it_draws_well(pipe):
    """One object: colour right in at least 90 %, shape in 85 % (24 prompts, all colours by all shapes)."""
    prompts = [f"a {colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES]
    assert scores(pipe, prompts, "colour") >= 0.9 and scores(pipe, prompts, "shape") >= 0.85


def test_it_binds_badly(pipe):
    """Two objects: between 30 and 70 % (100 prompts: three standard errors are 15 %; the bundled model has 52 %)."""
    assert 0.3 <= scores(pipe, world.prompts("colour", "validation"), "binding") <= 0.7


def test_the_default_job_lowers_the_loss(tmp_path):
    """As the README's command, but two intervals and fewer steps and pictures."""
    AcceleratorState._reset_state(True)
    flags = ["--interval_indices", "1", "6", "--max_train_steps", "30", "--max_validation_samples", "64"]
    train_foster.main(train_foster.parse_args([*flags, "--report_to", "none", "--output_dir", str(tmp_path)]))
    table = json.loads((tmp_path / "validation.json").read_text())
    assert "target-validation" in table["pictures_from"]
    for record in table["intervals"]:
        assert record["gain"] > 2 * record["standard_error"] > 0
