"""train_assemble.py on a random pipeline and a dozen pictures."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import assert_identical, environment
from PIL import Image
from safetensors.torch import load_file
from test_train_foster import command as foster_command

import sample
import train_assemble
import train_foster

ROOT = Path(train_assemble.__file__).parent
BEGIN, END = "# >>> the same lines in train_foster.py and train_assemble.py\n", "# <<<\n"


@pytest.fixture(scope="session")
def fostered(world, tmp_path_factory):
    """Folders of experts of the scales 1, 2, 4 and 8, by n."""
    out = tmp_path_factory.mktemp("fostered")
    for n in (1, 2, 4, 8):
        AcceleratorState._reset_state(True)
        flags = ("--num_intervals", n, "--max_train_steps", 2, "--learning_rate", 0.1, "--seed", n)
        train_foster.main(train_foster.parse_args(foster_command(world, out / str(n), *flags)))
    return {n: out / str(n) / f"experts-n{n}" for n in (1, 2, 4, 8)}


def command(world, fostered, out, *flags, core=8, contexts=(1,)):
    experts = ("--core_experts", str(fostered[core]), "--context_experts", *(str(fostered[n]) for n in contexts))
    return [
        *("--pretrained_model_name_or_path", str(world / "model"), "--train_data_dir", str(world / "images")),
        *(() if "--moe_experts" in flags else experts),
        *("--output_dir", str(out), "--max_train_steps", "6", "--train_batch_size", "4", "--learning_rate", "0.05"),
        *("--random_flip", "--proportion_empty_prompts", "0.2", "--num_inference_steps", "2"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
        *("--report_to", "none", *map(str, flags)),
    ]


def run(world, fostered, out, *flags, **scales):
    """The script's main, in this process."""
    AcceleratorState._reset_state(True)
    train_assemble.main(train_assemble.parse_args(command(world, fostered, out, *flags, **scales)))
    return out / "assembled"


def routers(folder):
    return load_file(folder / "router.safetensors")


@pytest.fixture(scope="session")
def full_run(world, fostered, tmp_path_factory):
    return run(world, fostered, tmp_path_factory.mktemp("assembled"))


def test_full_run(world, fostered, full_run):
    """The folder is self-contained, experts and base are as before, tables and pictures are there."""
    out = full_run.parent
    assert {p.name for p in full_run.iterdir()} == {"0-core-n8", "1-context-n1", "router.safetensors", "README.md"}
    for n, name in ((8, "0-core-n8"), (1, "1-context-n1")):
        for path in fostered[n].glob("*.safetensors"):
            assert path.read_bytes() == (full_run / name / path.name).read_bytes()
    assert all(v.abs().sum() > 0 for v in routers(full_run).values())
    table = json.loads((out / "validation.json").read_text())
    assert [r["interval"] for r in table["intervals"]] == list(range(8))
    for record in table["intervals"]:
        assert set(record["loss"]) == {"base", "0-core-n8", "1-context-n1", "assembled"}
        assert len(set(record["loss"].values())) == 4
    assert table["gates"]["E"] > 0 and table["gates"]["W_r x"] > 0
    assert Image.open(out / "samples.png").size == (256, 384)  # base, core, assembled
    assert Image.open(out / "gates.png").size[1] > 100 and Image.open(out / "loss.png").size[1] > 100


def test_training_touches_the_routers_alone(world, fostered, tmp_path, monkeypatch):
    """Every base weight and every expert is bit-identical after training to what it was before."""
    seen = []

    def attach(pipe, args, original=train_assemble.attach):
        experts = original(pipe, args)
        trained = {id(p) for p in experts.router_parameters()}
        parameters = [p for c in experts.components.values() for p in c.parameters()] + list(pipe.vae.parameters())
        seen.extend((p, p.detach().clone(), id(p) in trained) for p in parameters)
        return experts

    monkeypatch.setattr(train_assemble, "attach", attach)
    run(world, fostered, tmp_path)
    assert len(seen) > 100
    for parameter, before, trained in seen:
        assert torch.equal(parameter, before) != trained


CONFIGURATIONS = {
    "core 4, context 8": ({"core": 4, "contexts": (8,)}, ()),
    "core 8, contexts 1, 2, 4": ({"contexts": (1, 2, 4)}, ()),
    "symmetric 1, 8": ({}, ("--symmetric",)),
    "feature": ({}, ("--router_inputs", "feature")),
    "timestep": ({}, ("--router_inputs", "timestep")),
    "bf16": ({}, ("--mixed_precision", "bf16")),
    "contexts 1, 1": ({"contexts": (1, 1)}, ()),
    "MoE LoRA": ({}, ("--moe_experts", 3, "--rank", 2, "--train_text_encoder")),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_train_save_load_and_sample(world, fostered, tmp_path, name):
    scales, flags = CONFIGURATIONS[name]
    folder = run(world, fostered, tmp_path / "run", *flags, "--max_train_steps", 2, **scales)
    AcceleratorState._reset_state(True)
    arguments = [
        "--pretrained_model_name_or_path",
        str(world / "model"),
        "--prompt",
        "a",
        "--num_inference_steps",
        "2",
    ]
    for experts, out in ((["--experts", str(folder)], "a"), ([], "b")):
        sample.main(sample.parse_args([*arguments, *experts, "--output_dir", str(tmp_path / out)]))
    a, b = (next((tmp_path / out / "samples").iterdir()).read_bytes() for out in "ab")
    assert a != b
    n = max(scales.get("core", 8), *scales.get("contexts", (1,)))
    assert len(json.loads((tmp_path / "run" / "validation.json").read_text())["intervals"]) == n


def test_gated_start_is_stage_1_in_the_scripts_own_table(world, fostered, tmp_path):
    """With a learning rate of zero the routers stay at their start: assembled loss = core loss."""
    for flags in ((), ("--symmetric",)):
        out = tmp_path / f"run{len(flags)}"
        run(world, fostered, out, "--learning_rate", 0, "--max_train_steps", 1, *flags)
        for record in json.loads((out / "validation.json").read_text())["intervals"]:
            core = record["loss"]["0-context-n8" if flags else "0-core-n8"]
            assert record["loss"]["assembled"] == pytest.approx(core, rel=1e-6)
            assert record["loss"]["1-context-n1"] != pytest.approx(core, rel=1e-4)


def test_killed_run_resumes_bit_identically(world, fostered, full_run, tmp_path):
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    argv = [sys.executable, str(ROOT / "train_assemble.py"), *command(world, fostered, tmp_path, *flags)]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("checkpoints/checkpoint-1")):
        time.sleep(0.02)
        assert process.poll() is None
    seed = random.randrange(1000)
    print(f"kill delay from seed {seed}")  # shown by pytest where the test fails
    time.sleep(random.Random(seed).uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(world, fostered, tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert_identical(routers(resumed), routers(full_run))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-5", "checkpoint-6"}


def test_resume_from_a_named_checkpoint(world, fostered, full_run, tmp_path):
    run(world, fostered, tmp_path, "--checkpointing_steps", 2)
    written = (tmp_path / "assembled" / "router.safetensors").stat().st_mtime_ns
    state = torch.load(tmp_path / "checkpoints" / "checkpoint-2" / "state.pt", weights_only=True)
    assert all(k.endswith((".W_r", ".E")) for k in state["experts"])  # trainable state only
    again = run(world, fostered, tmp_path, "--resume_from_checkpoint", "checkpoint-2")
    assert_identical(routers(again), routers(full_run))
    assert (again / "router.safetensors").stat().st_mtime_ns > written


def test_two_processes_accumulation_and_checkpointing_equal_one_process(world, fostered, full_run, tmp_path):
    two = tmp_path / "two"
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(ROOT / "train_assemble.py")]
    argv += command(world, fostered, two, "--train_batch_size", 2)
    subprocess.run([sys.executable, *argv], env=environment(), check=True, capture_output=True)
    accumulated = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    others = [two / "assembled", run(world, fostered, tmp_path / "accumulated", *accumulated)]
    others.append(run(world, fostered, tmp_path / "checkpointing", "--gradient_checkpointing"))
    for other in others:
        for key, value in routers(full_run).items():
            torch.testing.assert_close(routers(other)[key], value, atol=1e-5, rtol=1e-3)
    table, expected = (json.loads((p / "validation.json").read_text()) for p in (two, full_run.parent))
    for ours, theirs in zip(table["intervals"], expected["intervals"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_wrong_input(world, fostered, full_run, tmp_path, monkeypatch):
    def refused(message, *flags, **scales):
        with pytest.raises(ValueError, match=message):
            run(world, fostered, tmp_path / "x", *flags, **scales)
        assert not (tmp_path / "x" / "assembled").exists()

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train_foster.py --num_intervals 8` .the core. and `... --num_intervals 1`"):
        train_assemble.parse_args([])  # nothing in the default folders
    refused("there is no folder nowhere", "--core_experts", "nowhere")
    refused("assembled folder", "--core_experts", full_run)
    refused("lacks the experts", "--core_experts", broken(fostered[4], tmp_path / "broken"))
    flags = ("--num_intervals", 1, "--max_train_steps", 1, "--lora_layers", "to_q")
    AcceleratorState._reset_state(True)
    train_foster.main(train_foster.parse_args(foster_command(world, tmp_path / "other", *flags)))
    experts = str(tmp_path / "other" / "experts-n1")
    refused(f"{experts} do not belong together", "--context_experts", experts, "--cache_latents")
    assert not (tmp_path / "x").exists()  # before anything is written or cached
    refused("--top_k must lie in 1..2", "--moe_experts", 2, "--top_k", 3)
    refused("need the timestep", "--symmetric", "--router_inputs", "feature")
    refused("--rank, --top_k has no effect without", "--rank", 7, "--top_k", 1)
    refused("--symmetric has no effect with", "--moe_experts", 2, "--symmetric")
    refused("follows t", "--cache_text_embeddings")
    refused("frozen text encoders", "--moe_experts", 2, "--train_text_encoder", "--cache_text_embeddings")
    (tmp_path / "y" / "assembled").mkdir(parents=True)
    (tmp_path / "y" / "assembled" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not of this script"):
        run(world, fostered, tmp_path / "y")
    assert (tmp_path / "y" / "assembled" / "thesis.txt").exists()
    out = full_run.parent
    with pytest.raises(ValueError, match="lie in .* which this run writes"):
        copied = shutil.copytree(out, tmp_path / "z")
        (copied / "assembled" / "router.safetensors").unlink()
        run(world, fostered, copied, "--core_experts", copied / "assembled" / "0-core-n8")
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        run(world, fostered, out)
    with pytest.raises(ValueError, match="another run.*--learning_rate"):
        run(world, fostered, out, "--learning_rate", 1)
    with pytest.raises(ValueError, match="this run has"):
        run(world, fostered, out, "--resume_from_checkpoint", "checkpoint-77")


def broken(folder, copy):
    shutil.copytree(folder, copy)
    (copy / "interval-002.safetensors").unlink()
    return copy


def test_repeated_blocks_are_equal():
    """Scripts stand alone, so a few blocks repeat: word for word."""
    texts = [(ROOT / name).read_text() for name in ("train_foster.py", "train_assemble.py")]
    blocks = [[block.split(END)[0] for block in text.split(BEGIN)[1:]] for text in texts]
    assert len(blocks[0]) == 3 and blocks[0] == blocks[1]
    assert all(text.count(END) == 3 for text in texts)
    names = [set(re.findall(r"^(?:def|class) (\w+)", "".join(own), re.M)) for own in blocks]
    assert {"sample_losses", "load_pipeline", "new_checkpoint", "make_optimizer", "push_to_hub"} <= names[0]
