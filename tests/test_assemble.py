"""Stage 2 in tsm_lora.py: gates, assembled layers, the symmetric variant, MoE LoRA, sampling, files."""

import copy
import json
import shutil

import pytest
import torch
from conftest import delta, tiny_sd
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_tsm_lora import CONV_TARGETS, PROMPTS, fill, relative
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

import backbones
import tsm_lora
from tsm_lora import Bank, ExpertLayer, Router, Routing, T, assemble_experts, attach_experts, attach_moe, load_experts


def fostered(pipe, root, scales, **options):
    """Folders of random experts, one per scale."""
    options = {"rank": 2} | options
    for k, n in enumerate(scales):
        experts = attach_experts(pipe, n, generator=torch.Generator().manual_seed(k), **options)
        fill(experts, seed=k)
        for i in range(n):
            experts.save_expert(i, root / f"n{n}" / f"interval-{i:03d}.safetensors")
        experts.unload()
    return [root / f"n{n}" for n in scales]


def fill_routers(experts, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.router_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return experts


def assembled(pipe, root, folders, core=True, **options):
    """An assembled folder with random routers."""
    experts = assemble_experts(pipe, folders[0] if core else None, folders[1:] if core else folders, **options)
    fill_routers(experts).save_router(root / "router.safetensors", [folder.name for folder in folders])
    experts.unload()
    for folder in folders:
        shutil.copytree(folder, root / folder.name, dirs_exist_ok=True)
    return root


# -- the layer


def slow_reference(layer, base, x, t):
    """Loops over samples, positions and experts; nothing stacked, nothing one-hot."""
    out = []
    for b in range(len(x)):
        n_rows = len(x) // len(t)
        step = int(t[b // n_rows])
        y = base(x[b : b + 1])[0]
        j = 0
        for bank, start in zip(layer.routing.banks, layer.starts):
            first = start + (step * bank.n // T) * bank.rank
            gate_number = j if bank.gated else None
            for k in range(first, first + bank.rank):
                if isinstance(base, nn.Conv2d):
                    z = F.conv2d(x[b : b + 1], layer.A[k : k + 1], None, base.stride, base.padding)[0, 0]  # (h', w')
                else:
                    z = x[b] @ layer.A[k]  # (L,) or ()
                if gate_number is not None:
                    if isinstance(base, nn.Conv2d):  # the input at the middle of each output's window
                        middle = x[b, :, :: base.stride[0], :: base.stride[1]]
                        gate = torch.einsum("c,chw->hw", layer.W_r[gate_number], middle)
                    else:
                        gate = x[b] @ layer.W_r[gate_number]
                    z = z * (gate + layer.E[step, gate_number])
                if isinstance(base, nn.Conv2d):
                    y = y + z * layer.B[k][:, None, None]
                else:
                    y = y + z[..., None] * layer.B[k]
            j += bank.gated
        out.append(y)
    return torch.stack(out)


BASES = {
    "linear, (B, L, C)": (nn.Linear(6, 5), (4, 3, 6)),
    "linear, B*F rows": (nn.Linear(6, 5), (12, 3, 6)),
    "conv": (nn.Conv2d(6, 5, 3, padding=1), (4, 6, 4, 4)),
    "conv, stride 2": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (4, 6, 6, 6)),
    "conv, B*F rows": (nn.Conv2d(6, 5, 1), (8, 6, 2, 2)),
}


@pytest.mark.parametrize("contexts", [(1,), (1, 2), (1, 2, 4)])
@pytest.mark.parametrize("kind", BASES)
def test_assembled_layer_equals_a_slow_loop(kind, contexts):
    torch.manual_seed(0)
    base, shape = BASES[kind]
    base = copy.deepcopy(base).double()
    banks = [Bank(8, tuple(range(8)), 3)] + [Bank(n, tuple(range(n)), 2, True) for n in contexts]
    layer = ExpertLayer(base, Routing(banks), 1.0, Router()).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    base.tsm = layer
    base.register_forward_hook(tsm_lora._add_experts)
    x, t = torch.randn(shape).double(), torch.tensor([3, 400, 401, 999])
    layer.routing.route = layer.routing.at(t)
    ours = base(x)
    assert not layer.routing.route.shared
    layer.routing.enabled = False
    expected = slow_reference(layer, base, x, t)
    assert relative(ours, expected) < 1e-6
    probe = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * probe).sum(), [layer.W_r, layer.E]) for y in (ours, expected)]
    for a, b in zip(*gradients):
        assert relative(a, b) < 1e-6 and b.abs().sum() > 0
    layer.routing.enabled = True
    for k in range(4):  # one t for all rows: the path of sampling
        rows = slice(k * shape[0] // 4, (k + 1) * shape[0] // 4)
        for one in (t[k], torch.full((1,), int(t[k]))):
            layer.routing.route = layer.routing.at(one)
            assert layer.routing.route.shared
            assert relative(base(x[rows]), expected[rows]) < 1e-6


@pytest.mark.parametrize("inputs", ["feature", "timestep"])
@pytest.mark.parametrize("kind", ["linear, (B, L, C)", "conv, stride 2"])
def test_router_inputs(kind, inputs):
    """One term of the gate is what is left when the other is zero."""
    torch.manual_seed(0)
    base, shape = BASES[kind]
    routing = Routing([Bank(2, (0, 1), 1), Bank(1, (0,), 1, True), Bank(4, (0, 1, 2, 3), 1, True)])
    whole = ExpertLayer(base, routing, 1.0, Router())
    part = ExpertLayer(base, routing, 1.0, Router(inputs))
    assert (part.W_r is None, part.E is None) == (inputs == "timestep", inputs == "feature")
    for name, parameter in whole.named_parameters():
        nn.init.normal_(parameter)
        if hasattr(part, name) and getattr(part, name) is not None:
            getattr(part, name).data.copy_(parameter)
    (whole.E if inputs == "feature" else whole.W_r).data.zero_()
    project = base._conv_forward if isinstance(base, nn.Conv2d) else F.linear
    x = torch.randn(shape)
    for t in (torch.tensor([3, 400, 401, 999]), 700):
        routing.route = routing.at(t)
        torch.testing.assert_close(part(x, project), whole(x, project))


def test_scale_acts_on_the_gated_sum():
    base = nn.Linear(3, 3)
    layer = ExpertLayer(base, Routing([Bank(1, (0,), 1), Bank(2, (0, 1), 1, True)], 0.5), 1.0, Router())
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, routing = torch.randn(2, 3), layer.routing
    sums = []
    for scale in (1.0, 0.25):
        routing.route = routing.at(5, scale)
        sums.append(layer(x, F.linear))
    torch.testing.assert_close(sums[0] * 0.25, sums[1])


# -- the start, and what trains


def plain_inputs():
    generator = torch.Generator().manual_seed(9)
    return (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.tensor([3, 400, 600, 999]),
        torch.randn(4, 12, 16, generator=generator),
    )


@pytest.mark.parametrize("core", [True, False])
def test_stage_2_starts_at_stage_1(pipe, tmp_path, core):
    """Bit-equal with a core where each row has its own t, 1e-6 where all share one; the symmetric start too."""
    folders = fostered(pipe, tmp_path, [8, 1], lora_layers=CONV_TARGETS)
    x, t, cond = plain_inputs()

    def outputs():
        with torch.no_grad():
            return (
                pipe.unet(x, t, cond).sample,
                pipe.unet(x, 700, cond).sample,
                experts.predict(x, t, ["a", "b", "", "c"]),
            )

    experts = load_experts(pipe, folders[0])
    stage_1 = outputs()
    experts.unload()
    experts = assemble_experts(pipe, folders[0] if core else None, folders[1:] if core else folders)
    stage_2 = outputs()
    for ours, expected in zip(stage_2, stage_1):
        assert relative(ours, expected) < 1e-6
    if core:
        assert torch.equal(stage_2[0], stage_1[0]) and torch.equal(stage_2[2], stage_1[2])
    experts.predict(x, t, ["a", "b", "", "c"]).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in experts.router_parameters())
    trained = {id(p) for p in experts.router_parameters()}
    parameters = [p for c in experts.components.values() for p in c.parameters()]
    assert {id(p) for p in parameters if p.requires_grad} == trained


def test_rows_of_E_learn_from_their_own_t_alone(pipe, tmp_path):
    folders = fostered(pipe, tmp_path, [4, 1])
    experts = assemble_experts(pipe, folders[0], folders[1:])
    x, t, _ = plain_inputs()
    experts.predict(x, t, ["a"] * 4).square().mean().backward()
    for layer in experts.layers.values():
        assert layer.E.grad.abs().sum(1).nonzero().flatten().tolist() == t.tolist()


@pytest.mark.parametrize("other_forward", [False, True])
def test_gradient_checkpointing_gives_equal_router_gradients(tmp_path, other_forward):
    grads = []
    for checkpointing in (False, True):
        pipe = tiny_sd()
        folders = fostered(pipe, tmp_path, [4, 1])
        experts = fill_routers(assemble_experts(pipe, folders[0], folders[1:]))
        if checkpointing:
            experts.enable_gradient_checkpointing()
        x, t, _ = plain_inputs()
        loss = experts.predict(x, t, ["a", "b", "c", "d"]).square().mean()
        if other_forward:
            experts.predict(x, t.flip(0), ["a", "b", "c", "d"])
        loss.backward()
        grads.append([p.grad for p in experts.router_parameters()])
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-5) and b.abs().sum() > 0 for a, b in zip(*grads))


# -- parameter counts of the paper's models, on the meta device


def router_size(model, names, contexts=1):
    layers = tsm_lora._find_layers("x", model, names).values()
    banks = [Bank(8, tuple(range(8)), 4)] + [Bank(1, (0,), 4, True)] * contexts
    routers = [ExpertLayer(layer, Routing(banks), 1.0, Router()) for layer in layers]
    return sum(r.W_r.numel() + r.E.numel() for r in routers)


SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
DISTILLATION_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


def test_router_parameters_of_the_papers_models():
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    attention = backbones.ATTENTION
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
        assert router_size(unet, attention) + router_size(clip, ("q_proj", "v_proj")) == 269_888
        assert router_size(unet, DISTILLATION_TARGETS) == 570_416
        pixart = PixArtTransformer2DModel(sample_size=128)
        t5 = T5EncoderModel(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64))
        assert router_size(pixart, attention) + router_size(t5, ("q", "v")) == 726_656
        sd3 = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        clip_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        encoders = (CLIPTextModelWithProjection(config) for config in (clip_l, clip_g))
        assert router_size(sd3, attention) + sum(router_size(encoder, names) for encoder in encoders) == 620_160


# -- MoE LoRA


def test_moe_gates_and_balance_loss(pipe):
    """Top-2 of a softmax, renormalised, and MixLoRA's loss, beside a loop over tokens."""
    experts = fill(attach_moe(pipe, 4, 2, rank=3, alpha=6, train_text_encoder=False))
    assert {p.requires_grad for p in experts.parameters()} == {True} and all(b.n == 1 for b in experts.routing.banks)
    name, layer = next(iter(experts.layers.items()))
    x, base = torch.randn(2, 5, layer.A.shape[1]), experts.bases[name]
    with experts.at(torch.tensor([5, 900])):
        ours = base(x)
    counts, mass = torch.zeros(4), torch.zeros(4)
    with experts.off():
        expected = base(x)
    expected = expected.detach().clone()
    for token, out in zip(x.flatten(0, 1), expected.view(10, -1)):
        share = (layer.W_r @ token).softmax(0)
        share, best = share.detach(), share.topk(2).indices
        for k in best.tolist():
            A, B = layer.A[3 * k : 3 * k + 3], layer.B[3 * k : 3 * k + 3]
            out += (share[k] / share[best].sum() * 2 * (A @ token) @ B).detach()  # alpha / r = 2
        counts[best] += 1 / 2
        mass += share
    assert relative(ours, expected) < 1e-5
    torch.testing.assert_close(layer.balance, 4 * (counts / 10 * mass / 10).sum())
    with experts.at(torch.tensor([5, 900])):  # the other layers' losses too
        for key, other in experts.layers.items():
            experts.bases[key](torch.randn(2, 5, other.A.shape[1]))
    experts.balance_loss().backward()
    assert layer.W_r.grad.abs().sum() > 0 and layer.A.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="top_k must lie in 1..4"):
        attach_moe(tiny_sd(), 4, 5)


# -- sampling


def sample(pipe, **more):
    call = dict(PROMPTS, num_inference_steps=6, guidance_scale=4.0, output_type="latent") | more
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


def pixel_loop(pipe, experts, steps, guidance):
    """A hand-written loop: at each step the prompt is encoded at that t, and the denoiser gets a t per row, so that
    the layers take the path of training."""
    prompts = PROMPTS["prompt"] + PROMPTS["negative_prompt"]
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with experts.at(t):
            cond, uncond = pipe.encode_prompt(prompts, "cpu", 2, False)[0].chunk(2)
        both, rows = torch.cat([uncond, cond]), torch.cat([x, x])
        other_t = (int(t) + 500) % T  # a row at another t makes the batch mixed; its result is not used
        rows, both = torch.cat([rows, rows[:1]]), torch.cat([both, both[:1]])
        mixed = torch.cat([t.expand(8), torch.tensor([other_t])])
        off, on = pipe.unet(rows, mixed, both).sample[:8].chunk(2)
        x = scheduler.step(off + guidance * (on - off), t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("scales, core", [((8, 1), True), ((4, 8), True), ((8, 1, 2, 4), True), ((1, 8), False)])
def test_fast_and_plain_sampling_agree(pipe, tmp_path, scales, core):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    before = copy.deepcopy(pipe.unet.state_dict())
    base = sample(pipe)
    folder = assembled(pipe, tmp_path / "a", fostered(pipe, tmp_path, scales), core)
    experts = load_experts(pipe, folder)
    fused = sample(pipe)
    with experts.folded():
        folded = sample(pipe)
    plain = pixel_loop(pipe, experts, 6, 4.0)
    assert relative(fused, plain) < 1e-4 and relative(folded, plain) < 1e-4 and relative(base, plain) > 0.01
    experts.unload()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(sample(pipe), base)


@torch.no_grad()
def test_prompts_are_encoded_once_per_timestep(pipe, tmp_path):
    folders = fostered(pipe, tmp_path, [4, 1])
    load_experts(pipe, assembled(pipe, tmp_path / "a", folders))
    encoded, original = [], pipe._tsm_experts._encode_prompt
    pipe._tsm_experts._encode_prompt = lambda *a, **k: encoded.append(1) or original(*a, **k)
    sample(pipe)
    assert len(encoded) == 1 + 6  # the stand-in, and six steps


@torch.no_grad()
def test_bf16_stage_2_is_as_near_to_fp32_as_peft(pipe, tmp_path):
    """The error of the assembled layers in bf16 beside that of PEFT's unmerged arithmetic, x A^T B^T
    added to the base's output, with a LoRA of the same sum."""
    folders = fostered(pipe, tmp_path, [1, 2], rank=4, train_text_encoder=False)
    experts = load_experts(pipe, assembled(pipe, tmp_path / "a", folders))
    for name, layer in experts.layers.items():
        layer.B.data *= 0.1 * experts.bases[name].weight.norm() / delta(layer, 0).norm()
        layer.E.data.fill_(1.0), layer.W_r.data.zero_()  # gates of 1: the exact sum is a plain LoRA
    deltas = {n: (delta(layer, 0) + delta(layer, 0, 1)).double() for n, layer in experts.layers.items()}
    errors, modules = {"ours": 0.0, "peft": 0.0, "none": 0.0}, experts.bases
    pipe.to(torch.bfloat16)
    for name, base in modules.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, base.in_features, generator=generator).bfloat16()
        bias = 0 if base.bias is None else base.bias.double()
        exact = x.double() @ (base.weight.double() + deltas[name]).t() + bias
        layer = experts.layers[name]
        with experts.at(100):
            errors["ours"] += float((base(x).double() - exact).norm() ** 2)
        with experts.off():
            alone = base(x)
        errors["none"] += float((alone.double() - exact).norm() ** 2)
        A, B = torch.cat([layer.A[:4], layer.A[4:8]]), torch.cat([layer.B[:4], layer.B[4:8]])
        errors["peft"] += float(((alone + F.linear(F.linear(x, A), B.t()) * 1.0).double() - exact).norm() ** 2)
    assert errors["ours"] ** 0.5 <= 1.2 * errors["peft"] ** 0.5 < 0.2 * errors["none"] ** 0.5


def test_one_compiled_graph_serves_all_t(pipe, tmp_path):
    folders = fostered(pipe, tmp_path, [4, 1, 2], train_text_encoder=False)
    load_experts(pipe, assembled(pipe, tmp_path / "a", folders))
    x, cond, graphs = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(pipe.unet, backend=count, dynamic=False)
    with torch.no_grad():
        for t in (torch.tensor(3), torch.tensor(400), torch.tensor(999)):
            torch.testing.assert_close(compiled(x, t, cond).sample, pipe.unet(x, t, cond).sample)
            assert len(graphs) == 2  # the hook that reads t, and the whole UNet
        expected = [pipe.unet(x, torch.tensor(t), cond).sample for t in range(5, 1000, 90)]
        graphs.clear()
        torch._dynamo.reset()
        for module in pipe.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend=count, dynamic=False)
        pipe.unet(x, torch.tensor(5), cond)
        kinds = len(graphs)  # blocks of different widths
        for t, output in zip(range(5, 1000, 90), expected):
            torch.testing.assert_close(pipe.unet(x, torch.tensor(t), cond).sample, output)
        assert len(graphs) == kinds > 0  # compiled blocks: no other graph for any other t


# -- files


def test_assembled_folder_round_trip(pipe, tmp_path):
    folders = fostered(pipe, tmp_path, [8, 1, 2])
    folder = assembled(pipe, tmp_path / "a", folders, inputs="timestep")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    for path in folders:
        shutil.rmtree(path)  # the folder is self-contained
    experts = load_experts(pipe, moved)
    tensors = load_file(moved / "router.safetensors")
    assert set(tensors) == {key for key, _ in experts._router_entries()} and len(tensors) == len(experts.layers)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.router_E.weight"
    assert torch.equal(experts.layers["text_encoder.encoder.layers.0.self_attn.q_proj"].E, tensors[key])
    assert [bank.n for bank in experts.routing.banks] == [8, 1, 2] and not any(
        p.requires_grad for p in experts.parameters()
    )


def test_moe_round_trip(pipe, tmp_path):
    experts = fill(attach_moe(pipe, 3, 2, rank=2, alpha=5, generator=torch.Generator().manual_seed(0)))
    for k in range(3):
        experts.save_expert(0, tmp_path / f"{k}" / "interval-000.safetensors", bank=k)
    experts.save_router(tmp_path / "router.safetensors", ["0", "1", "2"])
    x, t, _ = plain_inputs()
    with torch.no_grad():
        before = experts.predict(x, t, ["a", "b", "c", "d"])
        experts.unload()
        torch.testing.assert_close(load_experts(pipe, tmp_path).predict(x, t, ["a", "b", "c", "d"]), before)


def header_of(path, **changes):
    facts = tsm_lora.read_facts(path, tsm_lora.ROUTER_FACTS) | changes
    save_file(load_file(path), path, {"tsm": json.dumps(facts)})


def other_experts(folder):
    files = sorted((folder / "n4").iterdir())
    tensors = [load_file(path) for path in files]
    facts = [tsm_lora.read_facts(path) for path in files]
    for path, tensor, fact in zip(files, tensors, facts):
        save_file({k: v + 1 for k, v in tensor.items()}, path, {"tsm": json.dumps(fact)})
    return "not those that its routers were trained with"


def lost_bank(folder):
    shutil.rmtree(folder / "n1")
    return "there is no folder .*n1"


def foreign_keys(folder):
    path = folder / "router.safetensors"
    facts = tsm_lora.read_facts(path, tsm_lora.ROUTER_FACTS)
    tensors = load_file(path)
    tensors["x.router_E.weight"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, path, {"tsm": json.dumps(facts)})
    return "1 tensors are missing.*1 are foreign"


def misshapen(folder):
    path = folder / "router.safetensors"
    facts = tsm_lora.read_facts(path, tsm_lora.ROUTER_FACTS)
    save_file({k: v[:-1].contiguous() for k, v in load_file(path).items()}, path, {"tsm": json.dumps(facts)})
    return "this model needs"


def truncated(folder):
    path = folder / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "truncated"


def headless(folder):
    path = folder / "router.safetensors"
    save_file(load_file(path), path)
    return "no 'tsm' entry"


def other_inputs(folder):
    header_of(folder / "router.safetensors", router={"inputs": "thoughts", "top_k": None})
    return "both, feature or timestep"


@pytest.mark.parametrize(
    "spoil", [other_experts, lost_bank, foreign_keys, misshapen, truncated, headless, other_inputs]
)
def test_bad_assembled_folders_are_refused(pipe, tmp_path, spoil):
    folder = assembled(pipe, tmp_path / "a", fostered(pipe, tmp_path, [4, 1]))
    message = spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_experts(pipe, folder)
    pipe("a", num_inference_steps=1)
    assert "_tsm_experts" not in vars(pipe)


def test_experts_that_do_not_belong_together(pipe, tmp_path):
    folders = fostered(pipe, tmp_path, [4, 1])
    (other,) = fostered(pipe, tmp_path / "other", [2], train_text_encoder=False)
    (foreign,) = fostered(tiny_sd(seed=1), tmp_path / "foreign", [2])
    for folder, word in ((other, "targets"), (foreign, "base_model")):
        with pytest.raises(ValueError, match=f"do not belong together.*{word}"):
            assemble_experts(pipe, folders[0], [folder])
    with pytest.raises(ValueError, match="at least one context"):
        assemble_experts(pipe, folders[0], [])
    with pytest.raises(ValueError, match="need the timestep"):
        assemble_experts(pipe, None, folders, inputs="feature")
    whole = assembled(pipe, tmp_path / "a", folders)
    with pytest.raises(ValueError, match="assembled"):
        assemble_experts(pipe, whole, folders[1:])
    assert "_tsm_experts" not in vars(pipe)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **kwargs or {})

    @property
    def products(self):
        return sum(self.names.count(name) for name in ("mm", "addmm", "bmm", "baddbmm", "convolution"))


@torch.no_grad()
def test_operations_of_sampling(pipe, tmp_path):
    """Folded stage 1 adds no operation to the base's forward; stage 2, folded or not, two products per layer."""
    folders = fostered(pipe, tmp_path, [8, 1, 2, 4], lora_layers=CONV_TARGETS, train_text_encoder=False)
    whole = assembled(pipe, tmp_path / "a", folders)
    forward, x, cond = pipe.unet.forward, torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)

    def count():
        operations = Operations()

        def counted(*args, **kwargs):
            with operations:
                return forward(*args, **kwargs)

        pipe.unet.forward = counted
        pipe.unet(x, torch.tensor(300), cond)
        pipe.unet.forward = forward
        return operations

    base = count()
    experts = load_experts(pipe, folders[0])
    with experts.folded():
        assert count().names == base.names
    unfolded = count()
    layers = len(experts.layers)
    experts.unload()
    experts = load_experts(pipe, whole)
    stage_2 = count()
    with experts.folded():
        folded = count()
    assert unfolded.products == stage_2.products == folded.products == base.products + 2 * layers
