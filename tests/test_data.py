"""data.py: every source gives the same samples; streams split, resume and name corrupt records; the latent cache."""

import csv
import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import assert_identical, tiny_sd
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from test_train_foster import command, run, tensors

import data
import train_foster

ALONE = Accelerator(cpu=True)
FLAGS = ("--interval_indices", 2, "--resolution", 16)


@pytest.fixture(scope="session")
def sources(world, tmp_path_factory):
    """The pictures of the image folder once more as parquet, as shards and with metadata.csv."""
    root = tmp_path_factory.mktemp("sources")
    rows = [json.loads(line) for line in (world / "images" / "metadata.jsonl").read_text().splitlines()]
    pictures = [(world / "images" / row["file_name"]).read_bytes() for row in rows]
    features = Features({"image": ImageFeature(), "text": Value("string"), "reward": Value("float32")})
    columns = {
        "image": [{"bytes": picture, "path": None} for picture in pictures],
        "text": [row["text"] for row in rows],
        "reward": [0.5 + 0.1 * k for k in range(len(rows))],
    }
    (root / "parquet").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(root / "parquet" / "train.parquet")
    shutil.copytree(world / "images", root / "csv")
    (root / "csv" / "metadata.jsonl").unlink()
    with open(root / "csv" / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    write_shards(
        root / "tar", [(f"{k:04d}", picture, row["text"]) for k, (picture, row) in enumerate(zip(pictures, rows))]
    )
    return root


def write_shards(folder, records, per_shard=6):
    folder.mkdir()
    for start in range(0, len(records), per_shard):
        with tarfile.open(folder / f"shard-{start // per_shard:03d}.tar", "w") as shard:
            for key, picture, text in records[start : start + per_shard]:
                for extension, content in (("png", picture), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return folder


def settings(world, *flags):
    return train_foster.parse_args(command(world, "x", "--resolution", "16", *flags))


@pytest.mark.parametrize("kind", ["parquet", "csv", "tar", "hub"])
def test_each_source_gives_the_experts_of_the_image_folder(world, sources, full_run_16, tmp_path, kind):
    flags = {
        "tar": ("--train_data_dir", sources / "tar", "--image_column", "png", "--caption_column", "txt"),
        "hub": ("--dataset_name", str(sources / "parquet")),
    }.get(kind, ("--train_data_dir", sources / kind))
    argv = command(world, tmp_path, *FLAGS, *flags)
    if kind == "hub":
        position = argv.index("--train_data_dir")
        del argv[position : position + 2]
    AcceleratorState._reset_state(True)
    train_foster.main(train_foster.parse_args(argv))
    assert_identical(tensors(tmp_path / "experts-n4", 2), tensors(full_run_16, 2))


@pytest.fixture(scope="session")
def full_run_16(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("full16"), *FLAGS)


def test_reward_weights_the_loss(world, sources):
    args = settings(world, "--reward_column", "reward")
    rows = data.load_rows(sources / "parquet", args)
    sample = data.Pictures(rows, args, (4, 8, 8), augment=True)[7, 0, 2, 5]
    assert sample["weight"].item() == pytest.approx(1.2)
    assert data.Pictures(rows, args, (4, 8, 8), augment=False)[7, 0, 2, 5]["weight"] == 1  # not in validation
    with pytest.raises(ValueError, match="--reward_column nowhere: .* has no such column"):
        data.load_rows(sources / "parquet", settings(world, "--reward_column", "nowhere"))


# -- streams


def stream(world, sources, position=None, accelerator=ALONE, folder="tar", flags=()):
    flags = ("--streaming", "--image_column", "png", "--caption_column", "txt", *flags)
    args = settings(world, "--train_batch_size", "4", *flags)
    rows = data.load_rows(sources / folder, args, streaming=True)
    pictures = data.Pictures(rows, args, (4, 8, 8), augment=True)
    return iter(data.training_loader(pictures, args, 2, 0, accelerator, position))


def read(batches, count):
    got = [next(batches) for _ in range(count)]
    return [caption for batch in got for caption in batch["caption"]], got[-1]["position"]


def test_stream_visits_every_record_once_an_epoch(world, sources):
    captions, position = read(stream(world, sources, flags=("--proportion_empty_prompts", "0")), 11)
    assert sorted(captions[:22]) == sorted(f"thing {k}" for k in range(22)) == sorted(captions[22:])
    assert captions[:22] != captions[22:] and position["epoch"] == 1 and position["records"] == 44


@pytest.mark.parametrize("after, workers", [(1, 0), (3, 0), (5, 2), (6, 0), (9, 2)])
def test_stream_goes_on_at_its_shard_position(world, sources, after, workers):
    whole, _ = read(stream(world, sources), 12)
    flags = ("--dataloader_num_workers", str(workers))
    first, position = read(stream(world, sources, flags=flags), after)
    position = torch.load(io.BytesIO(saved(position)), weights_only=True)
    rest, _ = read(stream(world, sources, position, flags=flags), 12 - after)
    assert first + rest == whole


def saved(position):
    file = io.BytesIO()
    torch.save(position, file)
    return file.getvalue()


def test_streams_of_two_processes_share_the_shards(world, sources):
    captions = []
    for rank in range(2):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank)
        captions += read(stream(world, sources, accelerator=accelerator, flags=("--proportion_empty_prompts", 0)), 2)[
            0
        ]
    assert len(set(captions)) == 16


def test_corrupt_records_stop_or_are_named_counted_and_skipped(world, sources, tmp_path, capsys):
    records = []
    for k in range(22):
        picture = io.BytesIO()
        Image.new("RGB", (20, 20), (k, 0, 0)).save(picture, "png")
        content = picture.getvalue()
        records.append((f"{k:04d}", content[: len(content) // 2] if k in (3, 9) else content, f"thing {k}"))
    write_shards(tmp_path / "broken", records)
    with pytest.raises(ValueError, match=r"(0003|0009).* is no picture or is truncated"):
        read(stream(world, tmp_path, folder="broken"), 5)
    flags = ("--corrupt_records", "skip", "--proportion_empty_prompts", "0")
    captions, position = read(stream(world, tmp_path, folder="broken", flags=flags), 5)
    assert sorted(captions) == sorted(f"thing {k}" for k in range(22) if k not in (3, 9))
    assert position["skipped"] == 2 and position["records"] == 22
    printed = capsys.readouterr().err
    assert "0003" in printed and "0009" in printed and "skipped (2 so far)" in printed


def test_streamed_training_resumes(world, sources, tmp_path):
    flags = ("--train_data_dir", sources / "tar", "--image_column", "png", "--caption_column", "txt", "--streaming")
    flags += ("--validation_data_dir", sources / "tar", *FLAGS, "--checkpointing_steps", 2)
    whole = run(world, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "experts-n4" / "interval-002.safetensors").unlink()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "interval-002" / f"checkpoint-{step}")
    resumed = run(world, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_identical(tensors(resumed, 2), tensors(whole, 2))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--streaming"], "--streaming has no held-out part"),
        (["--streaming", "--cache_latents"], "which --streaming never has"),
        (["--dataset_name", "a/b"], "name two data sets"),
        (["--cache_latents"], "cannot cache random crops"),
    ],
)
def test_wrong_combinations(world, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path, *flags)


# -- the latent cache


def test_cached_latents_equal_fresh_ones(world, tmp_path):
    """The same sample, shuffled, cropped in the centre and flipped."""
    args = settings(world, "--center_crop")
    rows, pipe = data.load_rows(world / "images", args), tiny_sd()
    moments = data.cache_latents(pipe, rows, args, ALONE, tmp_path / "latents.bin")
    assert moments.shape == (22, 2, 2, 4, 8, 8)
    cached, fresh = (data.Pictures(rows, args, (4, 8, 8), True, data.Cache(m)) for m in (moments, None))
    flips = set()
    for key in next(data.training_keys(22, args, 1, 0, ALONE)) + next(data.training_keys(22, args, 1, 3, ALONE)):
        a, b = (torch.utils.data.default_collate([d[key]]) for d in (cached, fresh))
        flips.add(torch.equal(b["pixels"][0], data.Pictures(rows, args, (4, 8, 8), False)[key]["pixels"]))
        assert a["caption"] == b["caption"] and torch.equal(a["u"], b["u"])
        torch.testing.assert_close(data.latents(pipe.vae, a), data.latents(pipe.vae, b), atol=1e-5, rtol=1e-5)
    assert flips == {True, False}


def test_caches_of_something_else_are_made_anew(world, tmp_path, monkeypatch):
    """Another interpolation, another model; and a cache that was cut in the writing does not count as complete."""
    args, pipe, path = settings(world, "--center_crop"), tiny_sd(), tmp_path / "latents.bin"
    rows = data.load_rows(world / "images", args)
    first = data.cache_latents(pipe, rows, args, ALONE, path).clone()
    args.image_interpolation_mode = "nearest"
    assert not torch.allclose(data.cache_latents(pipe, rows, args, ALONE, path), first)
    args.image_interpolation_mode, other = "lanczos", tiny_sd(seed=1)
    other.register_to_config(_name_or_path="other")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "encode", killed)
        data.cache_latents(other, rows, args, ALONE, path)
    assert torch.equal(data.cache_latents(pipe, rows, args, ALONE, path), first)
    text = data.cache_conditions(pipe, rows, args, ALONE, tmp_path / "text")["encoder_hidden_states"].clone()
    assert text.shape == (23, 12, 16) and not torch.equal(text[0], text[1])  # the empty caption is the last
    different = data.cache_conditions(other, rows, args, ALONE, tmp_path / "text")["encoder_hidden_states"]
    assert not torch.allclose(different, text)


def test_training_with_cached_latents(world, tmp_path):
    flags = (*FLAGS, "--center_crop")
    fresh = tensors(run(world, tmp_path / "fresh", *flags), 2)
    cached = tensors(run(world, tmp_path / "cached", *flags, "--cache_latents"), 2)
    for key, value in fresh.items():
        torch.testing.assert_close(cached[key], value, atol=1e-5, rtol=1e-3)
    for path in (tmp_path / "cached" / "experts-n4").glob("*.safetensors"):
        path.unlink()
    before = (tmp_path / "cached" / "latents.bin").stat().st_mtime_ns
    again = run(world, tmp_path / "cached", *flags, "--cache_latents", "--resume_from_checkpoint", "latest")
    assert_identical(tensors(again, 2), cached)
    assert (tmp_path / "cached" / "latents.bin").stat().st_mtime_ns == before  # a complete cache is used again


def test_file_names_do_not_found_splits(world, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(world / "images", folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for k, line in enumerate(lines):
        name = f"{('test', 'train', 'x')[k % 3]}_{line['file_name']}"
        (folder / line["file_name"]).rename(folder / name)
        line["file_name"] = name
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sorted(data.load_rows(folder, settings(world))["text"]) == sorted(line["text"] for line in lines)
