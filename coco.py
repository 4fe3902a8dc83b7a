"""FID, Patch-FID and CLIP score on COCO-2014 (Tables 3, 6 and 12), as DMD2 and GigaGAN measure them: the Frechet
distance, the pictures that Inception sees, and its features.

FID: crop the middle square, LANCZOS to 256, clean-fid's "clean" resize to 299. Patch-FID: the middle 299x299 pixels as
they are.
https://arxiv.org/abs/2405.14867 (DMD2), https://github.com/mingukkang/GigaGAN, https://arxiv.org/abs/2104.11222.
"""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CLIP_PREFIX = "A photo depicts "


class Moments:
    """Mean and covariance of features (d,) that arrive in parts: nothing but sums is held, in float64. (clean-fid's
    float32 mean of 30,000 features is off by some 1e-4 of a small distance.)"""

    def __init__(self, dimension: int):
        self.count, self.sum, self.products = 0, np.zeros(dimension), np.zeros((dimension, dimension))

    def add(self, features: np.ndarray) -> None:
        """(N, d)"""
        features = features.astype(np.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.products += features.T @ features

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and covariance (d, d), with N - 1. ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs two pictures or more, got {self.count}")
        mean = self.sum / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def moments(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of all parts (N, d)."""
    total = None
    for part in parts:
        total = Moments(part.shape[1]) if total is None else total
        total.add(part)
    if total is None:
        raise ValueError("a Frechet distance needs two pictures or more, got 0")
    return total.result()


def frechet_distance(mean: np.ndarray, cov: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). With R R^T = S1, the trace of that root is the sum of the
    roots of R^T S2 R's eigenvalues, all real, which needs no matrix root (SciPy 1.18 took clean-fid's away)."""
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(values.clip(min=0))
    roots = np.sqrt(np.linalg.eigvalsh(root.T @ cov_2 @ root).clip(min=0)).sum()
    return float(((mean - mean_2) ** 2).sum() + np.trace(cov) + np.trace(cov_2) - 2 * roots)


def centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, at torchvision's offsets (half rounds to even)."""
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def fid_picture(image: Image.Image, size: int = 256) -> Image.Image:
    side = min(image.size)
    return centre(image.convert("RGB"), side, side).resize((size, size), Image.Resampling.LANCZOS)


def patch_picture(image: Image.Image, size: int = 299) -> Image.Image:
    """The middle patch; pictures that are smaller on a side stay whole."""
    return centre(image.convert("RGB"), size, size) if min(image.size) >= size else image.convert("RGB")


def clean_resize(image: Image.Image, size: int = 299) -> np.ndarray:
    """clean-fid's resize: bicubic in float32 per channel, antialiased, 0..255 and not rounded: (size, size, 3)."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(np.asarray(image), -1, 0)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, -1).clip(0, 255)


@torch.no_grad()
def inception_features(inception, image: Image.Image) -> np.ndarray:
    """(2048,) float32 of a picture that fid_picture or patch_picture cut. `inception` is the TorchScript file of
    INCEPTION_URL."""
    pixels = torch.from_numpy(clean_resize(image)).movedim(-1, 0)[None].to(next(inception.parameters()).device)
    return inception.layers((pixels - 128) / 128).flatten().cpu().numpy()
