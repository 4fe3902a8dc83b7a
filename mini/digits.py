"""A second, real domain: scikit-learn's 1,797 scans of handwritten digits as an ordinary image folder.

    python mini/digits.py mini/data                 # writes mini/data/digits-train and mini/data/digits-validation
    accelerate launch train_foster.py --train_data_dir mini/data/digits-train \
        --validation_data_dir mini/data/digits-validation --output_dir output/digits
    python sample.py --prompts_file mini/prompts/digits.txt --experts output/digits/experts-n8 --output_dir output/seen
    python evaluate.py digits output/seen

The scans (8x8, UCI ML "Optical Recognition of Handwritten Digits", CC BY 4.0) are enlarged to 32x32. The classifier
that scores pictures is trained on scans that neither training nor validation has seen.
"""

import json
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"train": (0, 1000), "validation": (1000, 1256), "classifier": (1256, 1797)}  # in the order of the data set


def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) with values 0..16, and their digits (N,)."""
    data = load_digits()
    return data.images[slice(*SPLITS[split])], data.target[slice(*SPLITS[split])]


def image_folder(split: str, root: str | os.PathLike) -> Path:
    """Write a split as 32x32 pictures with the captions "the digit seven"; reused where it exists."""
    folder = Path(root) / f"digits-{split}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lines = Path(tempfile.mkdtemp(dir=folder.parent)), []
    for k, (scan, digit) in enumerate(zip(*scans(split))):
        picture = Image.fromarray((scan * 255 / 16).astype(np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(partial / f"{k:04d}.png")
        lines.append(json.dumps({"file_name": f"{k:04d}.png", "text": f"the digit {NAMES[digit]}"}))
    (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    os.replace(partial, folder)
    return folder


@lru_cache(maxsize=1)
def classifier() -> SVC:
    images, digits = scans("classifier")
    return SVC(gamma=0.001).fit(images.reshape(len(images), -1), digits)


def score(picture: Image.Image, prompt: str) -> float:
    """1 if the classifier reads the digit that the prompt names, else 0. ValueError if it names none."""
    words = prompt.lower().split()
    if len(set(words) & set(NAMES)) != 1:
        raise ValueError(f"prompt {prompt!r} names no digit; prompts read like 'the digit seven'")
    small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), float) * 16 / 255
    return float(NAMES[classifier().predict(small.reshape(1, -1))[0]] in words)


if __name__ == "__main__":
    for name in ("train", "validation"):
        print(image_folder(name, sys.argv[1]))
