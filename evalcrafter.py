"""EvalCrafter's scores of Tables 2 and 5: IS, Action, Amplitude, BLIP-BLEU, Color and Count of generated clips.

The rules of https://github.com/evalcrafter/EvalCrafter (https://arxiv.org/abs/2310.11440), without the networks that
feed them. Where a rule has a plain defect, the official one keeps its name and `corrected=True` gives ours. All scores
lie in 0..1 but IS; the paper prints them times 100.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Inception score


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation over `splits` contiguous parts of exp(mean KL(p || mean p)).

    probabilities: (frames, classes), the frames of each clip together. A probability of exactly 0 gives nan, as there.
    """
    scores = []
    for i in range(splits):
        part = probabilities[i * len(probabilities) // splits : (i + 1) * len(probabilities) // splits]
        divergence = (part * (part.log() - part.mean(0, keepdim=True).log())).sum(1).mean()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std().item() if splits > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Action


def action_frames(total: int) -> np.ndarray:
    """Frames of the 5 clips that the classifier sees, (5, 16): every fourth one, over again where a clip is short."""
    starts = np.round(np.arange(5) * max(total - 61, 0) / 4).astype(int)
    return (starts[:, None] + 4 * np.arange(16)) % total


def action_score(probabilities: Sequence[float], similarities: Sequence[float]) -> float:
    """Sum over the five likeliest of 400 actions of probability times the similarity of their names to the demanded
    one."""
    best = np.argsort(np.asarray(probabilities, float))[::-1][:5]
    return float(sum(probabilities[k] * similarities[k] for k in best))


# ---------------------------------------------------------------------------------------------------------------------
# Amplitude


def flow_padding(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) to multiples of 8, centred."""
    down, across = -height % 8, -width % 8
    return across // 2, across - across // 2, down // 2, down - down // 2


def amplitude(mean_flows: Sequence[float]) -> str:
    """`large` or `slow`, of the mean length of the optical flow between consecutive frames, in pixels."""
    return "large" if float(np.mean(mean_flows)) > 5 else "slow"


# ---------------------------------------------------------------------------------------------------------------------
# BLIP-BLEU


def caption_frames(total: int) -> np.ndarray:
    """The five frames that are captioned."""
    return np.floor(np.linspace(0, total - 1, 5)).astype(int)


def bleu(reference: str, candidate: str, order: int = 4) -> list[float]:
    """BLEU-1 .. BLEU-`order` of one sentence by pycocoevalcap's rules: words as they stand, clipped counts,
    (c + 1e-15) / (g + 1e-9), and the brevity penalty."""
    words, wanted = candidate.split(), reference.split()
    product, scores = 1.0, []
    for n in range(1, order + 1):
        grams, known = (Counter(tuple(w[k : k + n]) for k in range(len(w) - n + 1)) for w in (words, wanted))
        product *= ((grams & known).total() + 1e-15) / (max(0, len(words) - n + 1) + 1e-9)
        scores.append(product ** (1 / n))
    ratio = (len(words) + 1e-15) / (len(wanted) + 1e-9)
    return [score * math.exp(1 - 1 / ratio) if ratio < 1 else score for score in scores]


def blip_bleu(prompt: str, captions: Sequence[str]) -> float:
    """Mean over n = 1..4 of the largest of BLEU-1 .. BLEU-n over the captions (so it is the largest BLEU-1)."""
    return float(np.mean([max(max(bleu(prompt, caption, n)) for caption in captions) for n in range(1, 5)]))


# ---------------------------------------------------------------------------------------------------------------------
# Color and Count: on frames 0, 5, 10, ... and the ids of the tracked objects in them


def attribute_frames(total: int) -> np.ndarray:
    return np.arange(0, total, 5)


def opencv_hue(frame: np.ndarray) -> np.ndarray:
    """H of OpenCV's 8-bit RGB to HSV, 0..179, in its own integer arithmetic: (H, W, 3) uint8 -> (H, W) int."""
    r, g, b = np.moveaxis(frame.astype(np.int64), -1, 0)
    value = frame.max(-1).astype(np.int64)
    chroma = value - frame.min(-1)
    table = np.zeros(256, np.int64)
    table[1:] = np.rint((180 << 12) / (6.0 * np.arange(1, 256)))
    sixths = np.where(value == r, g - b, np.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = (sixths * table[chroma] + (1 << 11)) >> 12
    return hue + 180 * (hue < 0)


def mean_hue(frame: np.ndarray, ids: np.ndarray, corrected: bool = False) -> float:
    """Mean hue of the tracked objects, nan where there are none. The official one multiplies the hue by the id in
    8 bits, so that ids above 1 turn the colour; corrected, an id only says whether a pixel counts."""
    hue = opencv_hue(frame)
    if corrected:
        return float(hue[ids > 0].mean()) if (ids > 0).any() else math.nan
    product = hue.astype(np.uint8) * ids.astype(np.uint8)
    return float(product.sum() / np.count_nonzero(product)) if product.any() else math.nan


def hue_class(hue: float) -> str:
    """The colour name of a mean hue; nan counts as red, officially."""
    limits = (("red", 15), ("orange", 22), ("yellow", 39), ("green", 78), ("blue", 131))
    return next((name for name, limit in limits if hue < limit), "red")


def color_score(hues: Sequence[float], color: str, corrected: bool = False) -> float:
    """Share of frames whose mean hue has the demanded colour. Corrected, a frame without an object is a miss."""
    return float(np.mean([hue_class(hue) == color and not (corrected and math.isnan(hue)) for hue in hues]))


def count_score(counts: Sequence[int], wanted: float) -> float:
    """1 less the mean relative error of the number of objects, at least 0."""
    return 1 - min(1.0, float(np.mean(np.abs(np.asarray(counts, float) - wanted) / wanted)))


def attribute(text: str) -> tuple[str, str]:
    """`3 bear` or `blue car` of the metadata: the first word and the noun."""
    first, _, noun = text.strip().partition(" ")
    if not noun:
        raise ValueError(f"the attribute {text!r} is not of the form '3 bear' or 'blue car'")
    return first, noun
