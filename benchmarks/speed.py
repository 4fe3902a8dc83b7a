"""Time and memory of training steps and of sampling, ours beside PEFT's and the base's, alternating in one run.

    python benchmarks/speed.py --output_file benchmarks/results/speed_mini_cpu.json
    python benchmarks/speed.py --model sd15 --output_file benchmarks/results/speed_sd15_cpu.json
    python benchmarks/speed.py --model sd15 --latent_size 64 --device cuda --dtype bf16 --compile \\
        --output_file benchmarks/results/speed_sd15_gpu.json

`sd15` is a UNet of SD1.5's size with random weights. A training step is forward, backward and AdamW at a t per row
(in fostering: of one interval); "floor" is the frozen base, which returns a gradient to its input alone. A sampling
unit is three denoiser calls without gradient, then the next interval: one swap of experts per three calls, as in 25
steps over eight intervals. Every round times each variant once, in a random order; a ratio is the median over the
rounds of variant / peer of the same round, with a 95 % bootstrap interval. Products and operations are counted by a
dispatch mode.
"""

import argparse
import copy
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import backbones  # noqa: E402
import tsm_lora  # noqa: E402

RANK = 4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mini", "sd15"], default="mini")
    parser.add_argument("--parts", nargs="+", choices=["train", "sample"], default=["train", "sample"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_size", type=int, help="32 (mini) or 2 (sd15) if not given")
    parser.add_argument("--latent_size", type=int, help="8 (mini) or 16 (sd15) if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base weights")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks of every variant")
    parser.add_argument("--output_file", default="output/speed.json")
    args = parser.parse_args(argv)
    small = args.model == "mini"
    args.batch_size = args.batch_size or (32 if small else 2)
    args.latent_size = args.latent_size or (8 if small else 16)
    return args


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions, and all operations."""

    def __init__(self):
        super().__init__()
        self.products = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.products += func._schema.name.split("::")[1] in PRODUCTS
        return func(*args, **kwargs or {})


def build_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    if args.model == "mini":
        return UNet2DConditionModel.from_pretrained(ROOT / "mini/sd15/unet", dtype=torch.float32)
    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=args.latent_size)


def pipeline(unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ROOT / "mini/sd15", unet=unet, dtype=torch.float32)


def twin(unet, args, share: bool = True):
    """A model of its own modules that shares the weights, or has its own; compiled blocks are lost in copying."""
    own = copy.deepcopy(unet, memo={id(p): p for p in unet.parameters()} if share else None)
    if args.compile:
        own.compile_repeated_blocks()
    return own


def save_experts(pipe, root: Path, n: int) -> Path:
    experts = tsm_lora.attach_experts(pipe, n, rank=RANK, train_text_encoder=False)
    for layer in experts.layers.values():
        torch.nn.init.normal_(layer.B, std=0.01)
    for i in range(n):
        experts.save_expert(i, root / f"n{n}" / f"interval-{i:03d}.safetensors")
    experts.unload()
    return root / f"n{n}"


def save_assembled(pipe, root: Path, folders: list[Path], name: str) -> Path:
    experts = tsm_lora.assemble_experts(pipe, folders[0], folders[1:])
    for parameter in experts.router_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (root / name).mkdir()
    for folder in folders:
        (root / name / folder.name).symlink_to(folder)
    experts.save_router(root / name / tsm_lora.ROUTER_FILE, [folder.name for folder in folders])
    experts.unload()
    return root / name


def peft_model(unet, adapters: int):
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(backbones.ATTENTION))
    model = get_peft_model(unet, config, adapter_name="0")
    for k in range(1, adapters):
        model.add_adapter(str(k), config)
    model.set_adapter("0")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def training_variants(unet, args, root: Path, stack: ExitStack) -> dict:
    """name: (step, peer)."""
    shape = (args.batch_size, unet.config.in_channels, args.latent_size, args.latent_size)
    x = torch.randn(shape, device=args.device, dtype=DTYPES[args.dtype])
    cond = torch.randn(args.batch_size, 77, unet.config.cross_attention_dim, device=args.device, dtype=x.dtype)
    one_interval = torch.randint(0, 15, (args.batch_size,), device=args.device)  # also one of 64
    all_t = torch.randint(0, tsm_lora.T, (args.batch_size,), device=args.device)

    def step(model, parameters, t):
        optimizer = torch.optim.AdamW(parameters, fused=True) if parameters else None

        def run():
            inputs = x if parameters else x.clone().requires_grad_(True)
            model(inputs, t, encoder_hidden_states=cond, return_dict=False)[0].float().square().mean().backward()
            if parameters:
                optimizer.step()
                optimizer.zero_grad()

        return run

    unet.requires_grad_(False)
    variants = {"floor: frozen base": (step(twin(unet, args), [], all_t), "PEFT LoRA")}
    peft = peft_model(twin(unet, args), 1)
    variants["PEFT LoRA"] = step(peft, [p for p in peft.parameters() if p.requires_grad], all_t), "floor: frozen base"
    for n in (1, 8, 64):
        experts = tsm_lora.attach_experts(pipeline(twin(unet, args)), n, [0], rank=RANK, train_text_encoder=False)
        variants[f"stage 1, n = {n}"] = step(experts.pipe.unet, experts.parameters(), one_interval), "PEFT LoRA"
    for contexts in ((1,), (1, 2, 4)):
        folders = [save_experts(pipeline(twin(unet, args)), root / str(contexts), n) for n in (8, *contexts)]
        experts = tsm_lora.assemble_experts(pipeline(twin(unet, args)), folders[0], folders[1:])
        name = f"stage 2, core 8, contexts {', '.join(map(str, contexts))}"
        variants[name] = step(experts.pipe.unet, experts.router_parameters(), all_t), "PEFT LoRA"
    return variants


def sampling_variants(unet, args, root: Path, stack: ExitStack) -> dict:
    shape = (args.batch_size, unet.config.in_channels, args.latent_size, args.latent_size)
    dtype = DTYPES[args.dtype]
    x = torch.randn(shape, device=args.device, dtype=dtype)
    cond = torch.randn(args.batch_size, 77, unet.config.cross_attention_dim, device=args.device, dtype=dtype)
    schedule = torch.tensor([[125 * i + 110, 125 * i + 70, 125 * i + 30] for i in range(8)], device=args.device)

    def unit(model, switch=None):
        interval = iter(range(10**9))

        @torch.no_grad()
        def run():
            i = next(interval) % 8
            if switch is not None:
                switch(i)
            for t in schedule[i]:
                model(x, t, encoder_hidden_states=cond, return_dict=False)

        return run

    unet.requires_grad_(False)
    one = save_experts(pipeline(twin(unet, args)), root, 1)
    core = save_experts(pipeline(twin(unet, args)), root, 8)
    two, four = (save_experts(pipeline(twin(unet, args)), root, n) for n in (2, 4))
    assembled = {
        "contexts 1": save_assembled(pipeline(twin(unet, args)), root, [core, one], "a"),
        "contexts 1, 2, 4": save_assembled(pipeline(twin(unet, args)), root, [core, one, two, four], "b"),
    }

    def loaded(folder, fold=False):
        own = pipeline(twin(unet, args, share=not fold))  # folding writes into the weights
        experts = tsm_lora.load_experts(own, folder)
        if fold:
            stack.enter_context(experts.folded())
        return unit(own.unet)

    peft = peft_model(twin(unet, args), 1).to(dtype)
    switching = peft_model(twin(unet, args), 8).to(dtype)
    variants = {"base": (unit(twin(unet, args)), "PEFT unmerged"), "PEFT unmerged": (unit(peft), "base")}
    variants["PEFT switching adapters"] = unit(switching, lambda i: switching.set_adapter(str(i))), "base"
    variants["stage 1 unfolded"] = loaded(core), "base"
    foldable = dtype == torch.float32
    if foldable:
        variants["stage 1 folded"] = loaded(core, fold=True), "base"
    for name, folder in assembled.items():
        variants[f"stage 2 {name}"] = loaded(folder), "base"
        if foldable:
            variants[f"stage 2 {name}, core folded"] = loaded(folder, fold=True), "base"
    return variants


def interval_of_median(values: list[float]) -> list[float]:
    """95 % percentile bootstrap of the median."""
    numbers = random.Random(0)
    medians = sorted(median(numbers.choices(values, k=len(values))) for _ in range(2000))
    return [medians[49], medians[1950]]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(variants: dict, rounds: int, device: str) -> list[dict]:
    def synchronize():
        if device != "cpu":
            torch.cuda.synchronize()

    rows = {}
    for name, (run, peer) in variants.items():
        run()  # warm-up, and compilation
        with Products() as count:
            run()
        rows[name] = {"name": name, "peer": peer, "products": count.products, "operations": count.operations}
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            run()
            rows[name]["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    times = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            synchronize()
            start = time.perf_counter()
            variants[name][0]()
            synchronize()
            times[name].append(time.perf_counter() - start)
        print(".", end="", flush=True)
    print()
    for name, row in rows.items():
        row["seconds"] = median(times[name])
        for peer in {row["peer"], "base", "PEFT LoRA"} & set(times) - {name}:
            ratios = [a / b for a, b in zip(times[name], times[peer])]
            row[f"ratio to {peer}"] = {"median": median(ratios), "interval_95": interval_of_median(ratios)}
    return list(rows.values())


def main(args: argparse.Namespace) -> None:
    machine = {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "arch": platform.machine()}
    machine |= {"torch": torch.__version__, "device": args.device}
    if args.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name()
    result = {"command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]), "machine": machine}
    result["settings"] = {k: v for k, v in vars(args).items() if k != "output_file"}
    random.seed(0)
    for part in args.parts:
        unet = build_unet(args).eval().to(args.device, DTYPES[args.dtype])
        with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
            make = training_variants if part == "train" else sampling_variants
            result[part] = measure(make(unet, args, Path(root), stack), args.rounds, args.device)
        print(f"\n{part}: median seconds, products, ratio [95 %]")
        for row in result[part]:
            ratio = next((row[k] for k in row if k.startswith("ratio to " + row["peer"])), None)
            low, high = ratio["interval_95"]
            text = f"{ratio['median']:.3f} [{low:.3f}, {high:.3f}] of {row['peer']}"
            print(f"{row['name']:40s} {row['seconds']:8.4f} {row['products']:6d}  {text}")
        result["peak_process_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
