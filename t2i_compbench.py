"""T2I-CompBench's scores of Tables 1, 4, 8, 10 and 11: Color, Shape, Texture, Spatial, Non-Spatial and Complex.

The rules of https://github.com/Karine-Huang/T2I-CompBench (https://arxiv.org/abs/2307.06350): how answers, detections
and similarities become a score; no command runs the networks that give them yet. Scores lie in 0..1; the paper prints
them times 100. A detection is (label, confidence, (x1, y1, x2, y2)), the likeliest first, in the 479x479 pixels that
the official detector sees.
"""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
Detection = tuple[str, float, Box]

# ---------------------------------------------------------------------------------------------------------------------
# Color, Shape, Texture: BLIP-VQA

MAX_PHRASES = 8
NO_PHRASES = ("top", "the side", "the left", "the right")


def questions(noun_chunks: Sequence[str]) -> list[str]:
    """What BLIP is asked: each noun chunk of the prompt with a question mark, the first eight of them."""
    return [f"{chunk}?" for chunk in noun_chunks if chunk not in NO_PHRASES][:MAX_PHRASES]


def clean_question(text: str) -> str:
    """As BLIP's data loader cleans it: lower case, without .!"()*#:;~, at most 50 words."""
    kept = "".join(character for character in text.lower() if character not in '.!"()*#:;~,').rstrip(" ")
    return " ".join(kept.split(" ")[:50])


def attribute_score(probabilities: Sequence[float]) -> float:
    """Product of the probabilities of yes, each and the product rounded to four decimals; 1 without a question."""
    return round(math.prod(round(p, 4) for p in probabilities), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Spatial

RELATIONS = (  # the first that the prompt contains counts
    *("on side of", "next to", "near", "on the left of", "on the right of"),
    *("on the bottom of", "on the top of", "on top of"),
)
PERSONS = ("girl", "boy", "man", "woman")
NEAR_PIXELS, MAX_IOU = 150, 0.1


def relation_of(prompt: str) -> str | None:
    return next((relation for relation in RELATIONS if relation in prompt), None)


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (sum(areas) - width * height)


def position_score(relation: str | None, first: Box, second: Box) -> float:
    """How well two boxes stand in a relation. `on top of` has no rule and always gives 0, officially."""
    dx, dy = ((second[k] + second[k + 2]) / 2 - (first[k] + first[k + 2]) / 2 for k in (0, 1))
    if relation in ("next to", "on side of", "near"):
        if abs(dx) < NEAR_PIXELS or abs(dy) < NEAR_PIXELS:
            return 1.0
        return NEAR_PIXELS / max(abs(dx), abs(dy))
    holds = {
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }
    if not holds.get(relation, False):
        return 0.0
    overlap = iou(first, second)
    return 1.0 if overlap < MAX_IOU else MAX_IOU / overlap


def spatial_score(prompt: str, nouns: tuple[str, str] | None, detections: Sequence[Detection]) -> float:
    """Half for the two objects' confidences, half for their position; less than half of it all counts as nothing."""
    if nouns is None:
        return 0.0
    names = ["person" if noun in PERSONS else noun for noun in nouns]
    found = [next((d for d in detections if d[0] == name), None) for name in names]
    score = sum(0.25 * d[1] for d in found if d is not None)
    if all(d is not None for d in found):
        score += 0.5 * position_score(relation_of(prompt), found[0][2], found[1][2])
    return score if score >= 0.5 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Complex: 3-in-1


def prompt_key(prompt: str) -> str:
    """What the official lists of spatial and of action prompts are searched for: up to the first full stop."""
    return prompt.strip().split(".")[0].lower()


def complex_score(prompt: str, attribute: float, spatial: float, clip: float, lists: dict[str, set[str]]) -> float:
    """Mean of the attributes' score with that of what else the prompt demands. `lists` holds prompt_key of the
    prompts of complex_val_spatial.txt and complex_val_action.txt under "spatial" and "action"."""
    if prompt_key(prompt) in lists["spatial"]:
        return (spatial + attribute) / 2
    if prompt_key(prompt) in lists["action"]:
        return (clip + attribute) / 2
    return (attribute + spatial + clip) / 3


# ---------------------------------------------------------------------------------------------------------------------
# GORS

THRESHOLDS = {  # for the 560 template prompts of a training file, and for the natural ones
    "color": (0.92, 0.70),
    "shape": (0.85, 0.60),
    "texture": (0.90, 0.65),
    "spatial": (0.8, 0.8),
    "non_spatial": (0.75, 0.75),  # of 2.5 * cosine: a raw cosine never gets there
    "complex": (0.4, 0.4),
}
TEMPLATES = 560


def keep_reward(category: str, prompt_index: int, reward: float) -> bool:
    """Whether GORS trains on a picture of the prompt with that (0-based) number in the training file."""
    return reward > THRESHOLDS[category][prompt_index >= TEMPLATES]
