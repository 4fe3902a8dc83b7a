"""Short clips of the procedural world: 8 frames of 32x32 with exact captions and exact detectors, as mini/world.py.

One to three objects of one colour and one shape do one thing together: move, grow, shrink or stand still, slowly or
fast. Captions and scores are in the manner of EvalCrafter's Action, Amplitude (here: speed), Color and Count. Looks
are those of mini/world.py, `source` plain and `target` patterned; `detect` reads both.

    python mini/clips.py sheet.png      # look at it: a clip per row, source left, target right

Frozen: CLIPS_VERSION changes with any change that changes a clip.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from mini import world

CLIPS_VERSION = 1
FRAMES, FPS = 8, 8
COUNTS = {1: "a", 2: "two", 3: "three"}
MOVES = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
GROWTHS = {"growing": 1, "shrinking": -1}
ACTIONS = (*MOVES, *GROWTHS, "standing still")
SPEEDS = {"slowly": (0.5, 0.3), "fast": (1.5, 0.8)}  # pixels per frame of a centre, of a diameter
SPLITS = {"train": 2000, "validation": 256, "test": 500, "pretrain": 20000}  # clips of each domain
PROMPTS = {"validation": 60, "test": 120}
ATTRIBUTES = ("action", "speed", "colour", "count")
_DIAMETERS = {1: (8, 11), 2: (7, 9), 3: (7, 7)}  # at the middle of the clip
_PLURAL = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in world.SHAPES}
WORDS = (*COUNTS.values(), *SPEEDS, *_PLURAL.values(), *(word for action in ACTIONS for word in action.split()))


@dataclass(frozen=True)
class Clip:
    """Everything a clip shows. `centres` are those of the first frame, `diameter` that of the middle."""

    domain: str
    count: int
    colour: str
    shape: str
    action: str
    speed: str | None  # None where nothing moves
    centres: tuple
    diameter: float
    ground: tuple


def _paths(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Centres (FRAMES, count, 2) and diameters (FRAMES,)."""
    k = np.arange(FRAMES)
    pixels, growth = SPEEDS.get(clip.speed, (0, 0))
    step = np.array(MOVES.get(clip.action, (0, 0))) * pixels
    centres = np.array(clip.centres)[None] + k[:, None, None] * step
    return centres, clip.diameter + (k - (FRAMES - 1) / 2) * growth * GROWTHS.get(clip.action, 0)


def render(clip: Clip) -> np.ndarray:
    """(FRAMES, 32, 32, 3) uint8."""
    ground, frames = world.background(clip.domain, clip.ground), []
    for centres, diameter in zip(*_paths(clip)):
        frame = ground.copy()
        for x, y in centres:
            thing = world.Thing(clip.colour, clip.shape, "plain", float(x), float(y), float(diameter))
            world.draw(frame, thing, clip.domain)
        frames.append((frame.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return np.stack(frames)


def _fits(clip: Clip) -> bool:
    """Whether all objects stay inside the picture and apart from each other in all frames."""
    for centres, diameter in zip(*_paths(clip)):
        room = diameter / 2 + 1
        if centres.min() < room or centres.max() > world.SIZE - room:
            return False
        gaps = [np.abs(a - b).max() for i, a in enumerate(centres) for b in centres[:i]]
        if gaps and min(gaps) < diameter + 3:
            return False
    return True


def make_clip(domain: str, rng: np.random.Generator) -> Clip:
    count, action = int(rng.integers(1, 4)), world._pick(rng, ACTIONS)
    speed = None if action == "standing still" else world._pick(rng, tuple(SPEEDS))
    colour, shape = world._pick(rng, tuple(world.COLOURS)), world._pick(rng, world.SHAPES)
    ground = world.make_scene(domain, rng).ground
    while True:
        centres = tuple(tuple(rng.uniform(4, world.SIZE - 4, 2)) for _ in range(count))
        clip = Clip(domain, count, colour, shape, action, speed, centres, rng.uniform(*_DIAMETERS[count]), ground)
        if _fits(clip):
            return clip


def scenes(domain: str, split: str, n: int | None = None) -> list[Clip]:
    """The first n (default: all) clips of a split; clip k depends on (domain, split, k) alone."""
    count = SPLITS[split] if n is None else n
    return [make_clip(domain, world._rng("clip", CLIPS_VERSION, domain, split, k)) for k in range(count)]


# --- captions ---


def _sentence(count, colour, shape, action, speed):
    noun = shape if count == 1 else _PLURAL[shape]
    return " ".join(word for word in (COUNTS[count], colour, noun, action, speed) if word)


def caption(clip: Clip, rng=None) -> str:
    """The true caption, such as "two red circles moving left slowly". There is but one, whatever `rng`."""
    return _sentence(clip.count, clip.colour, clip.shape, clip.action, clip.speed)


def web_caption(clip: Clip, rng: np.random.Generator) -> str:
    """As the web writes it: 10 % empty, the count wrong in 15 %, the action left out in 20 %, the speed in as many.
    Action and speed are never wrong: x_t shows them so early that a model would soon trust it more than captions."""
    if rng.random() < 0.1:
        return ""
    count, action, speed = clip.count, clip.action, clip.speed
    if rng.random() < 0.15:
        count = world._pick(rng, [c for c in COUNTS if c != count])
    if rng.random() < 0.2:
        action = None
    if rng.random() < 0.2 or action is None:
        speed = None
    return _sentence(count, clip.colour, clip.shape, action, speed)


def prompts(split: str) -> list[str]:
    """Fixed prompts; validation and test share none."""
    every = product(COUNTS, world.COLOURS, world.SHAPES, ACTIONS, SPEEDS)
    texts = [_sentence(*words) for words in every if words[3] != "standing still"]
    order = world._rng("clip prompts", CLIPS_VERSION).permutation(len(texts))
    first = 0 if split == "validation" else PROMPTS["validation"]
    return [texts[k] for k in order[first : first + PROMPTS[split]]]


_NOUNS = {noun: shape for shape in world.SHAPES for noun in (shape, _PLURAL[shape])}
_PROMPT = re.compile(
    rf"({'|'.join(COUNTS.values())}) (?:({'|'.join(world.COLOURS)}) )?({'|'.join(_NOUNS)})"
    rf"(?: ({'|'.join(ACTIONS)}))?(?: ({'|'.join(SPEEDS)}))?\.?"
)


def parse(prompt: str) -> dict:
    """What a prompt demands of ATTRIBUTES. ValueError where it cannot be read."""
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        raise ValueError(
            f"cannot read the prompt {prompt!r}; expected: {'|'.join(COUNTS.values())} [colour] shape(s) [action] "
            f"[slowly|fast], with an action of {ACTIONS}"
        )
    count, colour, _, action, speed = match.groups()
    count = next(number for number, word in COUNTS.items() if word == count)
    demanded = {"action": action, "speed": speed, "colour": colour, "count": count}
    return {key: value for key, value in demanded.items() if value is not None}


# --- detection: patches of one hue in each frame, then how they move and grow ---

MIN_AREA = 9  # pixels of a patch
MIN_PIXELS, MIN_GROWTH = 0.2, 0.1  # per frame: less counts as standing still
FAST_PIXELS, FAST_GROWTH = 1.0, 0.42  # per frame: more counts as fast; of a centre, of the root of an area


def _patches(frame):
    """(colour, x, y, area) of each patch of one hue."""
    r, g, b = np.moveaxis(world._pixels(frame), -1, 0)
    plane = np.stack([r - (g + b) / 2, 0.75**0.5 * (g - b)])
    strength = np.hypot(*world._smooth(plane))
    hues = np.array([world.COLOURS[c] + world.HUE_SHIFT[c] / 2 for c in world.COLOURS])
    coloured = strength > 0.25
    wide = np.pad(coloured, 2)
    near = np.lib.stride_tricks.sliding_window_view(wide, (5, 5)).any((2, 3))
    if near.mean() > 0.9 or np.quantile(strength[~near], 0.7) > world.MAX_GROUND:
        return []  # the ground is coloured too, as in noise
    label, found = world._components(np.where(coloured, 0, -1)), []
    for k in np.unique(label[label >= 0]):
        part = label == k
        if part.sum() < MIN_AREA:
            continue
        mean = (plane * part).sum((1, 2))
        apart = (np.degrees(np.arctan2(mean[1], mean[0])) - hues + 180) % 360 - 180
        weight = strength * part
        y, x = (np.mgrid[: world.SIZE, : world.SIZE] * weight).sum((1, 2)) / weight.sum()
        found.append((tuple(world.COLOURS)[int(np.abs(apart).argmin())], x, y, weight.sum() / strength[part].max()))
    return found


def detect(frames) -> dict:
    """Action, speed, colour and count of a clip (frames of uint8 RGB); None where there is nothing to be seen."""
    every = [_patches(np.asarray(frame)) for frame in frames]
    count = Counter(map(len, every)).most_common(1)[0][0]
    if count == 0:
        return dict.fromkeys(ATTRIBUTES[:3]) | {"count": 0}
    times = [k for k, found in enumerate(every) if len(found) == count]
    colour = Counter(patch[0] for k in times for patch in every[k]).most_common(1)[0][0]
    if len(times) < 3:
        return {"action": None, "speed": None, "colour": colour, "count": count}
    track = np.array([np.mean([patch[1:] for patch in every[k]], axis=0) for k in times])  # (times, 3): x, y, area
    dx, dy = np.polyfit(times, track[:, :2], 1)[0]
    growth = np.polyfit(times, track[:, 2] ** 0.5, 1)[0]
    if max(abs(dx), abs(dy)) > MIN_PIXELS:
        direction = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
        action = next(name for name, step in MOVES.items() if step == direction)
        speed = "fast" if max(abs(dx), abs(dy)) > FAST_PIXELS else "slowly"
    elif abs(growth) > MIN_GROWTH:
        action = "growing" if growth > 0 else "shrinking"
        speed = "fast" if abs(growth) > FAST_GROWTH else "slowly"
    else:
        action, speed = "standing still", None
    return {"action": action, "speed": speed, "colour": colour, "count": count}


def score(frames, prompt: str) -> dict[str, float | None]:
    """1 where a clip obeys the prompt in an attribute, 0 where not, None where the prompt does not ask."""
    demanded, found = parse(prompt), detect(frames)
    return {key: float(found[key] == demanded[key]) if key in demanded else None for key in ATTRIBUTES}


# --- folders of clips ---


def clip_folder(domain: str, split: str, root: str | Path | None = None) -> Path:
    """Folder of .mp4 + metadata.jsonl (file_name, text) of a split with true captions; complete or absent."""

    def rows(folder):
        for k, clip in enumerate(scenes(domain, split)):
            data.write_clip([Image.fromarray(frame) for frame in render(clip)], folder / f"{k:05d}.mp4", FPS)
            yield f"{k:05d}.mp4", caption(clip)

    return world.write_folder(f"clips-{domain}-{split}-v{CLIPS_VERSION}", root, rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = zip(*(scenes(domain, "validation", 16) for domain in world.DOMAINS))
    world.contact_sheet([frame for row in rows for clip in row for frame in render(clip)]).save(sys.argv[1])
