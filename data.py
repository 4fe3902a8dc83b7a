"""Pictures or clips with captions for the training scripts: folders, hub data sets, parquet, web-dataset shards.

All randomness of training is one function of (seed, interval, k), where k = optimiser step * global batch + position
in it: the order of samples, crop, flip, caption drop, t and both noises come from `rng` of that key and from nothing
else. So one expert alone equals that of the full run, a resumed run an uninterrupted one, and two processes one.
(Streamed data is the exception: it goes on at its shard position, but its order depends on the number of processes.)
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import torch
import torchvision.transforms.functional as TF
from datasets import Dataset, Features, IterableDataset, load_dataset
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from datasets.distributed import split_dataset_by_node
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import InterpolationMode
from tqdm.auto import tqdm

import backbones
import tsm_lora

METADATA = ("metadata.jsonl", "metadata.csv")
CLIPS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"}


def rng(*key) -> torch.Generator:
    """A generator of its own for each key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from


def media_column(args) -> str:
    return args.video_column if args.video else args.image_column


def load_rows(source: str | os.PathLike, args, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows with an undecoded image or clip {path, bytes}, a caption and perhaps a reward.

    `source` is --dataset_name or a folder: of pictures or clips with metadata, of clips with a table as OpenVid-1M's
    (a .csv whose --video_column names files), of .tar shards or of .parquet files. ValueError for what cannot be
    trained on: no such folder or column, metadata that cannot be read, a missing file.
    """
    folder = Path(source)
    if source == args.dataset_name and not folder.exists():
        rows = load_dataset(source, args.dataset_config_name, split="train", streaming=streaming)
    elif not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a folder with a metadata.jsonl, or --dataset_name")
    elif files := sorted(map(str, folder.glob("*.tar"))):
        rows = load_dataset("webdataset", data_files=files, split="train", streaming=streaming)
    elif files := sorted(map(str, folder.rglob("*.parquet"))):
        rows = load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    elif args.video and (tables := sorted(p for p in folder.glob("*.csv") if p.name not in METADATA)):
        rows = load_dataset("csv", data_files=list(map(str, tables)), split="train")
        if (name := args.video_column) in rows.column_names:
            rows = rows.map(
                lambda row: {name: {"path": str(folder / row[name]), "bytes": None}},
                features=Features(rows.features | {name: VideoFeature()}),
                new_fingerprint=check_files(rows, name, folder),
            )
        rows = rows.to_iterable_dataset(min(64, len(rows))) if streaming else rows
    else:
        check_metadata(folder, CLIPS if args.video else None)
        # all files are one split, whatever they are called: "test_01.png" would found another
        kind, files = "videofolder" if args.video else "imagefolder", {"train": "**"}
        rows = load_dataset(kind, data_dir=str(folder), data_files=files, split="train", streaming=streaming)
    wanted = {"video_column" if args.video else "image_column": media_column(args)}
    wanted |= {"caption_column": args.caption_column}
    wanted |= {"reward_column": args.reward_column} if args.reward_column else {}
    for flag, column in wanted.items():
        if column not in rows.column_names:
            raise ValueError(
                f"--{flag} {column}: {source} has no such column, only {rows.column_names}. In a folder they stand in "
                'metadata.jsonl, lines like {"file_name": "0001.png", "text": "a red circle"}'
            )
    columns = [*wanted.values(), *(name for name in ("__key__", "__url__") if name in rows.column_names)]
    feature = VideoFeature(decode=False) if args.video else ImageFeature(decode=False)
    return rows.select_columns(columns).cast_column(media_column(args), feature)


def check_files(rows: Dataset, column: str, folder: Path) -> str:
    """A digest of the table and its files' sizes and times. ValueError for a row whose clip is missing."""
    digest = hashlib.blake2b(rows._fingerprint.encode(), digest_size=8)
    for number, name in enumerate(rows[column]):
        if not (path := folder / str(name)).is_file():
            raise ValueError(f"row {number} of the table in {folder}: there is no clip {path}")
        digest.update(repr((name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    return digest.hexdigest()


def check_metadata(folder: Path, extensions: set[str] | None) -> None:
    """ValueError for a metadata line that cannot be read or whose file is missing, and for a folder without any."""
    for metadata in (path for name in METADATA for path in folder.rglob(name)):
        with open(metadata, newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file) if metadata.suffix == ".csv" else file
            for number, line in enumerate(lines, 2 if metadata.suffix == ".csv" else 1):
                try:
                    name = (line if isinstance(line, dict) else json.loads(line))["file_name"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f'{metadata}, line {number}: need {{"file_name": ..., "text": ...}}') from error
                if not (metadata.parent / name).is_file():
                    raise ValueError(f"{metadata}, line {number}: there is no file {metadata.parent / name}")
    Image.init()
    if not any(path.suffix.lower() in (extensions or Image.EXTENSION) for path in folder.rglob("*")):
        raise ValueError(f"{folder} holds no {'clip' if extensions else 'picture'}")


def split_rows(args) -> tuple[Dataset | IterableDataset, Dataset, str]:
    """Training rows, validation rows, and where the latter come from."""
    source, validation_dir = args.dataset_name or args.train_data_dir, args.validation_data_dir
    if source is None:
        from mini import clips, world

        folder = clips.clip_folder if args.video else world.image_folder
        source = args.train_data_dir = os.path.relpath(folder("target", "train"))
        validation_dir = args.validation_data_dir = validation_dir or os.path.relpath(folder("target", "validation"))
    if args.streaming and validation_dir is None:
        raise ValueError("--streaming has no held-out part: give --validation_data_dir, an image folder")
    train = load_rows(source, args, args.streaming)
    if validation_dir is not None:
        validation, origin = load_rows(validation_dir, args), str(validation_dir)
    else:
        held_out = min(args.max_validation_samples, max(2, len(train) // 10))
        order = torch.randperm(len(train), generator=rng("held out")).tolist()
        validation, train = train.select(order[:held_out]), train.select(sorted(order[held_out:]))
        origin = f"{held_out} samples held out of {source}"
    if args.max_train_samples:
        train = train.take(args.max_train_samples)
    if len(validation) < 2 or (not args.streaming and not len(train)):
        raise ValueError(f"{source} is too small: validation takes two samples, training needs the rest")
    return train, validation.take(min(len(validation), args.max_validation_samples)), origin


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of them


class Pictures(torch.utils.data.Dataset):
    """Pictures or clips with all that is random about their use. Keys are (index, *name of a generator)."""

    def __init__(self, rows, args, latent_shape: tuple[int, ...], augment: bool, cache: "Cache | None" = None):
        self.rows, self.args, self.latent_shape, self.augment = rows, args, latent_shape, augment
        self.cache = cache or Cache()

    def __getitem__(self, key: tuple) -> dict:
        index, *name = key
        return self.sample(self.rows[index], index, name)

    def sample(self, row: dict, index: int, name: list) -> dict:
        generator = rng(*name)
        u, *rest = torch.rand(5, generator=generator)
        drop, flip, top, left = (value.item() for value in rest)
        noise, vae_noise = torch.randn(2, *self.latent_shape, generator=generator)  # (c[, F], h, w) each
        moving = self.args.video and self.augment and not self.args.center_crop
        start = torch.rand((), generator=generator).item() if moving else 0.5
        flip = self.augment and self.args.random_flip and flip < 0.5
        caption = row[self.args.caption_column]
        if not isinstance(caption, str):
            raise ValueError(f"{name_of(row, index)} has the caption {caption!r}; each picture needs a text")
        if self.augment and drop < self.args.proportion_empty_prompts:
            caption = ""
        weight = torch.tensor(row[self.args.reward_column] if self.augment and self.args.reward_column else 1.0)
        sample = {"caption": caption, "weight": weight, "u": u, "noise": noise, "vae_noise": vae_noise}
        if self.cache.conditions is not None:  # the last row is the empty caption
            row_number = index if caption else -1
            sample["conditions"] = {name: store[row_number] for name, store in self.cache.conditions.items()}
        if self.cache.moments is not None:
            return sample | {"moments": self.cache.moments[index, int(flip)]}
        return sample | {"pixels": self.pixels(row, index, flip, top, left, start)}

    def open(self, row: dict, index: int, start: float) -> list[Image.Image]:
        """The one picture, or the frames of a clip."""
        cell, name = row[media_column(self.args)], name_of(row, index)
        return open_clip(cell, name, self.args, start) if self.args.video else [open_picture(cell, name)]

    def pixels(self, row: dict, index: int, flip: bool, top: float = 0.5, left: float = 0.5, start: float = 0.5):
        """([F,] 3, height, width) in [-1, 1]: resized until it covers the size, then a crop in the centre or at
        random, the same in all frames."""
        height, width = size_of(self.args)
        images = self.open(row, index, start)
        w, h = images[0].size
        size = (height, max(width, w * height // h)) if height * w >= width * h else (h * width // w, width)
        images = [TF.resize(image, size, InterpolationMode(self.args.image_interpolation_mode)) for image in images]
        room_y, room_x = size[0] - height, size[1] - width
        if self.augment and not self.args.center_crop:
            x, y = int(left * (room_x + 1)), int(top * (room_y + 1))
        else:
            x, y = room_x // 2, room_y // 2
        images = [TF.crop(image, y, x, height, width) for image in images]
        pixels = torch.stack([TF.to_tensor(TF.hflip(image) if flip else image) for image in images]) * 2 - 1
        return pixels if self.args.video else pixels[0]

    def cacheable_pixels(self, row: dict, index: int, flip: bool) -> torch.Tensor:
        (w, h), (height, width) = self.open(row, index, 0.5)[0].size, size_of(self.args)
        if self.args.video and not self.args.center_crop:
            raise ValueError("--cache_latents cannot cache random parts of clips: add --center_crop for their middle")
        if w * height != h * width and not self.args.center_crop:
            raise ValueError(
                f"--cache_latents cannot cache random crops, and {name_of(row, index)} is {w}x{h}: add --center_crop "
                "or give pictures of the training size's shape"
            )
        return self.pixels(row, index, flip)


def name_of(row: dict, index: int) -> str:
    return f"record {row['__key__']} of {row['__url__']}" if "__key__" in row else f"item {index}"


def size_of(args) -> tuple[int, int]:
    """Height and width in pixels."""
    return args.height or args.resolution, args.width or args.resolution


def open_picture(cell: dict, name: str) -> Image.Image:
    name = cell["path"] or name
    try:
        source = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        return ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"{name} is no picture or is truncated ({error}); replace or remove it") from error


def upright(frame: av.VideoFrame) -> Image.Image:
    """As players show it: phones film sideways and note by how much to turn, counterclockwise in degrees."""
    return frame.to_image().rotate(frame.rotation, expand=True) if frame.rotation else frame.to_image()


def open_clip(cell: dict, name: str, args, start: float, total: int | None = None) -> list[Image.Image]:
    """--max_num_frames frames, every --frame_stride-th, or so many that --fps of them pass in a second; `start` in
    [0, 1] places them within the clip of `total` frames, which it states itself."""
    name, pictures = cell["path"] or name, []
    try:
        with av.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            if args.fps and rate < 0.99 * args.fps:
                raise ValueError(f"{name} has {rate:g} frames per second, fewer than --fps {args.fps:g} asks for")
            stride = rate / args.fps if args.fps else args.frame_stride
            total = total or stream.frames or sum(1 for _ in container.decode(stream))
            needed = int((args.max_num_frames - 1) * stride) + 1
            if total < needed:
                raise ValueError(
                    f"{name} has {total} frames, {needed} are needed for --max_num_frames {args.max_num_frames}: drop "
                    "the clip, or ask for fewer frames or a smaller stride"
                )
            first = min(int(start * (total - needed + 1)), total - needed)
            wanted = [first + int(k * stride) for k in range(args.max_num_frames)]
            container.seek(0)
            count = 0
            for count, frame in enumerate(container.decode(stream), 1):
                pictures += [upright(frame)] * (count - 1 in wanted)
                if count > wanted[-1]:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{name} is no clip or is truncated ({error}); replace or remove it") from error
    if len(pictures) < args.max_num_frames:  # a cut clip may state more frames than it shows
        return open_clip(cell, name, args, start, count)
    return pictures


def write_clip(frames: list[Image.Image], path: Path, fps: float) -> None:
    """An .mp4 of H.264. Small clips are written without loss: half the colour resolution would blur their objects."""
    small = frames[0].width <= 64
    with av.open(str(path), "w", format="mp4") as container:
        options = {"qp": "0"} if small else {"crf": "14"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv444p" if small else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def read_clip(path: Path) -> list[Image.Image]:
    """All frames. ValueError for a file that is no clip."""
    try:
        with av.open(str(path)) as container:
            return [upright(frame) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path} is no clip or is truncated ({error}); make it again") from error


def film_strip(frames: list[Image.Image], count: int = 4) -> Image.Image:
    """So many frames of a clip, the first and the last among them, side by side."""
    count = min(count, len(frames))
    picked = [frames[k * (len(frames) - 1) // max(1, count - 1)] for k in range(count)]
    return make_image_grid(picked, rows=1, cols=count)


def training_keys(n_rows: int, args, interval: int, first_step: int, accelerator) -> Iterator[list]:
    """Keys of this process's batches from an optimiser step on: a fresh permutation of the rows per epoch."""
    batch, accumulate, processes = args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    epoch, order = -1, None
    for micro_step in range(first_step * accumulate, args.max_train_steps * accumulate):
        start = (micro_step * processes + accelerator.process_index) * batch
        keys = []
        for k in range(start, start + batch):
            if k // n_rows != epoch:
                epoch = k // n_rows
                order = torch.randperm(n_rows, generator=rng(args.seed, interval, "epoch", epoch))
            keys.append((int(order[k % n_rows]), args.seed, interval, k))
        yield keys


class Stream(torch.utils.data.IterableDataset):
    """Batches of streamed rows, each with the position after it under "position": {epoch, records, skipped, rows}.

    Shards are split over the processes and read in turn, in an order of their own per epoch. The position names the
    next record of each open shard, so that a resumed run reads on where it stopped.
    """

    def __init__(self, pictures: Pictures, args, interval: int, accelerator, position: dict | None):
        self.pictures, self.args, self.interval = pictures, args, interval
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.position = position or {"epoch": 0, "records": 0, "skipped": 0, "rows": None}

    def __iter__(self) -> Iterator[dict]:
        position, ready = dict(self.position), []
        with ThreadPoolExecutor(self.args.dataloader_num_workers or 1) as pool:
            while True:
                read_before = position["records"]
                seed = rng(self.args.seed, self.interval, "epoch", position["epoch"]).initial_seed() % 2**32
                # a buffer of one: samples keep their order within a shard, or the position would be lost with them
                rows = self.pictures.rows.shuffle(seed=seed, buffer_size=1)
                rows = split_dataset_by_node(rows, self.rank, self.processes)
                if position["rows"] is not None:
                    rows.load_state_dict(position["rows"])
                iterator = iter(rows)
                while records := list(islice(iterator, self.args.train_batch_size - len(ready))):
                    numbers = range(position["records"], position["records"] + len(records))
                    samples = list(pool.map(self.sample_or_error, records, numbers))
                    position["records"] += len(records)
                    for error in (s for s in samples if isinstance(s, ValueError)):
                        if self.args.corrupt_records == "stop":
                            raise error
                        position["skipped"] += 1
                        print(f"skipped ({position['skipped']} so far): {error}", file=sys.stderr)
                    ready += [s for s in samples if not isinstance(s, ValueError)]
                    position["rows"] = rows.state_dict()
                    if len(ready) == self.args.train_batch_size:
                        yield default_collate(ready) | {"position": dict(position)}
                        ready = []
                if position["records"] == read_before and position["rows"] is None:
                    raise ValueError("the streamed data set gives this process no record: it needs one shard or more")
                position |= {"epoch": position["epoch"] + 1, "rows": None}

    def sample_or_error(self, row: dict, number: int) -> dict | ValueError:
        try:
            return self.pictures.sample(row, number, (self.args.seed, self.interval, "stream", self.rank, number))
        except ValueError as error:
            return error


def loader(dataset: Pictures, keys, args) -> DataLoader:
    workers, pin = args.dataloader_num_workers, torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, pin_memory=pin)


def training_loader(
    pictures: Pictures, args, interval: int, step: int, accelerator, position: dict | None
) -> DataLoader:
    """This process's batches from an optimiser step (or stream position) on."""
    if args.streaming:
        stream = Stream(pictures, args, interval, accelerator, position)
        return DataLoader(stream, batch_size=None, num_workers=min(1, args.dataloader_num_workers))
    return loader(pictures, training_keys(len(pictures.rows), args, interval, step, accelerator), args)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def latent_shape(pipe, args) -> tuple[int, ...]:
    """(c, h, w), of clips (c, F, h, w)."""
    frames = (args.max_num_frames,) if args.video else ()
    return pipe.vae.config.latent_channels, *frames, *(side // pipe.vae_scale_factor for side in size_of(args))


@torch.no_grad()
def encode(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the latents of pixels (B[, F], 3, H, W): (B, 2, c[, F], h, w)."""
    posterior = vae.encode(pixels.flatten(0, -4).to(vae.device, vae.dtype)).latent_dist
    moments = torch.stack([posterior.mean, posterior.std], 1)
    if pixels.ndim == 4:
        return moments
    return moments.unflatten(0, pixels.shape[:2]).permute(0, 2, 3, 1, 4, 5)  # (B, 2, c, F, h, w)


def latents(vae, batch: dict) -> torch.Tensor:
    """A sample x0 (B, c[, F], h, w) of the scaled latents of a batch, cached or encoded now."""
    moments = batch["moments"] if "moments" in batch else encode(vae, batch["pixels"])
    x0 = moments[:, 0] + moments[:, 1] * batch["vae_noise"]
    return (x0 - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


# ---------------------------------------------------------------------------------------------------------------------
# Caches: files mapped into memory, of which the system keeps as much in memory as fits


@dataclass
class Cache:
    """What was computed for rows of data once: moments of latents (N, 1 or 2 flips, 2, c, h, w), and the denoiser's
    text conditions by name, (N + 1, ...) with the empty caption last."""

    moments: torch.Tensor | None = None
    conditions: dict[str, torch.Tensor] | None = None


def build_caches(pipe, train: Dataset, validation: Dataset, args, accelerator) -> dict[str, Cache]:
    """The caches that the flags ask for. Text encoders whose output is cached leave the memory. ValueError where a
    random crop would need fresh latents."""
    out, caches = Path(args.output_dir), {"train": Cache(), "validation": Cache()}
    if args.cache_latents:
        caches["train"].moments = cache_latents(pipe, train, args, accelerator, out / "latents.bin")
    if args.cache_text_embeddings:
        for name, rows in (("train", train), ("validation", validation)):
            caches[name].conditions = cache_conditions(pipe, rows, args, accelerator, out / f"text-{name}")
        for text_encoder in backbones.text_encoders(pipe).values():
            text_encoder.to("meta")
    return caches


def mapped_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, accelerator) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def origin(pipe, rows: Dataset, args) -> str:
    model = f"{tsm_lora.base_name(pipe)} {args.revision} {args.variant} {args.without_t5} {args.load_in_4bit}"
    return f"{rows._fingerprint} {model}"


def complete(done: Path, state: str, accelerator) -> bool:
    """Whether the files beside `done` are finished and made from this; else `done` goes before any is written."""
    ready = done.exists() and done.read_text() == state
    accelerator.wait_for_everyone()  # all have read it
    if not ready and accelerator.is_main_process:
        done.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return ready


@torch.no_grad()
def cache_latents(pipe, rows: Dataset, args, accelerator, path: Path) -> torch.Tensor:
    """Moments of every picture. The processes share the work, and a complete file is used again."""
    shape = (len(rows), 2 if args.random_flip else 1, 2, *latent_shape(pipe, args))
    pictures, done = Pictures(rows, args, shape[3:], augment=False), path.with_suffix(".done")
    store = mapped_file(path, shape, torch.float32, accelerator)
    state = f"{shape} {args.center_crop} {args.image_interpolation_mode} {origin(pipe, rows, args)}"
    state += f" {args.fps} {args.frame_stride}" if args.video else ""
    if complete(done, state, accelerator):
        return store
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    for start in tqdm(range(0, len(mine), 16), desc="latents", disable=not accelerator.is_local_main_process):
        chunk = mine[start : start + 16]
        pixels = [pictures.cacheable_pixels(rows[k], k, bool(flip)) for k in chunk for flip in range(shape[1])]
        store[chunk] = encode(pipe.vae, torch.stack(pixels)).view(len(chunk), *shape[1:]).cpu()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done.write_text(state)
    return store


@torch.no_grad()
def cache_conditions(pipe, rows: Dataset, args, accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """Text conditions of every caption. The processes share the work, and complete files are used again."""
    backbone = backbones.backbone_of(pipe)

    def conditions(captions: list[str]) -> dict[str, torch.Tensor]:
        return {k: v.cpu() for k, v in backbone.conditions(backbone.encode(pipe, captions)).items()}

    captions, empty = rows[args.caption_column], conditions([""])
    stores = {
        name: mapped_file(folder / f"{name}.bin", (len(rows) + 1, *v.shape[1:]), v.dtype, accelerator)
        for name, v in empty.items()
    }
    state = f"{[(k, v.shape, v.dtype) for k, v in stores.items()]} {origin(pipe, rows, args)}"
    if complete(done := folder / "done", state, accelerator):
        return stores
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    for start in tqdm(range(0, len(mine), 16), desc="captions", disable=not accelerator.is_local_main_process):
        chunk = mine[start : start + 16]
        for name, value in conditions([captions[k] for k in chunk]).items():
            stores[name][chunk] = value
    for name, value in empty.items():
        stores[name][-1] = value[0]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done.write_text(state)
    return stores
