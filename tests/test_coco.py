"""Frechet distance and the pictures that it sees."""

import numpy as np
import pytest
from PIL import Image

import coco


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
