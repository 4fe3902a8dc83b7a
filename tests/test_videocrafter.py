"""VideoCrafter2's classes, timestep experts in video UNets, and clips in the scripts."""

import json
import math
import shutil
import subprocess
import sys
import tarfile
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import assert_identical, delta, environment, tiny_video
from diffusers import DiffusionPipeline, UNet3DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_tsm_lora import fill, relative

import backbones
import data
import sample
import train_assemble
import train_foster
from backbones import T, Weighting
from tsm_lora import attach_experts, load_experts
from videocrafter import UNet3DVideoCrafterConditionModel, VideoCrafterDDIMScheduler

ROOT = Path(train_foster.__file__).parent
PROMPTS, FRAMES, STEPS, N = ["a red circle", "b"], 3, 6, 8


def alpha_bars():
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2).cumprod(0)


def scale(t):
    """s_t by VideoCrafter's rule: 400 even steps from 1 to 0.7, then 0.7."""
    return 1 - 0.3 * t / 399 if t < 400 else 0.7


def test_noising_at_every_t():
    pipe, ab = tiny_video(), alpha_bars()
    process = backbones.backbone_of(pipe).process(pipe)
    x0, noise = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 4, 4)
    t = torch.arange(T)
    xt, target = process.diffuse(x0.expand(T, -1, -1, -1, -1), noise.expand(T, -1, -1, -1, -1), t)
    signal = (ab.sqrt() * torch.tensor([scale(k) for k in range(T)], dtype=torch.float64)).view(-1, 1, 1, 1, 1)
    expected = signal * x0 + (1 - ab).sqrt().view(-1, 1, 1, 1, 1) * noise
    torch.testing.assert_close(xt.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(target[5], noise[0])
    weights = backbones.Diffusion(pipe, Weighting(snr_gamma=5.0)).loss_weights(torch.tensor([700]))
    snr = ab[700] * 0.49 / (1 - ab[700])
    assert snr < 5 and weights.item() == pytest.approx(1.0)
    weights = backbones.Diffusion(pipe, Weighting(snr_gamma=5.0)).loss_weights(torch.tensor([100]))
    assert weights.item() == pytest.approx((5 * (1 - ab[100]) / (ab[100] * scale(100) ** 2)).item(), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 50])
def test_sampling_inverts_the_noising(steps, prediction):
    """A model that knows the noise: DDIM stays on x_t of the formula at each of its timesteps and ends at x0. For v
    its knowledge is the training target, so the two must agree on s_t."""
    pipe, ab = tiny_video(), alpha_bars()
    pipe.scheduler.register_to_config(prediction_type=prediction)
    scheduler, process = pipe.scheduler, backbones.backbone_of(pipe).process(pipe)
    scheduler.set_timesteps(steps)
    x0, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    stays = [t.item() for t in scheduler.timesteps] + [0]
    x = (ab[stays[0]] ** 0.5 * scale(stays[0])).float() * x0 + ((1 - ab[stays[0]]) ** 0.5).float() * noise
    for t, before in zip(stays, stays[1:]):
        known = process.diffuse(x0, noise, torch.tensor([t] * 2))[1]
        step = scheduler.step(known, torch.tensor(t), x)
        torch.testing.assert_close(step.pred_original_sample, x0, atol=1e-3, rtol=1e-3)
        x = step.prev_sample
        expected = (ab[before] ** 0.5 * scale(before)).float() * x0 + ((1 - ab[before]) ** 0.5).float() * noise
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_other_schedulers_are_refused():
    assert VideoCrafterDDIMScheduler().compatibles == []


def test_frame_rate_counts():
    pipe = tiny_video()
    x, text = torch.randn(2, 4, FRAMES, 8, 8), torch.randn(2, 12, 16)
    with torch.no_grad():
        default = pipe.unet(x, 10, text).sample
        assert torch.equal(default, pipe.unet(x, 10, text, fps=28).sample)
        assert relative(default, pipe.unet(x, 10, text, fps=8).sample) > 1e-4
        mixed = pipe.unet(x, 10, text, fps=torch.tensor([8, 28])).sample
        torch.testing.assert_close(mixed[1], default[1])
        pipe.unet.fps = 8
        torch.testing.assert_close(mixed[0], pipe.unet(x, 10, text).sample[0])


def test_unet_without_frame_rate_equals_the_stock_one():
    ours = tiny_video().unet
    config = {
        k: v for k, v in ours.config.items() if k not in ("fps", "fps_cond", "num_frames") and not k.startswith("_")
    }
    stock = UNet3DConditionModel(**config).eval()
    ours = UNet3DVideoCrafterConditionModel(**config, fps_cond=False).eval()
    assert ours.load_state_dict(stock.state_dict(), strict=True)
    x, text = torch.randn(2, 4, FRAMES, 8, 8), torch.randn(2, 12, 16)
    assert torch.equal(ours(x, 10, text).sample, stock(x, 10, text).sample)


def test_checkpoint_without_frame_rate_is_refused(tmp_path):
    tiny_video().save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).unet) is UNet3DVideoCrafterConditionModel
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "fps" not in k}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 4 weights, such as fps_embedding"):
        backbones.load_pipeline(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("modelscope", [False, True])
@pytest.mark.parametrize("guidance", [9.0, 1.0])
def test_plain_pipeline_equals_hand_written_loop(tmp_path, modelscope, guidance):
    """In the stock pipeline, which has no step callback; text encoder included."""
    pipe = tiny_video(modelscope=modelscope)
    experts = fill(attach_experts(pipe, N, rank=2, generator=torch.Generator().manual_seed(1)))
    for i in range(N):
        experts.save_expert(i, tmp_path / f"interval-{i:03d}.safetensors")
    experts.unload()
    experts = load_experts(pipe, tmp_path)

    def sample():
        call = {"num_inference_steps": STEPS, "num_frames": FRAMES, "guidance_scale": guidance, "height": 16}
        generator = torch.Generator().manual_seed(3)
        return pipe(
            PROMPTS, negative_prompt=["ugly", ""], width=16, generator=generator, output_type="latent", **call
        )[0]

    ours = sample()
    deltas = [{name: delta(layer, i) for name, layer in experts.layers.items()} for i in range(N)]
    kinds = ("transformer_in", "temp_attentions", "attentions", "text_encoder")
    assert all(any(kind in name for name in deltas[0]) for kind in kinds)
    experts.unload()
    base = sample()
    modules = {f"{c}.{k}": m for c in ("unet", "text_encoder") for k, m in getattr(pipe, c).named_modules()}
    originals = {name: modules[name].weight.clone() for name in deltas[0]}
    pipe.scheduler.set_timesteps(STEPS)
    x, used = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(3)), set()
    for t in pipe.scheduler.timesteps:
        i = math.floor(t) * N // T
        used.add(i)
        for name, addition in deltas[i].items():
            modules[name].weight.data = originals[name] + addition
        positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["ugly", ""])
        pred = pipe.unet(x, t, positive).sample
        if guidance > 1:
            uncond = pipe.unet(x, t, negative).sample
            pred = uncond + guidance * (pred - uncond)
        x = pipe.scheduler.step(pred, t, x).prev_sample
    assert len(used) > 2 and relative(ours, x) < 1e-5 < 0.01 < relative(base, x)


@torch.no_grad()
@pytest.mark.parametrize("modelscope", [False, True])
def test_mixed_batch_equals_single_samples(modelscope):
    """Rows of B * F in spatial attention and of B * H * W in temporal attention, each with the expert of its t."""
    pipe = tiny_video(modelscope=modelscope)
    experts = fill(attach_experts(pipe, 4))
    x, t, prompts = torch.randn(3, 4, FRAMES, 8, 8), torch.tensor([10, 990, 300]), ["a", "bc", ""]
    together = experts.predict(x, t, prompts)
    for k in range(3):
        alone = experts.predict(x[k : k + 1], t[k : k + 1], prompts[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients():
    grads, saved = [], []
    for checkpointing in (False, True):
        pipe = tiny_video()
        experts = fill(attach_experts(pipe, 4, generator=torch.Generator().manual_seed(0)))
        if checkpointing:
            experts.enable_gradient_checkpointing()
        x = torch.randn(3, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(5))
        saved.append(0)

        def keep(tensor):
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = experts.predict(x, torch.tensor([20, 400, 900]), ["a", "bc", "def"]).square().mean()
        loss.backward()
        grads.append([p.grad for p in experts.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-4) for a, b in zip(*grads)) and grads[0][1].abs().sum() > 0
    assert saved[1] < saved[0] / 2
    with pytest.raises(ValueError, match="UNet3DConditionModel cannot checkpoint"):
        attach_experts(tiny_video(modelscope=True), 4).enable_gradient_checkpointing()


def test_adapted_layers_of_the_real_model():
    """k and v of two attentions in each of 16 spatial and 16 temporal transformers and in transformer_in: 132."""
    pipe = tiny_video()
    with torch.device("meta"):
        pipe.unet = UNet3DVideoCrafterConditionModel()
    experts = attach_experts(pipe, 1, train_text_encoder=False)
    assert len(experts.layers) == 132
    assert {name.split(".")[1] for name in experts.layers} == {
        "transformer_in",
        "down_blocks",
        "mid_block",
        "up_blocks",
    }


# -- clips in the scripts


def write_clips(folder, sizes=((24, 20), (16, 16), (30, 18), (20, 20), (16, 16), (18, 18)), frames=9):
    """Clips whose frame k has the grey level 20 k, and their metadata."""
    folder.mkdir(parents=True)
    lines = []
    for k, size in enumerate(sizes):
        images = [Image.new("RGB", size, (20 * f, 20 * f, 20 * f)) for f in range(frames)]
        data.write_clip(images, folder / f"{k}.mp4", 8)
        lines.append(json.dumps({"file_name": f"{k}.mp4", "text": f"clip {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    tiny_video().save_pretrained(root / "model")
    write_clips(root / "clips")
    return root


def settings(folder, *flags):
    args = train_foster.parse_args(["--train_data_dir", str(folder), "--resolution", "16", *map(str, flags)])
    args.video = True
    return args


def test_a_written_clip_reads_back(tmp_path):
    frames = [Image.effect_noise((32, 32), 60).convert("RGB") for _ in range(3)]
    data.write_clip(frames, tmp_path / "a.mp4", 7.5)
    for ours, frame in zip(data.read_clip(tmp_path / "a.mp4"), frames, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(frame, int)).max() <= 2


@pytest.mark.parametrize("flags, expected", [((), [0, 1, 2, 3]), (("--frame_stride", 2), [0, 2, 4, 6])])
def test_frames_of_a_clip(clips, flags, expected):
    args = settings(clips / "clips", "--max_num_frames", 4, *flags)
    rows = data.load_rows(clips / "clips", args)
    for start, first in ((0.0, 0), (0.9999, 9 - 1 - expected[-1])):
        levels = [image.getpixel((3, 3))[0] / 20 for image in data.open_clip(rows[0]["video"], "x", args, start)]
        assert levels == pytest.approx([first + k for k in expected], abs=0.1)
    args.fps = 4  # of 8: every second frame
    levels = [image.getpixel((3, 3))[0] / 20 for image in data.open_clip(rows[0]["video"], "x", args, 0.0)]
    assert levels == pytest.approx([0, 2, 4, 6], abs=0.1)


def test_clips_become_latents(clips):
    """One crop for all frames, frames in their order, and cached moments equal to fresh ones."""
    pipe, args = tiny_video(), settings(clips / "clips", "--max_num_frames", 4, "--center_crop", "--random_flip")
    rows = data.load_rows(clips / "clips", args)
    assert data.latent_shape(pipe, args) == (4, 4, 8, 8)
    pixels = data.Pictures(rows, args, (4, 4, 8, 8), augment=True)[(0, 0, "key")]["pixels"]
    assert pixels.shape == (4, 3, 16, 16)
    levels = (pixels.mean((1, 2, 3)) + 1) * 127.5 / 20
    assert levels.diff().tolist() == pytest.approx([1, 1, 1], abs=0.1)
    moments = data.encode(pipe.vae, torch.stack([pixels, pixels.flip(0)]))
    assert moments.shape == (2, 2, 4, 4, 8, 8)
    for f in range(4):
        alone = data.encode(pipe.vae, pixels[f : f + 1])[0]  # (2, c, h, w)
        torch.testing.assert_close(moments[0, :, :, f], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moments[1, :, :, 3 - f], alone, atol=1e-5, rtol=1e-5)
    args.height, args.width = 8, 16
    assert data.Pictures(rows, args, (4, 4, 4, 8), augment=True)[(0, 0, "key")]["pixels"].shape == (4, 3, 8, 16)


def test_table_of_clips_as_openvid(clips, tmp_path):
    write_clips(tmp_path / "clips")
    (tmp_path / "clips" / "metadata.jsonl").unlink()
    table = 'video,caption,aesthetic score,fps\n0.mp4,a thing,5.1,8\n3.mp4,"b, with a comma",4.9,8\n'
    (tmp_path / "clips" / "OpenVid.csv").write_text(table)
    args = settings(tmp_path / "clips", "--max_num_frames", 4, "--caption_column", "caption")
    rows = data.load_rows(tmp_path / "clips", args)
    assert rows["caption"] == ["a thing", "b, with a comma"]
    assert data.Pictures(rows, args, (4, 4, 8, 8), augment=False)[(1, "key")]["pixels"].shape == (4, 3, 16, 16)
    stream = data.load_rows(tmp_path / "clips", args, streaming=True)
    assert [row["caption"] for row in stream] == rows["caption"]
    (tmp_path / "clips" / "3.mp4").unlink()
    with pytest.raises(ValueError, match="row 1 of the table .* there is no clip .*3.mp4"):
        data.load_rows(tmp_path / "clips", args)


def test_shards_of_clips_stream(clips, tmp_path):
    """Every clip with its caption, and the position after two batches leads on to the third."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for k in range(3 * shard, 3 * shard + 3):
                (tmp_path / "caption.txt").write_text(f"clip {k}")
                tar.add(clips / "clips" / f"{k}.mp4", f"{k}.mp4")
                tar.add(tmp_path / "caption.txt", f"{k}.txt")
    columns = ("--video_column", "mp4", "--caption_column", "txt", "--streaming", "--train_batch_size", 2)
    args = settings(tmp_path, "--max_num_frames", 4, *columns)
    rows = data.load_rows(tmp_path, args, streaming=True)
    pictures = data.Pictures(rows, args, (4, 4, 8, 8), augment=True)
    one = SimpleNamespace(process_index=0, num_processes=1)
    batches = list(islice(data.training_loader(pictures, args, 0, 0, one, None), 3))
    assert sorted(c for b in batches for c in b["caption"]) == [f"clip {k}" for k in range(6)]
    assert batches[0]["pixels"].shape == (2, 4, 3, 16, 16)
    resumed = next(iter(data.training_loader(pictures, args, 0, 2, one, batches[1]["position"])))
    assert resumed["caption"] == batches[2]["caption"] and torch.equal(resumed["pixels"], batches[2]["pixels"])


def test_wrong_clips(clips, tmp_path):
    args = settings(clips / "clips", "--max_num_frames", 12)
    rows = data.load_rows(clips / "clips", args)
    with pytest.raises(ValueError, match="0.mp4 has 9 frames, 12 are needed"):
        data.Pictures(rows, args, (4, 12, 8, 8), augment=True)[(0, "key")]
    folder = write_clips(tmp_path / "broken")
    (folder / "2.mp4").write_bytes((folder / "2.mp4").read_bytes()[:300])
    args = settings(folder, "--max_num_frames", 4)
    rows = data.load_rows(folder, args)
    with pytest.raises(ValueError, match="2.mp4 is no clip or is truncated"):
        data.Pictures(rows, args, (4, 4, 8, 8), augment=True)[(2, "key")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no clip"):
        data.load_rows(tmp_path / "empty", args)
    args.caption_column = "prompt"
    with pytest.raises(ValueError, match="--caption_column prompt"):
        data.load_rows(folder, args)


def test_scripts_take_video(clips, tmp_path):
    """Foster with experts on the text encoder, a resumed expert, assemble, sample clips by experts of either kind."""
    model = ["--pretrained_model_name_or_path", clips / "model", "--resolution", 16, "--num_inference_steps", 2]
    train = [
        "--train_data_dir",
        clips / "clips",
        "--max_num_frames",
        4,
        "--report_to",
        "none",
        "--train_batch_size",
        2,
    ]
    train += ["--max_validation_samples", 2, "--learning_rate", 0.05, "--gradient_checkpointing", "--fps", 8]

    def run(script, *flags):
        AcceleratorState._reset_state(True)
        script.main(script.parse_args([str(flag) for flag in (*model, *flags)]))

    folders = {n: tmp_path / f"n{n}" / f"experts-n{n}" for n in (1, 2)}
    for n, folder in folders.items():
        steps = ["--num_intervals", n, "--train_text_encoder", "--max_train_steps", 4, "--checkpointing_steps", 2]
        run(train_foster, *train, *steps, "--output_dir", folder.parent)
    table = json.loads((tmp_path / "n2" / "validation.json").read_text())["intervals"]
    assert len(table) == 2 and all(record["gain"] != 0 for record in table)
    whole = load_file(folders[2] / "interval-001.safetensors")
    assert {key.split(".")[0] for key in whole} == {"unet", "text_encoder"}
    (folders[2] / "interval-001.safetensors").unlink()
    shutil.rmtree(tmp_path / "n2" / "checkpoints" / "interval-001" / "checkpoint-4")
    resume = ["--resume_from_checkpoint", "latest", "--num_intervals", 2, "--train_text_encoder"]
    resume += ["--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir", tmp_path / "n2"]
    run(train_foster, *train, *resume)
    assert_identical(load_file(folders[2] / "interval-001.safetensors"), whole)
    scales = ["--core_experts", folders[2], "--context_experts", folders[1], "--max_train_steps", 2]
    run(train_assemble, *train, *scales, "--output_dir", tmp_path / "both")
    strip = Image.open(tmp_path / "both" / "samples.png")
    assert strip.width % 4 == 0 and strip.height == 3 * 128
    seen = {}
    for name, experts in (("base", None), ("stage 1", folders[2]), ("stage 2", tmp_path / "both" / "assembled")):
        flags = ["--experts", experts] if experts else []
        run(sample, *flags, "--prompt", "a", "b", "--num_frames", 4, "--output_dir", tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name / "samples").iterdir()) == ["0000.mp4", "0001.mp4"]
        seen[name] = np.stack([np.asarray(f) for f in data.read_clip(tmp_path / name / "samples" / "0000.mp4")])
        assert seen[name].shape == (4, 16, 16, 3) and (tmp_path / name / "grid.png").exists()
    assert all((seen[a] != seen[b]).any() for a, b in combinations(seen, 2))


def test_two_processes_equal_one(clips, tmp_path):
    flags = ["--pretrained_model_name_or_path", clips / "model", "--train_data_dir", clips / "clips", "--fps", 8]
    flags += ["--resolution", 16, "--max_num_frames", 4, "--num_intervals", 2, "--interval_indices", 1]
    flags += ["--max_train_steps", 3, "--max_validation_samples", 2, "--num_inference_steps", 2, "--report_to", "none"]
    AcceleratorState._reset_state(True)
    train_foster.main(
        train_foster.parse_args([*map(str, flags), "--train_batch_size", "4", "--output_dir", str(tmp_path / "one")])
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    line += [ROOT / "train_foster.py", *flags, "--train_batch_size", 2, "--output_dir", tmp_path / "two"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "experts-n2" / "interval-001.safetensors") for name in ("one", "two"))
    assert any(value.abs().max() > 0.01 for key, value in one.items() if "lora_B" in key)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)


def test_a_new_process_loads_the_joined_model(clips, tmp_path):
    """The README's join command, then sampling, by processes that know only what the scripts import."""
    for command in (
        ["videocrafter.py", "--unet", clips / "model" / "unet", "--components", clips / "model", "--fps", 12],
        ["sample.py", "--pretrained_model_name_or_path", tmp_path / "joined", "--prompt", "a", "--num_frames", 2],
    ):
        out = tmp_path / ("joined" if command[0] == "videocrafter.py" else "pictures")
        more = [] if command[0] == "videocrafter.py" else ["--num_inference_steps", 2, "--eta", 1, "--batch_size", 1]
        line = [sys.executable, *map(str, [*command, *more, "--output_dir", out])]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    assert DiffusionPipeline.from_pretrained(tmp_path / "joined").unet.fps == 12
    assert len(data.read_clip(tmp_path / "pictures" / "samples" / "0000.mp4")) == 2


def test_noise_of_ddim_follows_the_seed():
    pipe = tiny_video()

    def sample(seed):
        call = {"num_inference_steps": 3, "num_frames": 2, "height": 16, "width": 16, "eta": 1.0}
        return pipe("a", generator=torch.Generator().manual_seed(seed), output_type="latent", **call)[0]

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_experts_remember_their_frame_rate(tmp_path):
    pipe = tiny_video()
    pipe.unet.fps = 8
    experts = attach_experts(pipe, 1, rank=1)
    experts.save_expert(0, tmp_path / "interval-000.safetensors")
    other = tiny_video()
    experts = load_experts(other, tmp_path)
    assert other.unet.fps == 8
    experts.unload()
    assert other.unet.fps == 28


def test_sideways_frames_are_turned():
    """-90 is a quarter clockwise: what was left is on top."""
    picture = Image.new("RGB", (8, 4), "black")
    picture.paste("red", (0, 0, 2, 4))
    turned = data.upright(SimpleNamespace(rotation=-90, to_image=lambda: picture))
    assert turned.size == (4, 8) and turned.getpixel((2, 0)) == (255, 0, 0) != turned.getpixel((2, 7))
    assert data.upright(SimpleNamespace(rotation=0, to_image=lambda: picture)) is picture


def test_frame_rates_that_do_not_fit(clips):
    args = settings(clips / "clips", "--max_num_frames", 4, "--fps", 9)
    row = data.load_rows(clips / "clips", args)[0]
    with pytest.raises(ValueError, match="has 8 frames per second, fewer than --fps 9"):
        data.open_clip(row["video"], "x", args, 0.0)
    for wrong in (["--fps", "0"], ["--fps", "4", "--frame_stride", "2"]):
        with pytest.raises(ValueError, match="instead of --frame_stride"):
            train_foster.parse_args(wrong)


def test_clip_that_states_more_frames_than_it_shows(clips, monkeypatch):
    """As an edit list leaves it: the frames that there are serve, at any start."""
    args = settings(clips / "clips", "--max_num_frames", 4)
    row, original = data.load_rows(clips / "clips", args)[0], av.open

    class Short:
        def __init__(self, container):
            self.container, self.streams, self.seek = container, container.streams, container.seek

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def decode(self, stream):
            return islice(self.container.decode(stream), 6)

    monkeypatch.setattr(data.av, "open", lambda path: Short(original(path)))
    levels = [image.getpixel((3, 3))[0] / 20 for image in data.open_clip(row["video"], "x", args, 0.99)]
    assert levels == pytest.approx([2, 3, 4, 5], abs=0.1)
