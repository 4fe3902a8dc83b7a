"""distill_dmd2.py: closed forms of its losses, who is trained by what, the rollout, files, resume, processes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import assert_identical, environment, tiny_pixart, tiny_sd
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_assemble import SD15_UNET
from torch import nn

import distill_dmd2 as dmd2
import sample
import tsm_lora
from benchmarks import compare_dmd2, dmd2_memory

ROOT = Path(dmd2.__file__).parent
STEPS = [999, 749, 499, 249]


def parse(*flags):
    return dmd2.parse_args(["--report_to", "none", "--rank", "2", "--lora_alpha", "1", *map(str, flags)])


def command(world, out, *flags):
    return [
        *("--pretrained_model_name_or_path", str(world / "model"), "--train_data_dir", str(world / "images")),
        *("--output_dir", str(out), "--steps_without_gan", "5", "--steps_with_gan", "4", "--update_ratio", "2"),
        *("--train_batch_size", "4", "--gan_train_batch_size", "2", "--rank", "2", "--lora_alpha", "1"),
        *("--num_inference_steps", "2", "--lr_warmup_steps", "2", "--learning_rate", "0.01", "--report_to", "none"),
        *map(str, flags),
    ]


def run(world, out, *flags):
    """The script's main, in this process."""
    AcceleratorState._reset_state(True)
    dmd2.main(dmd2.parse_args(command(world, out, *flags)))
    return out


@pytest.fixture(scope="session")
def experts_run(world, tmp_path_factory):
    """Four experts, each with a phase without and a phase with GAN."""
    return run(world, tmp_path_factory.mktemp("n4"), "--save_guidance")


@pytest.fixture(scope="session")
def lora_run(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("n1"), "--num_intervals", 1, "--save_guidance")


def tensors(run, i, n=4):
    return load_file(run / f"experts-n{n}" / f"interval-{i:03d}.safetensors")


def make(*flags, interval=3, gan=True, pipe=None, seed=0):
    """Players on a random pipeline, a batch for them, and a function that runs one iteration."""
    AcceleratorState._reset_state(True)
    args = parse("--resolution", 16, "--steps_without_gan", 10, "--steps_with_gan", 10, *flags)
    accelerator, pipe = Accelerator(cpu=True, mixed_precision=args.mixed_precision), pipe or tiny_sd()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    players = dmd2.make_players(pipe, args, interval, accelerator)
    dmd2.begin_phase(pipe, players, args, interval, gan, 10)
    shape, g = (4, 8, 8), torch.Generator().manual_seed(seed)
    dataset = dmd2.Prompts(["a", "b", "c"], shape, len(args.student_timesteps))
    batch = torch.utils.data.default_collate([dataset[k, seed, k] for k in range(3)])
    backbone = dmd2.backbones.backbone_of(pipe)
    with torch.no_grad():
        batch["c"] = backbone.conditions(backbone.encode(pipe, batch["caption"]))
        batch["real_c"] = backbone.conditions(backbone.encode(pipe, ["x", "y", "z"]))
    batch["real_x0"] = torch.randn(3, *shape, generator=g)

    def iterate(k, student_turn):
        return dmd2.iterate(players, batch, k, student_turn, gan, args, accelerator)

    return players, batch, iterate


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# -- intervals, schedule


def test_every_student_timestep_has_its_expert():
    """{999, 749, 499, 249} <-> {3, 2, 1, 0}: the last timestep of each interval; of LCM's own four, none so."""
    bounds = tsm_lora.interval_bounds(4)
    assert [int(tsm_lora.interval_index(t, bounds)) for t in range(1000)] == [t // 250 for t in range(1000)]
    args = parse()
    assert [dmd2.own_steps(args, i) for i in (3, 2, 1, 0)] == [[0], [1], [2], [3]]
    assert dmd2.own_steps(parse("--num_intervals", 1), 0) == [0, 1, 2, 3]
    assert [dmd2.own_steps(parse("--num_intervals", 2), i) for i in (1, 0)] == [[0, 1], [2, 3]]
    lcm = LCMScheduler(num_train_timesteps=1000)
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == [999, 759, 499, 259]
    assert tsm_lora.interval_index(lcm.timesteps, bounds).tolist() == [3, 3, 1, 1]


@pytest.fixture(scope="module")
def schedule():
    return dmd2.Schedule(tiny_sd())


def test_conversion_at_999_is_in_full_precision(schedule):
    """A prediction in fp32 gives x0 back within 1e-3 at each step; one rounded to bf16 does not at 999."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    assert schedule.alpha_bar[999].item() == pytest.approx(0.004660, abs=1e-6)
    for t in STEPS:
        t = torch.tensor(t)
        xt = schedule.add_noise(x0, noise, t)
        assert xt.dtype == torch.float32
        assert (schedule.x0(xt, noise, t) - x0).abs().max() < 1e-3
    t = torch.tensor(999)
    assert (schedule.x0(xt := schedule.add_noise(x0, noise, t), noise.bfloat16(), t) - x0).abs().max() > 1e-3
    each = schedule.add_noise(x0, noise, torch.tensor(STEPS))  # one t per sample
    assert torch.equal(each[0], xt[0]) and not torch.equal(each[1], xt[1])


def test_bf16_keeps_the_last_layer_in_fp32(world):
    """The networks of a bf16 run, copies included, predict in fp32 precision of their last layer."""
    AcceleratorState._reset_state(True)
    args = parse("--pretrained_model_name_or_path", world / "model", "--mixed_precision", "bf16")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    pipe = dmd2.load_pipeline(args, accelerator)
    players, batch, iterate = make("--mixed_precision", "bf16", pipe=pipe)
    xt, t = batch["matching"]["noise"], torch.tensor(999)
    for name in ("student", "teacher", "fake"):
        network = players.guidance.fake if name == "fake" else getattr(players, name)
        with accelerator.autocast(), torch.no_grad():
            eps = network(xt, t, batch["c"])
        assert eps.dtype == torch.float32 and not torch.equal(eps, eps.bfloat16().float()), name
    own = players.guidance.fake.network
    assert own.conv_out.forward.args[0] is own.conv_out  # not that of the network it is a copy of
    assert all(torch.isfinite(v) for v in iterate(0, True).values())
    players.experts.unload()
    players, _, iterate = make("--mixed_precision", "bf16", "--lora_layers", "to_q,conv_out", pipe=pipe)
    assert "conv_out" in " ".join(players.experts.layers)
    assert all(torch.isfinite(v) for v in iterate(0, True).values())


# -- losses


def gaussian(mean, std, schedule):
    """eps of the noised N(mean, std^2): sigma (x_t - s mean) / (s^2 std^2 + sigma^2)."""

    def eps(xt, t, c):
        signal, sigma = schedule.factors(t, xt)
        return (sigma * (xt - signal * mean) / (signal**2 * std**2 + sigma**2)).float()

    return eps


@pytest.fixture
def matching(schedule):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 4, 8, 8, generator=g)
    t = torch.tensor([20, 100, 400, 700, 980])
    c, empty = {"c": torch.linspace(-1, 1, 5).view(5, 1, 1, 1)}, {"c": torch.full((1, 1, 1, 1), 0.3)}

    def teacher(xt, t, c):
        return 0.5 * xt + c["c"] * xt.cos()

    return SimpleNamespace(x=x, noise=noise, t=t, c=c, empty=empty, teacher=teacher, schedule=schedule)


def gradient(m, fake, scale, **changes):
    x = changes.get("x", m.x)
    return dmd2.matching_gradient(x, m.c, m.empty, m.teacher, fake, m.schedule, m.t, m.noise, scale)


def test_fake_equal_to_teacher_gives_no_gradient(matching):
    assert not gradient(matching, matching.teacher, 1.0).any()
    assert gradient(matching, matching.teacher, 2.0).any()


def test_at_the_teacher_the_gradient_is_guidance_alone(matching):
    """g = (sigma / sqrt(abar)) (w - 1) (e_c - e_u) / mean|x - x_real|, by hand."""
    m, w = matching, 2.5
    signal, sigma = (f.squeeze() for f in m.schedule.factors(m.t, m.x))
    g = gradient(m, m.teacher, w)
    for b in range(5):
        xt = (signal[b] * m.x[b] + sigma[b] * m.noise[b]).float()
        e_c, e_u = 0.5 * xt + m.c["c"][b] * xt.cos(), 0.5 * xt + 0.3 * xt.cos()
        x_real = (xt - sigma[b] * (e_u + w * (e_c - e_u))) / signal[b]
        expected = sigma[b] / signal[b] * (w - 1) * (e_c - e_u) / (m.x[b] - x_real).abs().mean()
        torch.testing.assert_close(g[b], expected.double(), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_loss_is_g(matching):
    """dL/dx = g / x.numel() and L = mean(g^2) / 2; nothing flows into teacher and fake."""
    m = matching
    x, scale = m.x.clone().requires_grad_(), torch.ones(1, requires_grad=True)

    def fake(xt, t, c):
        return 0.2 * scale * xt

    loss = dmd2.matching_loss(x, m.c, m.empty, m.teacher, fake, m.schedule, m.t, m.noise, 1.75)
    loss.backward()
    g = gradient(m, lambda xt, t, c: 0.2 * xt, 1.75)
    torch.testing.assert_close(x.grad.double(), g / x.numel(), rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-6) and scale.grad is None


def test_normaliser_is_per_sample(matching):
    def fake(xt, t, c):
        return 0.2 * xt

    x = matching.x.clone()
    x[2] *= 7
    before, after = gradient(matching, fake, 1.75), gradient(matching, fake, 1.75, x=x)
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    assert same == [True, True, False, True, True]


def test_normaliser_has_a_floor(matching):
    """x = x_real: 0 / 0 and 1 / 0 in DMD2; here 0 and finite. Networks stand for their x0."""
    m, given = matching, SimpleNamespace(add_noise=lambda x, noise, t: x, x0=lambda xt, eps, t: eps.double())
    m.schedule, m.teacher = given, lambda xt, t, c: m.x
    assert not gradient(m, m.teacher, 1.0).any()
    g = gradient(m, lambda xt, t, c: m.x + 1, 1.0)
    torch.testing.assert_close(g, torch.full_like(g, 1 / dmd2.NORMALISER_FLOOR), rtol=1e-5, atol=0)


def test_denoising_loss_is_plain_mse_on_the_detached_x(matching):
    m, x = matching, matching.x.clone().requires_grad_()
    weight = torch.tensor(0.4, requires_grad=True)
    loss = dmd2.denoising_loss(x, m.c, lambda xt, t, c: weight * xt, m.schedule, m.t, m.noise)
    loss.backward()
    xt = m.schedule.add_noise(m.x, m.noise, m.t)
    assert loss.item() == pytest.approx(((0.4 * xt - m.noise) ** 2).mean().item(), rel=1e-5)
    assert x.grad is None and weight.grad.item() == pytest.approx(
        (2 * (0.4 * xt - m.noise) * xt).mean().item(), rel=1e-4
    )


def test_gan_losses_at_zero_and_their_signs():
    zero, up = torch.zeros(3), torch.full((3,), 0.5)
    assert dmd2.generator_gan_loss(zero).item() == pytest.approx(math.log(2))
    assert dmd2.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert dmd2.generator_gan_loss(up) < dmd2.generator_gan_loss(zero)
    assert dmd2.discriminator_loss(up, zero) > dmd2.discriminator_loss(zero, zero) > dmd2.discriminator_loss(zero, up)


# -- the two players


@pytest.mark.parametrize("low_memory", [False, True])
def test_who_is_trained(low_memory):
    """A student's turn moves the expert's A and B and fake score and head; any other the latter two alone. Teacher,
    base, encoders and earlier experts stay, and no gradient is left anywhere."""
    flags = ["--low_memory"] if low_memory else []
    players, _, iterate = make(*flags)
    assert players.teacher.network is not players.student.network or low_memory
    student, teacher, guidance = players.student, players.teacher, players.guidance
    pipe = players.experts.pipe
    modules = {"student": student, "teacher": teacher, "guidance": guidance}
    before = {name: snapshot(module) for name, module in modules.items()}
    before["vae"], before["text"] = snapshot(pipe.vae), snapshot(pipe.text_encoder)
    iterate(0, False)
    experts = {name for name in before["student"] if ".tsm." in name}
    assert len(experts) > 50 and not {name for name in changed(student, before["student"]) & experts}
    moved = changed(guidance, before["guidance"])
    own = "fake.lora." if low_memory else "fake."
    assert moved == {name for name in before["guidance"] if name.startswith((own, "head."))}
    before["student"] = snapshot(student)
    iterate(0, True)
    assert changed(student, before["student"]) >= {n for n in experts if n.endswith(".B")}
    for _ in range(2):  # now B is not zero, and A learns
        iterate(0, True)
    network = {n for n in before["student"] if n not in experts}
    assert changed(student, before["student"]) == experts and len(network) > 50
    for module, name in ((teacher, "teacher"), (pipe.vae, "vae"), (pipe.text_encoder, "text")):
        rest = changed(module, before[name])
        assert not {n for n in rest if ".tsm." not in n}, name
    everything = [
        p for module in (student, teacher, guidance, pipe.vae, pipe.text_encoder) for p in module.parameters()
    ]
    assert all(p.grad is None for p in everything)
    optimised = {id(p) for u in (players.student_updates, players.guidance_updates) for p in u.parameters}
    assert not optimised & {id(p) for name, p in teacher.named_parameters() if ".tsm." not in name}


def test_guidance_learns_the_same_on_a_students_turn():
    """Its x was drawn before the student's update, and the student's loss leaves no gradient in fake score or head."""
    states = []
    for student_turn in (False, True):
        players, _, iterate = make()
        iterate(0, student_turn)
        states.append(snapshot(players.guidance))
    assert_identical(*states)


def test_earlier_experts_stay_bit_identical(experts_run, tmp_path):
    """With weight decay and without: of the stacked A and B only the own rows move."""
    players, _, iterate = make("--output_dir", experts_run, interval=1)
    layers = players.experts.layers.values()
    before = [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]
    for _ in range(3):
        iterate(2, True)
    for layer, (A, B) in zip(layers, before):
        assert layer.routing.banks[0].indices == (1, 2, 3) and len(layer.A) == 6
        assert torch.equal(layer.A[2:], A[2:]) and torch.equal(layer.B[2:], B[2:])
        assert not torch.equal(layer.A[:2], A[:2]) and not torch.equal(layer.B[:2], B[:2])
    saved = tensors(experts_run, 3)  # what the third slot holds is the finished expert
    name, layer = next(iter(players.experts.layers.items()))
    torch.testing.assert_close(layer.expert(2)[1].t() * layer.scaling, saved[f"{name}.lora_B.weight"].flatten(1))


def test_discriminator_reaches_the_first_half_of_the_fake_score():
    players, batch, _ = make()
    guidance, t = players.guidance, torch.tensor([1, 500, 999])
    logits = [guidance.logit(x, t, batch["c"]) for x in (batch["real_x0"], batch["matching"]["noise"])]
    assert logits[0].shape == (3,)
    dmd2.discriminator_loss(*logits).backward()
    reached = {name.split(".")[0] for name, p in guidance.fake.network.named_parameters() if p.grad is not None}
    assert reached == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert all(p.grad is not None for p in guidance.head.parameters())
    assert not guidance.fake.network.mid_block._forward_hooks


def test_first_update_is_none_where_fake_is_teacher_and_guidance_1():
    players, _, iterate = make("--real_guidance_scale", 1, "--adam_weight_decay", 0, gan=False)
    before = snapshot(players.student)
    assert iterate(0, True)["distribution matching"] == 0
    assert not changed(players.student, before)
    assert iterate(0, True)["distribution matching"] > 0  # by now the fake score has moved
    assert changed(players.student, before)


def test_noise_levels_of_each_loss():
    """Distribution matching 20..980, fake score and GAN 0..999, over many draws."""
    players, _, _ = make()
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    seen = {}

    def record(u_, low, high, draw=players.draw_t):
        seen.setdefault((low, high), draw(u, low, high))
        return draw(u_, low, high)

    players.draw_t = record
    args = parse("--resolution", 16)
    _, batch, _ = make()
    dmd2.iterate(players, batch, 0, True, True, args, Accelerator(cpu=True))
    assert {(int(t.min()), int(t.max())) for t in seen.values()} == {(20, 980), (0, 999)}


def test_what_each_loss_gets(monkeypatch):
    """Each its own t, in its own range, its own noise, its own condition and its own weight."""
    flags = ("--real_guidance_scale", 2.5, "--dm_loss_weight", 0.5, "--gan_loss_weight", 0.25)
    players, batch, iterate = make(*flags, "--discriminator_loss_weight", 0.125, "--gan_max_timestep", 500)
    guidance, seen, logits, steps = players.guidance, {}, [], []

    def watch(owner, name, note):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: note(*args) or original(*args))

    watch(dmd2, "matching_loss", lambda *args: seen.update(matching=args))
    watch(dmd2, "denoising_loss", lambda *args: seen.update(denoising=args))
    watch(guidance, "logit", lambda *args: logits.append(args))
    watch(dmd2.Updates, "step", lambda updates, loss, _: steps.append((updates.name, loss.item())))
    losses = iterate(0, True)
    ranges = {"matching": (20, 981), "denoising": (0, 1000)}
    t = {name: players.draw_t(batch[name]["u"], *ranges.get(name, (0, 500))) for name in dmd2.DRAWS}
    x, c, empty, teacher, fake, _, own_t, noise, scale = seen["matching"]
    assert (teacher, fake, scale) == (players.teacher, guidance.fake, 2.5)
    assert c is batch["c"] and empty is players.empty and x.requires_grad
    assert torch.equal(own_t, t["matching"]) and noise is batch["matching"]["noise"]
    detached, c, fake, _, own_t, noise = seen["denoising"]
    assert torch.equal(detached, x) and not detached.requires_grad and fake is guidance.fake
    assert c is batch["c"] and torch.equal(own_t, t["denoising"]) and noise is batch["denoising"]["noise"]
    expected = [(x, "generator", "c"), (x, "discriminator", "c"), (batch["real_x0"], "real", "real_c")]
    for (xt, own_t, c), (x0, name, condition) in zip(logits, expected, strict=True):
        assert torch.equal(own_t, t[name]) and c is batch[condition]
        assert torch.equal(xt, players.schedule.add_noise(x0, batch[name]["noise"], t[name]))
        assert xt.requires_grad == (name == "generator")
    student = 0.5 * losses["distribution matching"] + 0.25 * losses["generator GAN"]
    fake_and_head = losses["fake score"] + 0.125 * losses["discriminator"]
    expected = [("student", pytest.approx(student.item())), ("guidance", pytest.approx(fake_and_head.item()))]
    assert steps == expected


def test_gradients_are_clipped():
    """AdamW hides the scale of its first gradient, its moment does not: (1 - beta1) g, |g| at most --max_grad_norm."""
    p = nn.Parameter(torch.zeros(4))
    updates = dmd2.Updates("student", [(p, p)], 1e-3, parse("--max_grad_norm", 3), 10)
    norm = updates.step(50 * p.sum(), Accelerator(cpu=True))
    assert norm.item() == pytest.approx(100)
    moment = updates.optimizer.state[p]["exp_avg"]
    assert moment.norm().item() == pytest.approx(3 * (1 - parse().adam_beta1), rel=1e-4)


def test_same_gradients_with_gradient_checkpointing():
    """Although teacher and fake score, and the rollout of the same network at other t, run in between."""
    results = []
    for flags in ((), ("--gradient_checkpointing",)):
        players, _, iterate = make("--num_intervals", 1, *flags, interval=0)
        iterate(2, True)
        results.append((iterate(2, True), snapshot(players.student), snapshot(players.guidance)))
    for plain, recomputed in zip(*results):
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, rtol=1e-3, atol=1e-5)


def test_rollout_under_autocast_leaves_the_gradient_of_all_weights():
    """autocast's copies of weights, made in the rollout without gradient, must not serve the last call."""
    flags = ("--full_finetuning", "--mixed_precision", "bf16", "--adam_weight_decay", 0)
    players, _, iterate = make("--num_intervals", 1, *flags, interval=0)
    before = snapshot(players.student)
    iterate(2, True)
    assert changed(players.student, before) == set(before)


def test_low_memory_is_one_network_that_starts_as_the_faithful_mode():
    faithful, batch, _ = make(pipe=tiny_sd())
    shared, _, iterate = make("--low_memory", pipe=tiny_sd())
    assert shared.teacher.network is shared.student.network is shared.guidance.fake.network
    iterate(0, True)  # the student leaves the base; its fake score too
    xt, t = batch["matching"]["noise"], torch.tensor([20, 500, 980])
    with torch.no_grad():
        eps = [players.teacher(xt, t, batch["c"]) for players in (faithful, shared)]
        torch.testing.assert_close(*eps)
        t_k = torch.tensor(999)
        outputs = [f(xt, t_k, batch["c"]) for f in (shared.teacher, shared.student, shared.guidance.fake)]
    assert all((a - b).abs().max() > 1e-5 for a, b in ((outputs[0], outputs[1]), *[outputs[::2]], outputs[1:]))
    faithful_start = make(pipe=tiny_sd())[0].guidance.fake(xt, t, batch["c"])
    torch.testing.assert_close(
        make("--low_memory", pipe=tiny_sd())[0].guidance.fake(xt, t, batch["c"]), faithful_start
    )
    unet = shared.student.network
    shared.guidance.fake.lora.remove()
    shared.experts.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


# -- rollout and sampling


class Recorder(nn.Module):
    """A denoiser that notes its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(0.3)), []

    def forward(self, xt, t, c):
        self.calls.append((int(t), torch.is_grad_enabled(), xt.detach().clone()))
        return self.weight * xt


@pytest.mark.parametrize("k", range(4))
def test_rollout_calls_earlier_steps_in_order_and_none_twice(schedule, k):
    players, batch, iterate = make("--num_intervals", 1, interval=0)
    players.student = student = Recorder()
    players.student_updates = dmd2.Updates("student", [(student.weight, student.weight)], 1e-3, parse(), 10)
    iterate(k, True)
    assert [t for t, _, _ in student.calls] == STEPS[: k + 1]
    assert [grad for _, grad, _ in student.calls] == [False] * k + [True]
    noises = batch["noises"]
    assert torch.equal(student.calls[0][2], noises[:, 0])  # pure noise at 999
    for j in range(k):  # each step is its own noise on the x0 before, none used twice
        xt = student.calls[j][2]
        x0 = schedule.x0(xt, 0.3 * xt, torch.tensor(STEPS[j]))
        expected = schedule.add_noise(x0, noises[:, j + 1], torch.tensor(STEPS[j + 1]))
        torch.testing.assert_close(student.calls[j + 1][2], expected)
    student.calls.clear()
    iterate(k, False)
    assert [grad for _, grad, _ in student.calls] == [False] * (k + 1)


def test_all_noise_is_independent():
    sample = dmd2.Prompts(["a"], (4, 8, 8), 4)[0, 1, 2]
    noises = torch.stack([*sample["noises"], *(sample[name]["noise"] for name in dmd2.DRAWS)]).flatten(1)
    assert noises.shape == (9, 256)
    correlation = torch.corrcoef(noises) - torch.eye(9)
    assert correlation.abs().max() < 0.25 and len({sample[name]["u"].item() for name in dmd2.DRAWS}) == 5
    other = dmd2.Prompts(["a"], (4, 8, 8), 4)[0, 1, 3]  # the next place in the global batch
    assert all(not torch.equal(sample[name]["noise"], other[name]["noise"]) for name in dmd2.DRAWS)
    assert not torch.equal(sample["noises"][0], other["noises"][0])


def test_rollout_runs_each_steps_expert(experts_run):
    """In order 999, 749, 499 through the finished experts of intervals 3, 2, 1, and then the own, 0."""
    players, _, iterate = make("--output_dir", experts_run, interval=0)
    seen, layer = [], next(iter(players.experts.layers.values()))
    expert = layer.expert
    layer.expert = lambda slot, bank=0: seen.append((slot, torch.is_grad_enabled())) or expert(slot, bank)
    iterate(3, True)
    assert seen == [(3, False), (2, False), (1, False), (0, True)]  # slots of intervals 0..3


def test_student_step_is_shared_and_random():
    """A function of seed, expert, phase and iteration alone: the same on all processes."""
    args = parse("--num_intervals", 1)
    steps = [dmd2.student_step(args, 0, False, i) for i in range(400)]
    assert steps == [dmd2.student_step(args, 0, False, i) for i in range(400)]
    assert all(70 < steps.count(k) < 130 for k in range(4))
    assert steps != [dmd2.student_step(args, 0, True, i) for i in range(400)]
    assert {dmd2.student_step(parse(), 2, False, i) for i in range(20)} == {1}


def test_sampling_equals_lcm_scheduler(experts_run, schedule):
    """Four calls, no noise after the last; diffusers' LCMScheduler at these timesteps gives the same."""
    pipe = tiny_sd()
    tsm_lora.load_experts(pipe, experts_run / "experts-n4")
    with torch.no_grad():
        c = {"encoder_hidden_states": pipe.encode_prompt(["a", "b"], pipe.device, 1, False)[0]}
    noises = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    student = dmd2.Denoiser(pipe, pipe.unet)
    xt = dmd2.backward_simulation(student, schedule, c, noises, STEPS)
    with torch.no_grad():
        ours = schedule.x0(xt, student(xt, torch.tensor(249), c), torch.tensor(249)).float()
    given, calls = iter([*noises.transpose(0, 1)[1:]]), []

    def randn(*args, **kwargs):
        return next(given)

    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", randn)
        handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        theirs = pipe(
            prompt_embeds=c["encoder_hidden_states"],
            latents=noises[:, 0],
            timesteps=STEPS,
            guidance_scale=0,
            output_type="latent",
        ).images
    handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    assert len(calls) == 4 and next(given, None) is None


def test_fresh_lora_is_the_teacher_and_its_pictures_repeat():
    pipe = tiny_sd()
    players, batch, _ = make("--num_intervals", 1, interval=0, pipe=pipe)
    xt, t = batch["matching"]["noise"], torch.tensor(999)
    with torch.no_grad():
        assert torch.equal(players.student(xt, t, batch["c"]), players.teacher(xt, t, batch["c"]))
    args = parse("--resolution", 16)
    a, b = (dmd2.draw_student(pipe, ["a", "b"], args) for _ in range(2))
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b] and a[0].tobytes() != a[1].tobytes()


# -- head, counts


def test_head_fits_the_mid_block():
    players, batch, _ = make()
    layers = players.guidance.head
    assert [m.kernel_size for m in layers if isinstance(m, nn.Conv2d)] == [(4, 4), (1, 1)]  # 4x4 of 32 channels
    assert layers[1].num_groups == 4 and layers[0].in_channels == 32
    again = make()[0].guidance.head
    assert_identical(dict(layers.named_parameters()), dict(again.named_parameters()))
    pixart = tiny_pixart()
    guidance = dmd2.Guidance(dmd2.Denoiser(pixart, pixart.transformer))
    with pytest.raises(ValueError, match="--steps_with_gan 0"):
        guidance.add_head((4, 8, 8), {}, 0)


def test_counts_on_sd15():
    """From the configuration alone: base, adapted layers, LoRA, routers, head."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
        pipe = tiny_sd()
        guidance = dmd2.Guidance(nn.Identity())
        guidance.fake.network = SimpleNamespace(mid_block=None)
        guidance.feature = lambda *_: torch.empty(1, 1280, 8, 8)
        guidance.add_head((4, 64, 64), {"c": torch.empty(1)}, 0)
    assert sum(p.numel() for p in guidance.head.parameters()) == 52_437_761
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    pipe.unet = unet
    experts, pairs = dmd2.attach(pipe, parse("--rank", 64, "--lora_alpha", 8, "--num_intervals", 1), 0)
    assert len(experts.layers) == 278 and {layer.scaling for layer in experts.layers.values()} == {0.125}
    assert sum(own.numel() for _, own in pairs) == 67_252_224
    experts.unload()
    banks = [tsm_lora.Bank(4, (0, 1, 2, 3), 1), tsm_lora.Bank(1, (0,), 1, gated=True)]
    routed = tsm_lora.Experts(
        pipe, experts.backbone, {"unet": dmd2.LORA_LAYERS}, banks, None, router=tsm_lora.Router()
    )
    assert sum(p.numel() for p in routed.router_parameters()) == 570_416


# -- an analytic teacher


class Gaussian(nn.Module):
    """The exact eps of N(mean, std^2), both to be learned."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.mean, self.log_std = (
            schedule,
            nn.Parameter(torch.zeros(4, 1, 1)),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, xt, t, c):
        return gaussian(self.mean, self.log_std.exp(), self.schedule)(xt, t, c)


class Affine(nn.Module):
    """A one-step student: x0 = mean + std z."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.mean, self.std = schedule, nn.Parameter(torch.zeros(4, 1, 1)), nn.Parameter(torch.ones(()))

    def forward(self, xt, t, c):
        signal, sigma = self.schedule.factors(t, xt)
        return ((xt - signal * (self.mean + self.std * xt)) / sigma).float()


@pytest.mark.parametrize("frozen_fake", [False, True])
def test_student_of_an_analytic_teacher(schedule, frozen_fake):
    """The real updates: the student's mean and deviation come to the teacher's; with the fake score frozen at its
    start they do not."""
    AcceleratorState._reset_state(True)
    flags = ("--student_timesteps", 999, "--num_intervals", 1, "--adam_weight_decay", 0, "--real_guidance_scale", 1)
    args, accelerator = parse(*flags), Accelerator(cpu=True)
    mean, std = torch.tensor([1.0, -0.5, 0.3, 2.0]).view(4, 1, 1), 0.5
    student, fake = Affine(schedule), Gaussian(schedule)
    pairs = [(p, p) for p in student.parameters()]
    draw_t = dmd2.backbones.Diffusion(tiny_sd()).draw_t
    teacher = gaussian(mean, std, schedule)
    players = dmd2.Players(student, teacher, dmd2.Guidance(fake), schedule, draw_t, {}, pairs)
    players.student_updates = dmd2.Updates("student", pairs, 0.02, args, 400)
    rate = 0.0 if frozen_fake else 0.05
    players.guidance_updates = dmd2.Updates("guidance", [(p, p) for p in fake.parameters()], rate, args, 400)
    for i in range(600):
        g = torch.Generator().manual_seed(i)
        batch = {"c": {}, "noises": torch.randn(16, 1, 4, 2, 2, generator=g)}
        for name in dmd2.DRAWS:
            batch[name] = {"u": torch.rand(16, generator=g), "noise": torch.randn(16, 4, 2, 2, generator=g)}
        dmd2.iterate(players, batch, 0, i % 2 == 0, False, args, accelerator)
    error = max((student.mean - mean).abs().max().item(), abs(student.std.abs().item() - std))
    assert (error > 0.5) if frozen_fake else (error < 0.15), error


# -- the script


def test_full_run(world, experts_run):
    """Files, headers, and counts of updates: of N iterations ceil(N / ratio) are the student's."""
    out = experts_run
    assert sorted(p.name for p in (out / "experts-n4").iterdir()) == [
        f"interval-{i:03d}.safetensors" for i in range(4)
    ]
    for i in range(4):
        facts = tsm_lora.read_facts(out / "experts-n4" / f"interval-{i:03d}.safetensors")
        assert facts["student_timesteps"] == STEPS and facts["steps"] == 9 and facts["method"] == "DMD2"
        assert facts["timesteps"] == [250 * i, 250 * i + 249] and facts["alpha"] == 1
        assert all(v.any() for k, v in tensors(out, i).items() if "lora_B" in k)
        record = json.loads((out / "training" / f"interval-{i:03d}.json").read_text())
        assert record["student_updates"] == 3 + 2 and (record["without_gan"], record["with_gan"]) == (5, 4)
        assert record == json.loads((out / "training.json").read_text())[f"interval-{i:03d}"]
        head = load_file(out / "guidance" / f"interval-{i:03d}.safetensors")
        assert any(k.startswith("head.") for k in head) and any(k.startswith("fake.up_blocks") for k in head)
    assert Image.open(out / "samples.png").size == (256, 256)
    pipe = tiny_sd()
    args = parse("--resolution", 16)
    base = dmd2.draw_student(pipe, ["a"], args)[0]
    experts = tsm_lora.load_experts(pipe, out / "experts-n4")
    assert dmd2.draw_student(pipe, ["a"], args)[0].tobytes() != base.tobytes()
    experts.unload()
    assert dmd2.draw_student(pipe, ["a"], args)[0].tobytes() == base.tobytes()


def test_updates_are_counted_per_player(world, tmp_path, monkeypatch):
    counts = {}
    step = dmd2.Updates.step

    def counted(self, loss, accelerator):
        key = (self.name, self.optimizer.param_groups[0]["lr"])
        counts.setdefault(self.name, []).append(key[1])
        return step(self, loss, accelerator)

    monkeypatch.setattr(dmd2.Updates, "step", counted)
    flags = ("--num_intervals", 1, "--steps_without_gan", 7, "--steps_with_gan", 0, "--update_ratio", 3)
    run(world, tmp_path, *flags, "--guidance_learning_rate", 0.004, "--lr_warmup_steps", 4)
    assert counts["guidance"] == pytest.approx([0, 0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    assert counts["student"] == pytest.approx([0, 0.0075, 0.01])  # iterations 0, 3, 6; warm-up counts all of them


def kill_and_resume(world, out, checkpoint, expected, *flags):
    flags = ("--checkpointing_steps", 1, *flags)
    argv = [sys.executable, str(ROOT / "distill_dmd2.py"), *command(world, out, *flags)]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob(f"checkpoints/{checkpoint}")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(world, out, *flags, "--resume_from_checkpoint", "latest")
    for path in expected:
        assert_identical(load_file(out / path.relative_to(path.parents[1])), load_file(path))


def results(run):
    return [path for name in ("experts-n4", "experts-n1", "guidance") for path in sorted((run / name).glob("*"))]


def test_killed_without_gan(world, experts_run, tmp_path):
    """In the phase without GAN of the second expert; experts, fake scores and heads are bit-identical."""
    kill_and_resume(world, tmp_path, "interval-002/checkpoint-2", results(experts_run), "--save_guidance")


def test_killed_with_gan(world, lora_run, tmp_path):
    flags = ("--num_intervals", 1, "--save_guidance")
    kill_and_resume(world, tmp_path, "interval-000/checkpoint-7", results(lora_run), *flags)


def test_resume_from_each_checkpoint(world, lora_run, tmp_path):
    """Also from the last of the phase without GAN, before there is a head."""
    flags = ("--num_intervals", 1, "--save_guidance", "--checkpointing_steps", 1)
    run(world, tmp_path, *flags)
    states = [torch.load(p, weights_only=True) for p in sorted(tmp_path.glob("checkpoints/*/*/state.pt"))]
    assert [(s["step"], s["gan"]) for s in states] == [(k, k > 5) for k in range(1, 10)]
    assert len({len(s["guidance"]["parameters"]) for s in states}) == 2  # with a head and without
    for name in ("checkpoint-5", "checkpoint-4", "checkpoint-6"):
        run(world, tmp_path, *flags, "--resume_from_checkpoint", name)
        for path in results(lora_run):
            assert_identical(load_file(tmp_path / path.relative_to(path.parents[1])), load_file(path))


def test_two_processes_equal_one(world, lora_run, tmp_path):
    """The same student step on both, other noise on each: together they are one process of twice the batch."""
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(ROOT / "distill_dmd2.py")]
    flags = ("--num_intervals", 1, "--save_guidance", "--train_batch_size", 2, "--gan_train_batch_size", 1)
    subprocess.run([sys.executable, *argv, *command(world, tmp_path, *flags)], env=environment(), check=True)
    for path in results(lora_run):
        ours, theirs = load_file(tmp_path / path.relative_to(path.parents[1])), load_file(path)
        differ = torch.cat([(ours[k] - theirs[k]).abs().flatten() for k in theirs])
        assert differ.mean() < 1e-6 and differ.max() < 2e-3  # AdamW scales up a gradient that is nearly zero
        assert ours.keys() == theirs.keys()


def test_routers(world, experts_run, lora_run, tmp_path):
    """Stage 2 over the distilled experts: routers alone train, in the rows of the student's timesteps."""
    folders = ("--core_experts", experts_run / "experts-n4", "--context_experts", lora_run / "experts-n1")
    flags = (*folders, "--steps_without_gan", 0, "--steps_with_gan", 12, "--gan_learning_rate", 0.01)
    run(world, tmp_path, *flags, "--initial_guidance", lora_run / "guidance" / "interval-000.safetensors")
    assembled = tmp_path / "assembled"
    for n, name, source in ((4, "0-core-n4", experts_run), (1, "1-context-n1", lora_run)):
        for path in (source / f"experts-n{n}").glob("*.safetensors"):
            assert path.read_bytes() == (assembled / name / path.name).read_bytes()
    router = load_file(assembled / "router.safetensors")
    rows = set()
    for key, value in router.items():
        assert value.any()
        rows |= set(value.flatten(1).any(1).nonzero().flatten().tolist()) if key.endswith("router_E.weight") else set()
    args = dmd2.parse_args(command(world, tmp_path, *flags))
    visited = {STEPS[dmd2.student_step(args, 0, True, i)] for i in range(0, 12, 2)}
    assert rows == visited <= set(STEPS) and len(visited) > 1
    tsm_lora.load_experts(tiny_sd(), assembled)
    argv = ["--prompt", "a", "--experts", str(assembled), "--scheduler", "LCMScheduler", "--guidance_scale", "0"]
    with pytest.raises(ValueError, match="never seen: add .*--timesteps 999 749 499 249"):
        sample.check_student(sample.parse_args(argv))
    sample.check_student(sample.parse_args([*argv, "--timesteps", "999", "749", "499", "249"]))


def test_routers_start_as_stage_1(experts_run, lora_run, schedule):
    pipes = [tiny_sd(), tiny_sd()]
    tsm_lora.assemble_experts(pipes[0], experts_run / "experts-n4", [lora_run / "experts-n1"])
    tsm_lora.load_experts(pipes[1], experts_run / "experts-n4")
    with torch.no_grad():
        c = {"encoder_hidden_states": pipes[0].encode_prompt(["a", "b"], "cpu", 1, False)[0]}
    noises = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    xt = [dmd2.backward_simulation(dmd2.Denoiser(p, p.unet), schedule, c, noises, STEPS) for p in pipes]
    torch.testing.assert_close(*xt)


def test_full_finetuning_of_one_step(world, tmp_path):
    flags = ("--full_finetuning", "--num_intervals", 1, "--student_timesteps", 999, "--learning_rate", 1e-3)
    run(world, tmp_path, *flags)
    pipe, base = StableDiffusionPipeline.from_pretrained(tmp_path / "student"), tiny_sd()
    before = dict(base.unet.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())
    assert_identical(pipe.vae.state_dict(), base.vae.state_dict())
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        run(world, tmp_path, *flags)


def test_four_steps_of_full_finetuning(world, tmp_path):
    run(world, tmp_path, "--full_finetuning", "--num_intervals", 1, "--learning_rate", 1e-3)
    assert json.loads((tmp_path / "training.json").read_text())["interval-000"]["student_updates"] == 5


def test_low_memory_run(world, tmp_path):
    run(world, tmp_path, "--num_intervals", 2, "--low_memory", "--save_guidance")
    for i in range(2):
        saved = load_file(tmp_path / "guidance" / f"interval-{i:03d}.safetensors")
        assert {name.split(".")[0] for name in saved} == {"fake", "head"}
        assert all(name[-1] in "AB" for name in saved if name.startswith("fake"))
        assert any(v.any() for k, v in tensors(tmp_path, i, 2).items() if "lora_B" in k)


def test_prompts_file_without_pictures(world, tmp_path):
    """Without GAN and with prompts of its own, a run needs no picture at all."""
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    flags = ("--num_intervals", 1, "--steps_with_gan", 0, "--prompts_file", tmp_path / "prompts.txt")
    run(world, tmp_path / "run", *flags, "--train_data_dir", tmp_path / "nowhere")
    assert Image.open(tmp_path / "run" / "samples.png").size == (256, 256)  # the two prompts, teacher above student


@pytest.mark.parametrize("mode", ["faithful", "low memory"])
def test_memory_benchmark(mode):
    args = dmd2_memory.parse_args(["--mode", mode, "--width", "32", "--rank", "8", "--iterations", "1"])
    assert dmd2_memory.measure(args).keys() >= {"peak GB", "seconds, student's turn", "seconds, other turn"}
    sizes = dmd2_memory.static(mode, dmd2_memory.parse_args([]))
    unet, lora, head = 859_520_964, 67_252_224, 52_437_761
    teacher, fake = (unet, unet) if mode == "faithful" else (0, lora)
    assert sizes["sum"] == pytest.approx(4 * (unet + 4 * lora + teacher + 4 * fake + 4 * head) / 1e9, abs=1e-3)


def test_comparison_benchmark(tmp_path):
    """The teacher's samplers and one short run; once more, nothing is trained or drawn again."""
    flags = ["--runs", "LoRA", "--scale", "0.2", "--train_batch_size", "1", "--pictures", "8"]
    flags += ["--work_dir", str(tmp_path / "work"), "--output_file", str(tmp_path / "table.json")]
    runs = []
    for _ in range(2):
        compare_dmd2.main(compare_dmd2.parse_args(flags))
        files = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*-8.json")]
        runs.append({path: path.stat().st_mtime_ns for path in files})
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert [row["method"] for row in table] == [*compare_dmd2.SAMPLERS, "LoRA"]
    assert all(row["frechet"]["mean"] > 0 for row in table) and table[-1]["student_updates"] == 4 + 1
    assert len(runs[0]) == 2 + len(compare_dmd2.SAMPLERS) + 1 and runs[0] == runs[1]
    with pytest.raises(ValueError, match="holds another run.*--update_ratio"):
        compare_dmd2.main(compare_dmd2.parse_args([*flags, "--update_ratio", "3"]))


def test_shards(world, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row in map(json.loads, (world / "images" / "metadata.jsonl").read_text().splitlines()):
            tar.add(world / "images" / row["file_name"], row["file_name"])
            (tmp_path / "caption.txt").write_text(row["text"])
            tar.add(tmp_path / "caption.txt", row["file_name"].replace(".png", ".txt"))
    flags = ("--train_data_dir", tmp_path, "--image_column", "png", "--caption_column", "txt")
    run(world, tmp_path / "run", "--num_intervals", 1, *flags)
    assert len(tensors(tmp_path / "run", 0, 1)) > 100


def test_pixart_without_gan():
    pipe = tiny_pixart()
    AcceleratorState._reset_state(True)
    args, accelerator = parse("--num_intervals", 1, "--resolution", 16), Accelerator(cpu=True)
    players = dmd2.make_players(pipe, args, 0, accelerator)
    dmd2.begin_phase(pipe, players, args, 0, False, 10)
    batch = torch.utils.data.default_collate([dmd2.Prompts(["a"], (4, 8, 8), 4)[0, k] for k in range(2)])
    with torch.no_grad():
        batch["c"] = players.student.backbone.conditions(players.student.backbone.encode(pipe, ["a", "b"]))
    before = snapshot(players.student)
    for _ in range(2):
        losses = dmd2.iterate(players, batch, 2, True, False, args, accelerator)
    assert changed(players.student, before) and all(v.isfinite() for v in losses.values())


@pytest.mark.parametrize("name", ["fake score", "generator GAN", "discriminator", "distribution matching"])
def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch, name):
    function = {"fake score": "denoising_loss", "generator GAN": "generator_gan_loss"}
    function = function.get(name, {"discriminator": "discriminator_loss"}.get(name, "matching_loss"))
    original, calls = getattr(dmd2, function), []

    def broken(*args):
        calls.append(1)
        return original(*args) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(dmd2, function, broken)
    with pytest.raises(FloatingPointError, match=f"not finite at iteration \\d+: .*{name}"):
        run(world, tmp_path, "--num_intervals", 1, "--checkpointing_steps", 1)
    states = list(tmp_path.glob("checkpoints/*/*/state.pt"))
    assert states and not list(tmp_path.glob("experts-n1/*"))
    for path in states:
        state = torch.load(path, weights_only=True)
        assert all(p.isfinite().all() for who in ("student", "guidance") for p in state[who]["parameters"])


def test_wrong_input(world, experts_run, lora_run, tmp_path):
    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            run(world, tmp_path / "x", *flags)
        assert not (tmp_path / "x" / "experts-n4").exists()

    refused("must fall", "--student_timesteps", 249, 999)
    refused("must fall", "--student_timesteps", 1000)
    refused("no student timestep .* falls into interval", "--num_intervals", 8)
    refused("--steps_with_gan .*: one number or 4", "--steps_with_gan", 1, 2)
    refused("--update_ratio must be at least 1", "--update_ratio", 0)
    refused("belong together", "--core_experts", experts_run / "experts-n4")
    refused("nothing would be trained", "--steps_without_gan", 0, "--steps_with_gan", 0)
    refused("one set of weights", "--full_finetuning")
    refused("drop one flag", "--low_memory", "--gradient_checkpointing")
    refused("--snr_gamma has no effect", "--snr_gamma", 5)
    refused("need --gan_max_timestep", "--gan_max_timestep", 1001)
    refused("no such file", "--prompts_file", tmp_path / "nowhere.txt")
    refused("holds this run already", "--output_dir", experts_run, "--save_guidance")
    refused("holds another run.*--rank", "--output_dir", experts_run, "--save_guidance", "--rank", 1)
    refused("are of --student_timesteps", "--core_experts", experts_run / "experts-n4", "--context_experts",
            lora_run / "experts-n1", "--student_timesteps", 999, 499)  # fmt: skip
    for prediction, change in (("v_prediction", "v_prediction"), ("epsilon", "rescale")):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        pipe = tiny_sd(prediction_type=prediction)
        if change == "rescale":
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
        pipe.save_pretrained(tmp_path / "model")
        refused("predicts epsilon|zero terminal SNR", "--pretrained_model_name_or_path", tmp_path / "model")
    saved = load_file(lora_run / "guidance" / "interval-000.safetensors")
    save_file(saved | {"fake.conv_in.bias": torch.zeros(1)}, tmp_path / "wide.safetensors")
    refused("it has another shape of fake.conv_in.bias", "--initial_guidance", tmp_path / "wide.safetensors")
    refused("another model's, it lacks", "--initial_guidance", lora_run / "experts-n1" / "interval-000.safetensors")
