"""FID, Patch-FID and CLIP score: beside clean-fid, on stand-ins for the networks."""

import json
import os
import subprocess
import sys
import tracemalloc

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid.inception_torchscript import InceptionV3W
from conftest import environment, tiny_tokenizer
from PIL import Image
from test_evalcrafter import tiny_text_model
from torch import nn

import coco
import evaluate
import t2i_compbench


def test_frechet_distance():
    zero, eye = np.zeros(3), np.eye(3)
    assert coco.frechet_distance(zero, eye, np.array([1, 2, 2]), 4 * eye) == pytest.approx(12.0, abs=1e-12)
    first, second = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.3], [-0.3, 3]])
    distance = coco.frechet_distance(np.array([0, 1]), first, np.array([1, -1]), second)
    assert distance == pytest.approx(5.929311854967773, abs=1e-12)
    g = np.random.RandomState(0)
    a, b = g.randn(200, 4), g.randn(300, 4) * [1, 2, 0.5, 1.5] + [0.1, -0.2, 0.3, 0]
    distance = coco.frechet_distance(*coco.moments([a]), *coco.moments([b]))
    assert distance == pytest.approx(1.4330159904674726, abs=1e-12)
    assert coco.frechet_distance(*coco.moments([a]), *coco.moments([a])) == pytest.approx(0, abs=1e-12)


def test_moments_in_parts():
    features = np.random.default_rng(0).normal(3, 2, (101, 5)).astype(np.float32)
    mean, cov = coco.moments(np.array_split(features, 7))
    assert mean == pytest.approx(features.astype(float).mean(0), rel=1e-12)
    assert cov == pytest.approx(np.cov(features.astype(float), rowvar=False), rel=1e-10)
    for parts in ([], [features[:1]]):
        with pytest.raises(ValueError, match="needs two pictures or more"):
            coco.moments(parts)


@pytest.mark.parametrize(
    "size, top, left",
    [((400, 301), 1, 50), ((640, 480), 90, 170), ((512, 512), 106, 106), ((427, 640), 170, 64), ((500, 333), 17, 100)],
)
def test_patch(size, top, left):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x % 256, y % 256, (x // 256) * 16 + y // 256], -1).astype(np.uint8)
    patch = np.asarray(coco.patch_picture(Image.fromarray(pixels)))
    assert patch.shape == (299, 299, 3) and (patch == pixels[top : top + 299, left : left + 299]).all()


def test_pictures_of_every_kind():
    for mode in ("L", "RGBA", "P", "RGB"):
        small = Image.new(mode, (200, 120))
        assert coco.fid_picture(small).size == (256, 256) and coco.fid_picture(small).mode == "RGB"
        assert coco.patch_picture(small).size == (200, 120)
        assert coco.clean_resize(coco.fid_picture(small)).shape == (299, 299, 3)


def test_clean_resize_is_not_rounded():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    resized = coco.clean_resize(Image.fromarray(pixels), 40)
    assert resized.dtype == np.float32 and resized.min() >= 0 and resized.max() <= 255
    rounded = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC), float)
    assert 0 < np.abs(resized - rounded).mean() < 1 and (resized % 1 > 0).mean() > 0.5


# -- the command


class Layers(nn.Module):
    """(B, 3, 299, 299) -> (B, features)"""

    def __init__(self, features):
        super().__init__()
        self.project = nn.Linear(3 * 23 * 23, features)

    def forward(self, x):
        return torch.tanh(self.project(nn.functional.avg_pool2d(x, 13).flatten(1)))


class StandIn(nn.Module):
    """What of the TorchScript Inception is used."""

    def __init__(self, features=5):
        super().__init__()
        self.layers = Layers(features)

    def forward(self, x):
        return self.layers(x)


SIZES = [(320, 400), (512, 512), (299, 310), (640, 480), (200, 333), (64, 64)]


@pytest.fixture
def folders(tmp_path):
    """Twelve real pictures of mixed sizes and modes; ten as sample.py writes them; the networks."""
    generator = np.random.default_rng(0)

    def picture(k, size, mode="RGB"):
        pixels = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8) // (1 + k % 3)
        return Image.fromarray(pixels).resize(size).convert(mode)

    (tmp_path / "real" / "inner").mkdir(parents=True)
    for k in range(12):
        path = tmp_path / "real" / ("inner" if k % 2 else ".") / f"{k}.{'jpg' if k % 3 else 'png'}"
        picture(k, SIZES[k % 6], {3: "RGBA", 6: "L", 9: "P"}.get(k, "RGB")).save(path)
    (tmp_path / "fake" / "samples").mkdir(parents=True)
    rows = [{"file_name": f"samples/a run_{k:06d}.png", "text": f"run {k % 3}"} for k in range(10)]
    for k, row in enumerate(rows):
        picture(k + 1, (320, 320)).save(tmp_path / "fake" / row["file_name"])
    (tmp_path / "fake" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(0, (99, 99)).save(tmp_path / "fake" / "grid.png")  # no sample
    save_network(tmp_path / "inception-2015-12-05.pt")
    return tmp_path


def save_network(path, **options):
    torch.manual_seed(0)
    torch.jit.script(StandIn(**options).eval()).save(path)


def flags_of(folder, *flags):
    given = [folder / "fake", "--reference", folder / "real", "--output_dir", folder / "out"]
    given += ["--inception_path", folder / "inception-2015-12-05.pt", *flags]
    return ["coco", *(str(part) for part in given)]


def run(folder, *flags):
    evaluate.evaluate_coco(evaluate.parse_args(flags_of(folder, *flags)))
    return json.loads((folder / "out" / "result.json").read_text())


def theirs(folders, cut, network):
    return cleanfid.fid.compute_fid(
        str(folders / "real"),
        str(folders / "fake" / "samples"),
        mode="clean",
        num_workers=0,
        device=torch.device("cpu"),
        custom_feat_extractor=network,
        custom_image_tranform=lambda pixels: np.asarray(cut(Image.fromarray(pixels))),
        verbose=False,
        use_dataparallel=False,
    )


@pytest.fixture
def clean_fid(monkeypatch):
    def sqrtm(matrix, disp=True, root=scipy.linalg.sqrtm):  # SciPy 1.18 has no `disp`
        return root(matrix), 0.0

    monkeypatch.setattr(cleanfid.fid.linalg, "sqrtm", sqrtm)


def test_fid_equals_clean_fid(folders, clean_fid):
    """The crop is ours, all else is clean-fid's: reading, resizing, statistics and distance."""
    scores = run(folders, "--metrics", "fid", "patch_fid")["scores"]
    network = torch.jit.load(folders / "inception-2015-12-05.pt")
    for metric, cut in {"fid": coco.fid_picture, "patch_fid": coco.patch_picture}.items():
        expected = theirs(folders, cut, lambda pixels: network.layers((pixels - 128) / 128))
        assert scores[metric] == pytest.approx(expected, rel=1e-6) and scores[metric] > 1e-3


def test_inception_of_clean_fid(folders):
    """Our features are those of clean-fid's wrapper of the file, on pictures that clean-fid resized."""
    save_network(folders / "inception-2015-12-05.pt", features=2048)
    wrapper, picture = InceptionV3W(str(folders), download=False), Image.open(folders / "real" / "0.png")
    resized = cleanfid.fid.build_resizer("clean")(np.asarray(coco.fid_picture(picture)))
    expected = wrapper(torch.from_numpy(resized).movedim(-1, 0)[None])[0].detach().numpy()
    features = coco.inception_features(torch.jit.load(folders / "inception-2015-12-05.pt"), coco.fid_picture(picture))
    assert features == pytest.approx(expected, abs=1e-6) and features.std() > 0.01


def test_command(folders, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    model = tiny_text_model(tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folders / "clip")
    flags = ["--metrics", "fid", "clip_score", "--clip_model", folders / "clip", "--paper", "12: PixArt-alpha"]
    result = run(folders, *flags)
    assert "23.1500" in capsys.readouterr().out and result["counts"] == {"fid": 10, "clip_score": 10}
    cosines = []
    for path, text in evaluate.read_samples(folders / "fake"):
        picture = Image.open(path).resize((256, 256), Image.Resampling.LANCZOS)
        cosines.append(t2i_compbench.clip_similarity(model, tokenizer, picture, "A photo depicts " + text))
    assert result["scores"]["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-7)

    # stopped at any picture and started again, with what is stored by then
    calls, measured = [], coco.inception_features

    def stopping(*given):
        if len(calls) in (5, 17):
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append("measured")
        return measured(*given)

    monkeypatch.setattr(coco, "inception_features", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(folders, *flags, "--output_dir", folders / "stopped")
    flags = [*flags, "--output_dir", folders / "stopped"]
    evaluate.evaluate_coco(evaluate.parse_args(flags_of(folders, *flags)))
    again = json.loads((folders / "stopped" / "result.json").read_text())
    assert again == result and calls.count("measured") == 22
    seen, flags = len(calls), flags[:-2]
    again = run(folders, "--reference", folders / "out" / "reference.npz", "--output_dir", folders / "out")
    assert again["scores"]["fid"] == result["scores"]["fid"] and len(calls) == seen


def test_two_processes_measure_the_same(folders):
    one = run(folders)
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", evaluate.__file__]
    argv += flags_of(folders, "--output_dir", folders / "two")
    subprocess.run([sys.executable, *argv], env=environment(), check=True, capture_output=True)
    assert json.loads((folders / "two" / "result.json").read_text())["scores"] == one["scores"]


def test_memory_does_not_grow(tmp_path):
    """3,000 stored features, 24 MB, are read in no more memory than 600."""
    np.save(tmp_path / "one.npy", np.random.default_rng(0).normal(size=2048).astype(np.float32))
    peaks = []
    for count in (600, 3000):
        tracemalloc.start()
        coco.moments(evaluate.stacked([tmp_path / "one.npy"] * count, 128))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]


def test_wrong_input(folders):
    (folders / "single").mkdir()
    Image.new("RGB", (300, 300)).save(folders / "single" / "one.png")
    with pytest.raises(ValueError, match="needs two pictures or more, got 1"):
        run(folders, "--reference", folders / "single", "--output_dir", folders / "one")
    with pytest.raises(ValueError, match="fid needs --reference, val2014 or a reference.npz; got .*nowhere"):
        run(folders, "--reference", folders / "nowhere")
    with pytest.raises(ValueError, match="there is no such file; download https://nvlabs"):
        run(folders, "--inception_path", folders / "none.pt")
    with pytest.raises(ValueError, match="the CLIP score needs captions"):
        evaluate.evaluate_coco(evaluate.parse_args(["coco", str(folders / "real"), "--metrics", "clip_score"]))
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pictures there"):
        run(folders, "--reference", folders / "empty", "--output_dir", folders / "other")
    run(folders, "--output_dir", folders / "out")
    with pytest.raises(ValueError, match="has no patch_fid: measure it on the folder"):
        run(folders, "--reference", folders / "out" / "reference.npz", "--metrics", "patch_fid")
    save_network(folders / "inception.pt", features=6)
    with pytest.raises(ValueError, match="was measured with another network"):
        run(
            *(folders, "--reference", folders / "out" / "reference.npz", "--output_dir", folders / "new"),
            *("--inception_path", folders / "inception.pt"),
        )
    broken = folders / "fake" / "samples" / "a run_000004.png"
    broken.write_bytes(b"no picture")
    os.utime(broken, (1, 1))  # another time also where a file system's are coarse
    with pytest.raises(ValueError, match="000004.png is no picture or is truncated"):
        run(folders)
