"""train_foster.py on a random pipeline and a dozen pictures: resume, processes, wrong input."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import assert_identical, environment, tiny_sd
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import backbones
import data
import train_foster
import tsm_lora

ROOT = Path(train_foster.__file__).parent


def command(world, out, *flags):
    return [
        *("--pretrained_model_name_or_path", str(world / "model"), "--train_data_dir", str(world / "images")),
        *("--output_dir", str(out), "--num_intervals", "4", "--max_train_steps", "6", "--train_batch_size", "4"),
        *("--rank", "2", "--random_flip", "--proportion_empty_prompts", "0.2", "--num_inference_steps", "2"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--train_text_encoder"),
        *("--report_to", "none", *map(str, flags)),
    ]


def run(world, out, *flags):
    """The script's main, in this process."""
    AcceleratorState._reset_state(True)
    train_foster.main(train_foster.parse_args(command(world, out, *flags)))
    return out / "experts-n4"


@pytest.fixture(scope="session")
def full_run(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("full"))


def tensors(folder, i):
    return load_file(folder / f"interval-{i:03d}.safetensors")


def test_full_run(world, full_run):
    out = full_run.parent
    names = sorted(p.name for p in full_run.glob("*.safetensors"))
    assert names == [f"interval-{i:03d}.safetensors" for i in range(4)]
    table = json.loads((out / "validation.json").read_text())
    assert [r["interval"] for r in table["intervals"]] == [0, 1, 2, 3]
    assert "held out" in table["pictures_from"] and all(r["base"] != r["expert"] for r in table["intervals"])
    assert Image.open(out / "samples.png").size == (256, 256)  # two held-out pictures: base above experts
    settings = json.loads((out / "args.json").read_text())
    assert settings["args"]["rank"] == 2 and settings["versions"]["torch"] == torch.__version__
    with safe_open(full_run / "interval-002.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["tsm"])
    assert facts["steps"] == 6 and facts["timesteps"] == [500, 749]
    assert all(any(v.abs().sum() > 0 for k, v in tensors(full_run, i).items() if "lora_B" in k) for i in range(4))
    pipe = tiny_sd()
    tsm_lora.load_experts(pipe, full_run)


def test_one_expert_alone_is_that_of_the_full_run(world, full_run, tmp_path):
    alone = run(world, tmp_path, "--interval_indices", 3)
    assert_identical(tensors(alone, 3), tensors(full_run, 3))
    assert [p.name for p in alone.glob("*.safetensors")] == ["interval-003.safetensors"]


def test_another_seed_gives_another_expert(world, full_run, tmp_path):
    other = run(world, tmp_path, "--interval_indices", 3, "--seed", 1)
    key = next(k for k in tensors(other, 3) if "lora_B" in k)
    assert not torch.allclose(tensors(other, 3)[key], tensors(full_run, 3)[key])


def test_killed_run_resumes_bit_identically(world, full_run, tmp_path):
    """SIGKILL at a random moment after the first checkpoint, with two data workers, random crops and flips."""
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--dataloader_num_workers", 2)
    argv = [sys.executable, str(ROOT / "train_foster.py"), *command(world, tmp_path, *flags)]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("checkpoints/interval-*/checkpoint-1")):
        time.sleep(0.02)
        assert process.poll() is None
    seed = random.randrange(1000)
    print(f"kill delay from seed {seed}")  # shown by pytest where the test fails
    time.sleep(random.Random(seed).uniform(0, 4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("experts-n4/*.safetensors")}
    resumed = run(world, tmp_path, *flags, "--resume_from_checkpoint", "latest")
    for i in range(4):
        assert_identical(tensors(resumed, i), tensors(full_run, i))
        names = {p.name for p in (tmp_path / "checkpoints" / f"interval-{i:03d}").iterdir()}
        assert names == {"checkpoint-5", "checkpoint-6"}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # finished experts were skipped


def test_resume_from_each_checkpoint(world, full_run, tmp_path):
    run(world, tmp_path, "--interval_indices", 1, "--checkpointing_steps", 2)
    folder = tmp_path / "checkpoints" / "interval-001"
    for name in (folder / "checkpoint-4", "checkpoint-2"):
        again = run(world, tmp_path, "--interval_indices", 1, "--resume_from_checkpoint", name)
        assert_identical(tensors(again, 1), tensors(full_run, 1))


def test_checkpoint_holds_the_trainable_state_only_and_survives_a_kill_in_writing(world, full_run, tmp_path):
    flags = ("--interval_indices", 1, "--checkpointing_steps", 3)
    run(world, tmp_path, *flags)
    folder = tmp_path / "checkpoints" / "interval-001"
    state = torch.load(folder / "checkpoint-3" / "state.pt", weights_only=True)
    assert state["step"] == 3 and all(k.endswith((".A", ".B")) for k in state["experts"])
    assert {p.name for p in (folder / "checkpoint-3").iterdir()} == {"state.pt", "interval-001.safetensors"}
    trainable = sum(v.numel() for v in state["experts"].values())
    moments = [v.numel() for p in state["optimizer"]["state"].values() for v in p.values()]
    assert sum(moments) == 2 * trainable + len(moments) // 3  # and a step counter for each tensor
    tsm_lora.read_facts(folder / "checkpoint-3" / "interval-001.safetensors")  # a checkpoint can be sampled
    # the traces of a kill while checkpoint-6 was being written
    shutil.move(folder / "checkpoint-6", folder / "checkpoint-6.partial")
    (folder / "checkpoint-6.partial" / "state.pt").write_bytes(b"half")
    (tmp_path / "experts-n4" / "interval-001.safetensors").unlink()
    resumed = run(world, tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert_identical(tensors(resumed, 1), tensors(full_run, 1))


def test_two_processes_and_accumulation_equal_one_process(world, full_run, tmp_path):
    two = tmp_path / "two"
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    argv += [str(ROOT / "train_foster.py"), *command(world, two, "--interval_indices", 2, "--train_batch_size", 2)]
    subprocess.run([sys.executable, *argv], env=environment(), check=True, capture_output=True)
    accumulated = run(
        world,
        tmp_path / "accumulated",
        *("--interval_indices", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2),
    )
    one = tensors(full_run, 2)
    for other in (tensors(two / "experts-n4", 2), tensors(accumulated, 2)):
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4)
    table = json.loads((two / "validation.json").read_text())["intervals"][0]
    expected = json.loads((full_run.parent / "validation.json").read_text())["intervals"][2]
    assert table["base"] == pytest.approx(expected["base"], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_expert(world, full_run, tmp_path):
    other = run(world, tmp_path, "--interval_indices", 2, "--gradient_checkpointing")
    for key, value in tensors(full_run, 2).items():
        torch.testing.assert_close(tensors(other, 2)[key], value, atol=1e-5, rtol=1e-4)  # Adam enlarges rounding


def test_half_precision_trains_fp32_experts(world, full_run, tmp_path):
    other = tensors(run(world, tmp_path, "--mixed_precision", "bf16"), 2)
    one = tensors(full_run, 2)
    assert (tmp_path / "samples.png").exists()
    assert all(v.dtype == torch.float32 for v in other.values())
    difference = sum((other[k] - one[k]).norm() ** 2 for k in one) ** 0.5
    assert difference < 0.2 * sum(one[k].norm() ** 2 for k in one) ** 0.5


def test_clipping_clips(world, full_run, tmp_path):
    """With AdamW a constant factor on the gradient does nothing, so look at the gradients' norm itself."""
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        norms.append(sum(p.grad.square().sum() for g in self.param_groups for p in g["params"]).sqrt().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(world, tmp_path, "--interval_indices", 2, "--max_grad_norm", "1e-3")
    assert len(norms) == 6 and max(norms) < 1.01e-3 and min(norms) > 0.9e-3


def test_schedule_counts_optimiser_steps(world, tmp_path):
    rates = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        flags = ("--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--gradient_accumulation_steps", 2)
        run(world, tmp_path, "--interval_indices", 2, *flags, "--learning_rate", "1.0")
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])


def test_draws_stay_in_the_interval_and_use_every_picture(world):
    args = train_foster.parse_args(command(world, "x", "--resolution", "16"))
    rows = data.load_rows(world / "images", args)
    alone = SimpleNamespace(num_processes=1, process_index=0)
    keys = list(data.training_keys(len(rows), args, 2, 0, alone))
    first_epoch = [key[0] for batch in keys for key in batch][: len(rows)]
    assert len(keys) == 6 and sorted(first_epoch) == list(range(22))
    samples = [data.Pictures(rows, args, (4, 8, 8), True)[key] for key in keys[0]]
    assert all(0 <= s["u"] < 1 and s["pixels"].shape == (3, 16, 16) for s in samples)
    assert len({s["u"] for s in samples}) == 4 and not torch.equal(samples[0]["noise"], samples[1]["noise"])


def test_unequal_validation_shares_do_not_hang(world, tmp_path):
    """Three pictures on two processes, in batches of one: a collective in the loop would wait for ever."""
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(ROOT / "train_foster.py")]
    flags = ("--interval_indices", 2, "--max_validation_samples", 3, "--validation_data_dir", world / "images")
    code = "import train_foster as f; f.VALIDATION_BATCH = 1; f.main(f.parse_args())"
    (tmp_path / "small_batches.py").write_text(code)
    argv[-1] = str(tmp_path / "small_batches.py")
    subprocess.run(
        [sys.executable, *argv, *command(world, tmp_path / "out", "--train_batch_size", 2, *flags)],
        env=environment(PYTHONPATH=str(ROOT)),
        check=True,
        capture_output=True,
        timeout=120,
    )
    table = json.loads((tmp_path / "out" / "validation.json").read_text())["intervals"][0]
    assert table["pictures"] == 3 and table["base"] > 0


# -- wrong input


def test_a_failed_start_does_not_block_the_folder(world, tmp_path):
    with pytest.raises(ValueError, match="rank 400 does not fit"):
        run(world, tmp_path, "--interval_indices", 2, "--rank", 400)
    run(world, tmp_path, "--interval_indices", 2)


def test_another_run_in_the_output_folder(world, full_run):
    before = {p: p.stat().st_mtime_ns for p in full_run.parent.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"another run.*--rank.*\(2, 3\)"):
        run(world, full_run.parent, "--rank", 3)
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest to go on"):
        run(world, full_run.parent)
    with pytest.raises(ValueError, match=r"another run.*--max_validation_samples"):  # decides what is held out
        run(world, full_run.parent, "--max_validation_samples", 7, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"another run.*--global_batch.*\(4, 2\)"):
        run(world, full_run.parent, "--train_batch_size", 2, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="this run has"):
        run(world, full_run.parent, "--resume_from_checkpoint", "checkpoint-77")
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_intervals", "0"], "1..1000"),
        (["--num_intervals", "1001"], "1..1000"),
        (["--interval_indices", "4"], "count from 0"),
        (["--interval_indices", "-1"], "count from 0"),
        (["--rank", "17"], "rank 17 does not fit"),
        (["--lora_layers", "to_q,nowhere"], "'nowhere'; its layers end in"),
        (["--caption_column", "caption"], "--caption_column caption: .* has no such column, only"),
        (["--train_data_dir", "/nowhere"], "there is no folder /nowhere"),
        (["--validation_data_dir", "/nowhere"], "there is no folder /nowhere"),
        (["--pretrained_model_name_or_path", "/nowhere"], "neither a folder nor a hub id"),
        (["--max_train_steps", "0"], "must be at least 1"),
        (["--max_validation_samples", "1"], "must be at least 2"),
        (["--max_grad_norm", "0"], "must be at least"),
        (["--proportion_empty_prompts", "2"], "0..1"),
        (["--resolution", "15"], "must be multiples of this model.s 2"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_wrong_flags(world, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path / "out", *flags)
    assert not list(tmp_path.glob("out/experts*"))


def no_picture(folder):
    (folder / "03.png").unlink()
    return r"line 4: there is no file .*03\.png"


def bad_line(folder):
    (folder / "metadata.jsonl").write_text('{"text": "a"}\n')
    return "line 1: need"


def truncated(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    return r"\.png is no picture or is truncated"


def empty(folder):
    for path in folder.iterdir():
        path.unlink()
    return "holds no picture"


def no_captions(folder):
    (folder / "metadata.jsonl").unlink()
    return "--caption_column text: .* has no such column"


def null_caption(folder):
    lines = (folder / "metadata.jsonl").read_text().replace('"thing 2"', "null").replace('"thing 1"', "null")
    (folder / "metadata.jsonl").write_text(lines)
    return "has the caption None"


def one_picture(folder):
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().splitlines()[0])
    for path in sorted(folder.glob("*.png"))[1:]:
        path.unlink()
    return "is too small"


SPOIL = [no_picture, bad_line, truncated, empty, no_captions, null_caption, one_picture]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__)
def test_wrong_data(world, tmp_path, spoil):
    folder = tmp_path / "images"
    shutil.copytree(world / "images", folder)
    with pytest.raises(ValueError, match=spoil(folder)):
        run(world, tmp_path / "out", "--train_data_dir", folder)
    assert not list(tmp_path.glob("out/experts*"))


def test_trackers_get_loss_rate_norm_and_validation(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--interval_indices", 1, 3, "--report_to", "tensorboard", "--validation_steps", 3)
    run(world, tmp_path, *flags)
    scalars = {}
    for folder in {path.parent for path in (tmp_path / "logs").rglob("events*")}:
        events = EventAccumulator(str(folder)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [step for step, _ in scalars["lr"]] == [6, 12]
    assert [step for step, _ in scalars["loss/interval-003"]] == [12]
    assert [step for step, _ in scalars["validation/interval-003"]] == [9, 12]
    table = json.loads((tmp_path / "validation.json").read_text())["intervals"]
    assert scalars["validation/interval-003"][-1][1] == pytest.approx(table[1]["expert"], rel=1e-5)
    assert all(norm > 0 for _, norm in scalars["grad_norm"])


def test_card_and_hub(world, full_run, tmp_path):
    """The card has the interval table; --push_to_hub sends the experts' folder, and the token is written nowhere."""
    card = (full_run / "README.md").read_text()
    assert "| 3 | 750..999 |" in card and "interval 0 is the cleanest" in card
    assert Image.open(full_run.parent / "loss.png").size == (720, 360)
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_foster, "HfApi", Api)
        flags = ("--push_to_hub", "--hub_token", "secret-token", "--hub_model_id", "mine")
        run(world, tmp_path, "--interval_indices", 3, *flags)
    assert calls == ["secret-token", ("me/mine", ["README.md", "interval-003.safetensors"])]
    assert all(b"secret-token" not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_text_encoders_may_have_their_own_rate_and_decay():
    """SD3's settings in the paper's appendix A.1."""
    flags = ["--learning_rate", "1e-5", "--adam_weight_decay", "1e-4", "--train_text_encoder"]
    own = ["--text_encoder_lr", "5e-6", "--adam_weight_decay_text_encoder", "1e-3"]
    experts = tsm_lora.attach_experts(tiny_sd(), 2)
    for more, expected in ((own, (5e-6, 1e-3)), ([], (1e-5, 1e-4))):
        denoiser, encoder = train_foster.make_optimizer(experts, train_foster.parse_args(flags + more)).param_groups
        assert (denoiser["lr"], denoiser["weight_decay"]) == (1e-5, 1e-4)
        assert (encoder["lr"], encoder["weight_decay"]) == expected
        assert len(encoder["params"]) == len(experts.parameters("text_encoder")) > 0


def test_min_snr_weights():
    process = backbones.Diffusion(tiny_sd(), backbones.Weighting(snr_gamma=5.0))
    t = torch.tensor([0, 300, 999])
    ab = process.scheduler.alphas_cumprod[t]
    snr = ab / (1 - ab)
    assert snr[0] > 5 > snr[2]
    expected = torch.stack([5 / snr[0], torch.clamp(5 / snr[1], max=1), torch.tensor(1.0)])
    torch.testing.assert_close(process.loss_weights(t), expected)
    process.scheduler.register_to_config(prediction_type="v_prediction")
    torch.testing.assert_close(process.loss_weights(t)[2], snr[2] / (snr[2] + 1))


def test_8bit_adam_and_min_snr_train(world, full_run, tmp_path):
    other = tensors(run(world, tmp_path, "--interval_indices", 2, "--use_8bit_adam"), 2)
    for key, value in tensors(full_run, 2).items():  # every tensor here is below 4096 elements, which stay fp32
        torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-2)
    weighted = tensors(run(world, tmp_path / "snr", "--interval_indices", 0, "--snr_gamma", 5), 0)
    assert any(not torch.allclose(weighted[k], v) for k, v in tensors(full_run, 0).items())


def test_4bit_base_trains(world, full_run, tmp_path):
    """Against the fp32 base: the same loss to some percent, and an expert that loads on an fp32 base."""
    folder = run(world, tmp_path, "--interval_indices", 2, "--load_in_4bit")
    loss, expected = (
        json.loads((out / "validation" / "interval-002.json").read_text()) for out in (tmp_path, full_run.parent)
    )
    assert loss["base"] == pytest.approx(expected["base"], rel=0.05) and loss["base"] != expected["base"]
    assert tensors(folder, 2).keys() == tensors(full_run, 2).keys()


FROZEN = ("--interval_indices", 2, "--max_train_steps", 4)


def without_text(world, out, *flags):
    """An expert of the denoiser alone."""
    AcceleratorState._reset_state(True)
    argv = [flag for flag in command(world, out, *FROZEN, *flags) if flag != "--train_text_encoder"]
    train_foster.main(train_foster.parse_args(argv))
    return tensors(out / "experts-n4", 2)


def test_cached_text_embeddings_give_the_same_expert(world, tmp_path, monkeypatch):
    """Under shuffling and caption drop, bit for bit, while the text encoder is gone from memory."""
    fresh = without_text(world, tmp_path / "fresh")
    devices, original = [], train_foster.foster

    def foster(pipe, *args):
        devices.append({p.device.type for p in pipe.text_encoder.parameters()})
        return original(pipe, *args)

    monkeypatch.setattr(train_foster, "foster", foster)
    cached = without_text(world, tmp_path / "cached", "--cache_text_embeddings")
    assert_identical(cached, fresh)
    assert devices == [{"meta"}]
    tables = [
        json.loads((tmp_path / out / "validation.json").read_text())["intervals"][0] for out in ("fresh", "cached")
    ]
    assert tables[0]["expert"] == tables[1]["expert"] and tables[0]["base"] == tables[1]["base"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cached" / "text-train").iterdir()}
    assert before and all((p.parent / "done").exists() for p in before)
    with pytest.raises(ValueError, match="frozen text encoders"):
        run(world, tmp_path / "x", "--cache_text_embeddings")


def test_channels_last_and_compile_give_the_same_expert(world, tmp_path, monkeypatch):
    """To rounding. The blocks are compiled for real, but run by eager kernels: no compiler is needed here."""
    fresh, calls = without_text(world, tmp_path / "fresh"), []
    original = torch.nn.Module.compile

    def compile_module(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return original(module, *args, **kwargs | {"backend": "aot_eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    for name, flag in (("layout", "--channels_last"), ("compile", "--compile")):
        other = without_text(world, tmp_path / name, flag)
        for key, value in fresh.items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-3)
    assert calls and set(calls) <= {"BasicTransformerBlock", "ResnetBlock2D", "Transformer2DModel"}


def test_rows_split_again_are_the_same():
    """The mini world's own validation pictures, also where the first call has filled in the training folder."""
    args = train_foster.parse_args([])
    args.video = False
    first, again = (data.split_rows(args)[1:] for _ in range(2))
    assert first[1] == again[1] and "target-validation" in first[1]
    assert list(first[0][args.caption_column]) == list(again[0][args.caption_column])
