"""sample.py on a random pipeline: names, seeds, reruns, processes, wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_sd
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tsm_lora import save_all

import sample
import tsm_lora

ROOT = Path(sample.__file__).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    pipe = tiny_sd()
    pipe.save_pretrained(root / "model")
    save_all(pipe, root / "experts", 4)
    (root / "prompts.txt").write_bytes("a red circle\r\n\r\na caf\u00e9/bar\r\n".encode())  # as T2I-CompBench: CRLF
    return root


def command(world, out, *flags):
    return [
        *("--pretrained_model_name_or_path", str(world / "model"), "--output_dir", str(out)),
        *("--num_inference_steps", "3", *map(str, flags)),
    ]


def run(world, out, *flags):
    sample.main(sample.parse_args(command(world, out, *flags)))
    return {p.name: p.read_bytes() for p in sorted((out / "samples").iterdir())}


def test_names_and_metadata(world, tmp_path):
    flags = ("--prompts_file", world / "prompts.txt", "--num_images_per_prompt", 2)
    pictures = run(world, tmp_path, *flags)
    names = ["a café bar_000002.png", "a café bar_000003.png", "a red circle_000000.png", "a red circle_000001.png"]
    assert sorted(pictures) == names
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red circle"] * 2 + ["a café/bar"] * 2
    assert [row["seed"] for row in rows] == [0, 1, 2, 3] and len(set(pictures.values())) == 4
    assert (tmp_path / "grid.png").exists()
    same = run(world, tmp_path / "same", *flags, "--same_seeds", "--seed", 42)
    rows = [json.loads(line) for line in (tmp_path / "same" / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [42, 43, 42, 43] and len(same) == 4


def test_pictures_are_those_of_the_stock_pipeline(world, tmp_path):
    flags = ("--experts", world / "experts", "--scheduler", "EulerDiscreteScheduler", "--guidance_scale", 3)
    run(world, tmp_path, "--prompt", "a", "b", *flags, "--negative_prompt", "ugly", "--seed", 5)
    pipe = StableDiffusionPipeline.from_pretrained(world / "model")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    tsm_lora.load_experts(pipe, world / "experts")
    generator = torch.Generator().manual_seed(6)
    image = pipe("b", negative_prompt="ugly", num_inference_steps=3, guidance_scale=3, generator=generator).images[0]
    ours = Image.open(tmp_path / "samples" / "b_000001.png")
    worst = max(abs(a - b) for a, b in zip(image.tobytes(), ours.tobytes()))
    assert image.size == ours.size and worst <= 1  # folded beside unfolded, batch of 2 beside 1
    base = run(world, tmp_path / "base", "--prompt", "a", "b", *flags[2:], "--negative_prompt", "ugly", "--seed", 5)
    assert base["b_000001.png"] != (tmp_path / "samples" / "b_000001.png").read_bytes()


def test_students_run_at_their_own_timesteps(world, tmp_path):
    """Explicit timesteps; LCMScheduler's own choice (999, 759, 499, 259) is refused, and other t with the reason."""
    pipe = tiny_sd()
    save_all(pipe, tmp_path / "student", 4)
    for path in (tmp_path / "student").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        facts = json.loads(metadata["tsm"]) | {"student_timesteps": [999, 749, 499, 249]}
        save_file(load_file(path), path, metadata | {"tsm": json.dumps(facts)})
    flags = ("--prompt", "a", "--experts", tmp_path / "student", "--scheduler", "LCMScheduler", "--guidance_scale", 0)
    with pytest.raises(ValueError, match="999 759 499 259.*never seen: add .*--timesteps 999 749 499 249"):
        run(world, tmp_path / "out", *flags)
    with pytest.raises(ValueError, match=r"--timesteps \[999, 759, 499, 259\] with LCMScheduler"):
        run(world, tmp_path / "out", *flags, "--timesteps", 999, 759, 499, 259)
    assert not (tmp_path / "out").exists()
    pictures = run(world, tmp_path / "out", *flags, "--timesteps", 999, 749, 499, 249)
    tsm_lora.load_experts(pipe, tmp_path / "student")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    options = {"timesteps": [999, 749, 499, 249], "guidance_scale": 0, "generator": torch.Generator().manual_seed(0)}
    image = pipe("a", **options).images[0]
    (tmp_path / "ours.png").write_bytes(pictures["a_000000.png"])
    ours = Image.open(tmp_path / "ours.png").tobytes()
    assert max(abs(a - b) for a, b in zip(image.tobytes(), ours)) <= 1


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_rivals_without_training(world, tmp_path, scheduler):
    eta = ("--eta", 1) if scheduler == "DDIMScheduler" else ()
    flags = ("--prompt", "a", "--scheduler", scheduler, "--num_inference_steps", 4)
    assert run(world, tmp_path / "a", *flags, *eta) != run(world, tmp_path / "b", "--prompt", "a")


def test_stock_lora_files(world, tmp_path):
    flags = ("--prompt", "a", "--scheduler", "LCMScheduler", "--timesteps", 999, 749, 499, 249, "--guidance_scale", 0)
    lora = ("--lora_weights", world / "experts" / "interval-000.safetensors")
    assert run(world, tmp_path / "a", *flags, *lora) != run(world, tmp_path / "b", *flags)


def test_rerun_makes_only_what_is_missing(world, tmp_path):
    flags = ("--prompts_file", world / "prompts.txt", "--num_images_per_prompt", 3)
    first = run(world, tmp_path, *flags)
    gone = tmp_path / "samples" / "a red circle_000001.png"
    gone.unlink()
    kept = tmp_path / "samples" / "a red circle_000000.png"
    time = kept.stat().st_mtime_ns
    second = run(world, tmp_path, *flags, "--batch_size", 1)
    assert kept.stat().st_mtime_ns == time and second.keys() == first.keys()
    a, b = first[gone.name], second[gone.name]
    (tmp_path / "a.png").write_bytes(a)
    worst = max(abs(x - y) for x, y in zip(Image.open(tmp_path / "a.png").tobytes(), Image.open(gone).tobytes()))
    assert b and worst <= 1
    with pytest.raises(ValueError, match="other pictures.*--guidance_scale.*4.0, 2.0"):
        run(world, tmp_path, *flags, "--guidance_scale", 2)


def test_other_experts_in_the_same_folder_are_noticed(world, tmp_path):
    shutil.copytree(world / "experts", tmp_path / "experts")
    run(world, tmp_path / "out", "--prompt", "a", "--experts", tmp_path / "experts")
    pipe = StableDiffusionPipeline.from_pretrained(world / "model")
    save_all(pipe, tmp_path / "experts", 4, alpha=9)
    with pytest.raises(ValueError, match="other pictures.*--experts_files"):
        run(world, tmp_path / "out", "--prompt", "a", "--experts", tmp_path / "experts")
    with pytest.raises(ValueError, match="other pictures.*--prompts"):
        run(world, tmp_path / "out", "--prompt", "b", "--experts", tmp_path / "experts")


def test_processes_share_the_work(world, tmp_path):
    flags = ("--prompt", "a", "b", "c", "d", "e", "--batch_size", 1)
    one = run(world, tmp_path / "one", *flags)
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(ROOT / "sample.py")]
    subprocess.run(
        [sys.executable, *argv, *command(world, tmp_path / "two", *flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )
    two = {p.name: p.read_bytes() for p in sorted((tmp_path / "two" / "samples").iterdir())}
    assert two == one and len(one) == 5


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompts_file", "/nowhere.txt"], "there is no such file"),
        (["--prompt", "a", "--experts", "/nowhere"], "there is no folder /nowhere"),
        (["--prompt", "a", "--scheduler", "Nonsense"], "this model takes .*DDIMScheduler"),
    ],
)
def test_wrong_input(world, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_prompts_are_needed_once(world, tmp_path, capsys):
    for flags in ([], ["--prompt", "a", "--prompts_file", "b"], ["--prompt", "a", "--batch_size", "0"]):
        with pytest.raises(SystemExit):
            run(world, tmp_path, *flags)
    assert "--prompt 'a red circle'" in capsys.readouterr().err
