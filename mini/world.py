"""A procedural world of 32x32 pictures with exact captions and exact detectors; no learned weights, no network.

One or two objects, each with a colour, a shape and a texture; two objects stand in one clear relation. The `source`
domain looks plain (flat grey, dark marks); the `target` domain has patterned backgrounds, outlines, shifted colours
and other marks. `detect` and `score` read both without being told which. Captions follow T2I-CompBench's categories.

    python mini/world.py sheet.png      # look at it: source above, target below

Coordinates: x to the right, y downwards, in pixels; pixel k covers [k, k+1). Objects stand at whole numbers.
The world, its sizes and its splits are frozen: WORLD_VERSION changes with any change that changes a picture.
"""

import colorsys
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

WORLD_VERSION = 1
SIZE = 32  # picture side
COLOURS = {"red": 0, "yellow": 56, "green": 120, "cyan": 180, "blue": 238, "purple": 298}  # hue in degrees
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "checkered")
RELATIONS = ("on the left of", "on the right of", "on the top of", "on the bottom of")  # T2I-CompBench's words
OPPOSITE = dict(zip(RELATIONS, (RELATIONS[1], RELATIONS[0], RELATIONS[3], RELATIONS[2])))
CATEGORIES = ("colour", "shape", "texture", "spatial", "complex")
DOMAINS = ("source", "target")
SPLITS = {"train": 4000, "validation": 512, "test": 1000, "pretrain": 60000}  # scenes of each domain
PROMPTS = {"validation": 100, "test": 200}  # prompts of each category
WORDS = ("a", "an", "and", "on", "the", "left", "right", "top", "bottom", "of", *COLOURS, *SHAPES, *TEXTURES)

ONE_DIAMETERS, TWO_DIAMETERS = (11, 12, 13, 14), (11, 12)
GAP = 4  # smallest space between the coloured parts of two objects; outlines take one pixel of it on each side
HUE_SHIFT = {"red": 8, "yellow": -7, "green": 10, "cyan": 9, "blue": -10, "purple": -8}  # target domain, degrees
MARK = 0.4  # chroma of a texture's marks relative to the rest of the object (dark in source, pale in target)


@dataclass(frozen=True)
class Thing:
    """One object, drawn or detected: attributes, centre (x, y), diameter and coloured area in pixels."""

    colour: str
    shape: str
    texture: str
    x: float
    y: float
    diameter: int
    area: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows. `relation` is that of things[0] to things[1]; `ground` holds background numbers."""

    domain: str
    things: tuple
    relation: str | None
    ground: tuple


# --- drawing ---


def _distance(shape, u, v, r):
    """Signed distance (max-norm of half planes) to the edge of a shape of diameter 2r; negative inside."""
    u, w = np.abs(u), 0.38 * r
    if shape == "circle":
        return np.hypot(u, v) - r
    if shape == "square":
        return np.maximum(u, np.abs(v)) - r
    if shape == "triangle":
        return np.maximum((2 * u - v - r) / 5**0.5, v - r)
    v = np.abs(v)
    return np.minimum(np.maximum(u - w, v - r), np.maximum(v - w, u - r))


def _marks(texture, domain, u, v):
    """Where a texture's marks lie: horizontal bars and upright cells (source), vertical bars and diamonds (target)."""
    if texture == "plain":
        return np.zeros(u.shape, bool)
    if texture == "striped":
        return np.cos(np.pi / 3 * v) < 0 if domain == "source" else np.cos(np.pi / 3 * u) > 0
    if domain == "source":
        return np.cos(np.pi / 4 * u) * np.cos(np.pi / 4 * v) < 0
    return np.cos(np.pi / 5.6 * (u + v)) * np.cos(np.pi / 5.6 * (u - v)) > 0


@lru_cache(maxsize=4096)
def stamp(shape: str, texture: str, domain: str, diameter: int, fx: float = 0.0, fy: float = 0.0, side: int = 18):
    """Coverage in [0, 1] of (body, marks, outline), each (side, side), of an object centred at side/2 + (fx, fy)."""
    k = 4  # sub-pixels per side
    axis = (np.arange(side * k) + 0.5) / k - side / 2
    u, v = axis[None, :] - fx, axis[:, None] - fy
    u, v = np.broadcast_arrays(u, v)
    d = _distance(shape, u, v, diameter / 2)
    body, marks = d <= 0, (d <= 0) & _marks(texture, domain, u, v)
    outline = (d > 0) & (d <= 1)
    return tuple(m.reshape(side, k, side, k).mean((1, 3)).astype(np.float32) for m in (body, marks, outline))


def paint(domain: str, colour: str) -> np.ndarray:
    """RGB in [0, 1] of a colour name in a domain."""
    hue = COLOURS[colour] + (HUE_SHIFT[colour] if domain == "target" else 0)
    return np.float32(colorsys.hsv_to_rgb(hue % 360 / 360, *((0.8, 0.9) if domain == "source" else (0.72, 0.95))))


def background(domain: str, ground: tuple) -> np.ndarray:
    """(SIZE, SIZE, 3) in [0, 1]. Source: one grey level. Target: a faintly tinted ramp with a low-contrast weave."""
    if domain == "source":
        return np.full((SIZE, SIZE, 3), ground[0], np.float32)
    level, tint, slope, angle, period, phase = ground
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    ramp = slope * (x * np.cos(angle) + y * np.sin(angle))
    turns = 2 * np.pi * SIZE / period
    weave = 0.045 * np.sin(turns * (x + y) + phase) * np.sin(turns * (x - y))
    return ((level + ramp + weave)[..., None] + tint * np.array([1, 0, -1])).astype(np.float32)


def draw(picture: np.ndarray, thing: Thing, domain: str) -> None:
    """Paint one object into `picture` (float RGB in [0, 1]) in place; any centre, parts outside are cut off."""
    side, cx, cy = 20, int(np.floor(thing.x)), int(np.floor(thing.y))
    layers = stamp(thing.shape, thing.texture, domain, thing.diameter, thing.x - cx, thing.y - cy, side)
    top, left = cy - side // 2, cx - side // 2
    patch = picture[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    oy, ox = max(-top, 0), max(-left, 0)
    body, marks, outline = (m[oy : oy + patch.shape[0], ox : ox + patch.shape[1], None] for m in layers)
    colour = paint(domain, thing.colour)
    pale = 0.0 if domain == "source" else 1 - MARK
    outline = 0 * outline if domain == "source" else outline
    patch *= 1 - body - outline
    patch += (body - marks) * colour + marks * (MARK * colour + pale) + outline * 0.1


def render(scene: Scene) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8 picture of a scene."""
    picture = background(scene.domain, scene.ground)
    for thing in scene.things:
        draw(picture, thing, scene.domain)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


# --- scenes ---


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _attributes(rng, count):
    """`count` (colour, shape, texture) triples; in 85 % of pairs all three differ."""
    triples = [tuple(_pick(rng, tuple(names)) for names in (COLOURS, SHAPES, TEXTURES)) for _ in range(count)]
    if count == 2 and rng.random() < 0.85:
        choices = zip((COLOURS, SHAPES, TEXTURES), triples[0])
        triples[1] = tuple(_pick(rng, [n for n in names if n != first]) for names, first in choices)
    return triples


def _centres(rng, relation, diameters):
    """Whole-number centres for one object, or for two in `relation` (things[0] to things[1])."""
    low = [-(-(d + 2) // 2) for d in diameters]  # one pixel of margin for the outline
    if relation is None:
        return [tuple(int(rng.integers(low[0], SIZE - low[0] + 1)) for _ in "xy")]
    near = sum(diameters) / 2 + GAP
    grid = [range(lo, SIZE - lo + 1) for lo in low]
    along = _pick(rng, [p for p in product(*grid) if p[1] - p[0] >= near])
    across = _pick(rng, [p for p in product(*grid) if abs(p[1] - p[0]) <= near / 2])
    if relation in (RELATIONS[1], RELATIONS[3]):  # the second object comes first along the axis
        along = tuple(SIZE - a for a in along)
    points = list(zip(along, across))
    return points if relation in RELATIONS[:2] else [(x, y) for y, x in points]


def make_scene(domain: str, rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene of one (30 %) or two objects."""
    count = count or (1 if rng.random() < 0.3 else 2)
    relation = _pick(rng, RELATIONS) if count == 2 else None
    triples = _attributes(rng, count)
    diameters = [_pick(rng, TWO_DIAMETERS if count == 2 else ONE_DIAMETERS) for _ in range(count)]
    centres = _centres(rng, relation, diameters)
    things = tuple(Thing(*t, *c, d) for t, c, d in zip(triples, centres, diameters))
    if domain == "source":
        ground = (rng.uniform(0.25, 0.9),)
    else:
        bounds = ((0.45, 0.8), (-0.03, 0.03), (0.1, 0.25), (0, 2 * np.pi), (7, 12), (0, 2 * np.pi))
        ground = tuple(rng.uniform(lo, hi) for lo, hi in bounds)
    return Scene(domain, things, relation, ground)


def _rng(*words):
    """A generator that depends on its arguments alone (never on Python's hash)."""
    key = "/".join(map(str, (WORLD_VERSION, *words))).encode()
    return np.random.default_rng(list(key))


def scenes(domain: str, split: str, n: int | None = None) -> list[Scene]:
    """The first n (default: all) scenes of a split; scene k depends on (domain, split, k) alone."""
    if domain not in DOMAINS or split not in SPLITS:
        raise ValueError(f"no scenes of domain {domain!r}, split {split!r}: choose from {DOMAINS} and {tuple(SPLITS)}")
    return [make_scene(domain, _rng("scene", domain, split, k)) for k in range(SPLITS[split] if n is None else n)]


# --- captions ---


def _phrase(thing, category):
    """(texture, colour, shape) words of a thing as a category names them."""
    colour = thing.colour if category in ("colour", "spatial", "complex") else None
    texture = thing.texture if category in ("texture", "complex") else None
    return [texture, colour, thing.shape]


def _sentence(phrases, relation):
    return f" {relation or 'and'} ".join("a " + " ".join(w for w in p if w) for p in phrases)


def _draft(scene, rng):
    """(phrases, relation) of a true caption: a random category, the objects in random order."""
    category = CATEGORIES[int(rng.choice(5, p=(0.25, 0.1, 0.2, 0.2, 0.25)))]
    phrases = [_phrase(t, category) for t in scene.things]
    relation = scene.relation if category in ("spatial", "complex") else None
    if len(phrases) == 2 and rng.random() < 0.5:
        phrases, relation = phrases[::-1], OPPOSITE.get(relation)
    return phrases, relation


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of a scene."""
    return _sentence(*_draft(scene, rng))


def web_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the web writes it: 10 % empty; of two objects, the colours (and the textures) swapped with
    probability 0.45; a quarter of the relations left out, a quarter wrong; one attribute left out in 15 %."""
    if rng.random() < 0.1:
        return ""
    phrases, relation = _draft(scene, rng)
    if len(phrases) == 2:
        for k in (0, 1):  # texture, colour
            if rng.random() < 0.45:
                phrases[0][k], phrases[1][k] = phrases[1][k], phrases[0][k]
    if relation:
        relation = (None, _pick(rng, RELATIONS), relation, relation)[int(rng.integers(4))]
    if rng.random() < 0.15:
        _pick(rng, phrases)[int(rng.integers(2))] = None
    return _sentence(phrases, relation)


def prompts(category: str, split: str) -> list[str]:
    """The fixed two-object prompts of a category; validation and test share none. Where a category has fewer
    prompts than PROMPTS asks for (shape 12, texture 72), they repeat in turn: sample each with its own seed."""
    if category not in CATEGORIES or split not in PROMPTS:
        raise ValueError(f"no prompts of {category!r}, {split!r}: choose from {CATEGORIES} and {tuple(PROMPTS)}")
    texts = {}  # a dict keeps the order and drops doubles
    for shape, colour, texture in product(*(permutations(names, 2) for names in (SHAPES, COLOURS, TEXTURES))):
        phrases = [_phrase(Thing(c, s, t, 0, 0, 0), category) for s, c, t in zip(shape, colour, texture)]
        for relation in RELATIONS if category in ("spatial", "complex") else (None,):
            texts[_sentence(phrases, relation)] = None
    order = _rng("prompts", category).permutation(len(texts))[: sum(PROMPTS.values())]
    texts = [list(texts)[k] for k in order]
    third = len(texts) // 3
    texts = texts[:third] if split == "validation" else texts[third:]
    return [texts[k % len(texts)] for k in range(PROMPTS[split])]


# --- prompts read back ---

GRAMMAR = (
    f"OBJECT [and | {' | '.join(RELATIONS)} OBJECT], where OBJECT is 'a [texture] [colour] shape' with texture in "
    f"{TEXTURES}, colour in {tuple(COLOURS)}, shape in {SHAPES}"
)
_OBJECT = rf"an? (?:({'|'.join(TEXTURES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_PROMPT = re.compile(rf"{_OBJECT}(?: (and|{'|'.join(RELATIONS)}) {_OBJECT})?\.?")


@lru_cache(maxsize=4096)
def parse(prompt: str) -> tuple[tuple[dict, ...], str | None]:
    """What a prompt demands: (objects, relation of the first to the second or None); an object is a dict of the
    attributes it names, of keys colour, shape, texture. ValueError (with the grammar) where it cannot be read."""
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        raise ValueError(f"cannot read the prompt {prompt!r}; expected: {GRAMMAR}")
    words = match.groups()
    named = [zip(("texture", "colour", "shape"), w) for w in (words[:3], words[4:])]
    things = tuple(d for d in ({k: w for k, w in pairs if w} for pairs in named) if d)
    return things, words[3] if words[3] in RELATIONS else None


# --- detection: hue against a grey surrounding, then the best drawn template ---

SIDE = 18  # of a template's window
LOW_CHROMA, MIN_CHROMA, MAX_GROUND, MIN_AREA = 0.18, 0.4, 0.12, 16
MIN_MATCH = 0.75  # correlation of an object with its best template
_SHIFTS = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]


def _smooth(planes):
    """(..., H, W) by the kernel 1 2 1 in both directions, edges repeated."""
    p = np.pad(planes, [(0, 0)] * (planes.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    p = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]
    return (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 16


@lru_cache(maxsize=1)
def _templates():
    """(keys, bank): all objects as chroma pictures, sharp and blurred; each row of bank has mean 0 and norm 1."""
    keys, rows = [], []
    for shape, texture, domain, d in product(SHAPES, TEXTURES, DOMAINS, (10, *ONE_DIAMETERS)):
        if texture == "plain" and domain == "target":
            continue  # the same chroma as in source
        body, marks, _ = stamp(shape, texture, domain, d, 0.0, 0.0, SIDE)
        sharp = body - (1 - MARK) * marks
        for picture in (sharp, _smooth(sharp), _smooth(_smooth(sharp))):
            row = picture.ravel() - picture.mean()
            norm = np.linalg.norm(row)
            keys.append((shape, texture, d, float(body.sum()), norm))
            rows.append(row / norm)
    return keys, np.stack(rows)


def _components(classes):
    """Label 4-connected pixels of equal class >= 0; returns an (H, W) array of labels, -1 elsewhere."""
    h, w = classes.shape
    wide = np.full((h + 2, w + 2), -1)
    wide[1:-1, 1:-1] = classes
    label = np.where(wide >= 0, np.arange(wide.size).reshape(wide.shape), wide.size)
    same = [wide[1:, :] == wide[:-1, :], wide[:, 1:] == wide[:, :-1]]
    live = wide >= 0
    while True:
        new = label.copy()
        for joined, a, b in ((same[0], np.s_[1:, :], np.s_[:-1, :]), (same[1], np.s_[:, 1:], np.s_[:, :-1])):
            low = np.where(joined, np.minimum(new[a], new[b]), wide.size)
            np.minimum(new[a], low, out=new[a])
            np.minimum(new[b], low, out=new[b])
        flat = np.append(new.ravel(), wide.size)
        new = np.where(live, flat[flat[new]], wide.size)  # follow the pointers: few rounds
        if (new == label).all():
            return np.where(live, label, -1)[1:-1, 1:-1]
        label = new


def _fit(channel, cx, cy):
    """Best template near (cx, cy) of a one-colour chroma channel: (match, chroma, key, x, y)."""
    keys, bank = _templates()
    half = SIDE // 2
    wide = np.pad(channel, half + 4)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (SIDE, SIDE))
    y0, x0 = cy + 4, cx + 4  # the window centred at (cx, cy)
    flat = windows[y0 - 3 : y0 + 4, x0 - 3 : x0 + 4].reshape(len(_SHIFTS), -1)
    flat = flat - flat.mean(1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1) + 1e-6
    match = flat @ bank.T / norm[:, None]
    shift, best = np.unravel_index(match.argmax(), match.shape)
    dy, dx = _SHIFTS[shift]
    chroma = match[shift, best] * norm[shift] / keys[best][-1]
    return float(match[shift, best]), float(chroma), keys[best], cx + dx, cy + dy


def detect(image) -> list[Thing]:
    """The objects of a picture (uint8 RGB array or PIL image, 32x32 or a whole multiple), from left to right."""
    pixels = _pixels(image)
    r, g, b = np.moveaxis(pixels, -1, 0)
    plane = np.stack([r - (g + b) / 2, 0.75**0.5 * (g - b)])  # chroma: grey is 0, hue is the angle
    soft = _smooth(plane)
    strength = np.hypot(*soft)
    hues = np.array([COLOURS[c] + HUE_SHIFT[c] / 2 for c in COLOURS])
    apart = (np.degrees(np.arctan2(soft[1], soft[0]))[..., None] - hues + 180) % 360 - 180
    nearest = np.abs(apart).argmin(-1)
    label = _components(np.where(strength > LOW_CHROMA, nearest, -1))
    ids, counts = np.unique(label, return_counts=True)
    found = []
    for k in ids[(ids >= 0) & (counts >= MIN_AREA)]:
        part = label == k
        thing = _measure(plane, nearest, strength, part)
        if thing:
            found.append(thing)
    kept = []
    for _, thing in sorted(found, key=lambda f: -f[0] * f[1].area):
        if all(abs(thing.x - o.x) + abs(thing.y - o.y) > 7 for o in kept):
            kept.append(thing)
    return [] if kept and _busy(strength, kept) else sorted(kept, key=lambda t: (t.x, t.y))


def _measure(plane, nearest, strength, part):
    """(match, Thing) of one connected patch of one hue, or None where it is no object."""
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    cy, cx = (rows[0] + rows[-1] + 2) // 2, (cols[0] + cols[-1] + 2) // 2
    mean = (plane * part).sum((1, 2))
    mean /= np.linalg.norm(mean) + 1e-9
    hue = int(nearest[part][0])
    other = (nearest != hue) & (strength > LOW_CHROMA)
    channel = np.where(other, 0, np.tensordot(mean, plane, 1))
    match, chroma, (shape, texture, d, area, _), x, y = _fit(channel, cx, cy)
    if match < MIN_MATCH or chroma < MIN_CHROMA:
        return None
    return match, Thing(tuple(COLOURS)[hue], shape, texture, float(x), float(y), d, area)


def _busy(strength, things):
    """Whether the picture outside its objects is coloured too, as noise is."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    outside = np.ones((SIZE, SIZE), bool)
    for t in things:
        outside &= np.maximum(abs(x - t.x), abs(y - t.y)) > t.diameter / 2 + 2
    return not outside.any() or np.quantile(strength[outside], 0.7) > MAX_GROUND


def _pixels(image):
    """(SIZE, SIZE, 3) float32 in [0, 1] of an array or PIL image; larger multiples are averaged down."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected an RGB uint8 picture, got {array.dtype} of shape {array.shape}")
    h, w = array.shape[:2]
    if h % SIZE or h != w:
        raise ValueError(f"expected a square picture whose side is a multiple of {SIZE}, got {h}x{w}")
    k = h // SIZE
    return array.reshape(SIZE, k, SIZE, k, 3).mean((1, 3), dtype=np.float32) / 255


# --- scores ---


def _present(demanded, found, key):
    """Share of the demanded values of one attribute that the picture holds, whichever object carries them."""
    wanted = Counter(d[key] for d in demanded if key in d)
    if not wanted:
        return None
    return sum((wanted & Counter(getattr(t, key) for t in found)).values()) / sum(wanted.values())


def stands(first: Thing, second: Thing, relation: str) -> bool:
    """Whether `first` stands in `relation` to `second`: by the centres, along the axis on which they differ more."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) == abs(dy):
        return False
    sideways = abs(dx) > abs(dy)
    return relation == (RELATIONS[dx > 0] if sideways else RELATIONS[2 + (dy > 0)])


def _matches(demanded, found, relation, keys):
    """Whether distinct objects carry all demanded attributes of `keys` and stand in `relation` (None: anywhere)."""
    for chosen in permutations(found, len(demanded)):
        fits = all(getattr(t, k) == d[k] for t, d in zip(chosen, demanded) for k in keys if k in d)
        if fits and (relation is None or stands(*chosen, relation)):
            return True
    return False


def score(image, prompt: str) -> dict[str, float | None]:
    """How well a picture obeys a prompt; None where the prompt does not ask.

    colour, shape, texture: share of the demanded values present, whichever object carries them.
    binding: 1 if distinct objects carry each demanded object's attributes, all of them on the same object.
    spatial: 1 if objects of the demanded shapes stand in the demanded relation (colour and texture not looked at).
    complex: 1 if all is right: one assignment has all attributes and the relation, and no object is missing or extra.
    """
    demanded, relation = parse(prompt)
    found = detect(image)
    every = ("colour", "shape", "texture")
    values = {key: _present(demanded, found, key) for key in every}
    values["spatial"] = float(_matches(demanded, found, relation, ("shape",))) if relation else None
    values["binding"] = float(_matches(demanded, found, None, every))
    exact = len(found) == len(demanded) and _matches(demanded, found, relation, every)
    return {**values, "complex": float(exact)}


# --- image folders ---


def image_folder(domain: str, split: str, root: str | Path | None = None, captions: str = "true") -> Path:
    """Folder of PNGs + metadata.jsonl (file_name, text) of a split; written once, complete or absent.

    `captions` is "true" or "web". The default root is `data` beside this file; several processes may ask at once.
    """
    if captions not in ("true", "web"):
        raise ValueError(f"captions must be 'true' or 'web', not {captions!r}")
    write = caption if captions == "true" else web_caption

    def rows(folder):
        for k, scene in enumerate(scenes(domain, split)):
            Image.fromarray(render(scene)).save(folder / f"{k:05d}.png", compress_level=1)
            yield f"{k:05d}.png", write(scene, _rng("caption", captions, domain, split, k))

    return write_folder(f"{domain}-{split}-{captions}-v{WORLD_VERSION}", root, rows)


def write_folder(name: str, root: str | Path | None, rows) -> Path:
    """root / name with what `rows(folder)` writes there and a metadata.jsonl of the (file_name, text) that it yields;
    complete or absent, also where several processes ask at once."""
    root = Path(root) if root else Path(__file__).resolve().parent / "data"
    folder = root / name
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
    with open(draft / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for file_name, text in rows(draft):
            lines.write(json.dumps({"file_name": file_name, "text": text}) + "\n")
    draft.chmod(0o755)
    try:
        os.rename(draft, folder)
    except OSError:  # another process was first
        shutil.rmtree(draft)
        if not folder.exists():
            raise
    return folder


def contact_sheet(pictures, columns: int = 16, zoom: int = 3) -> Image.Image:
    """Equal uint8 pictures as one enlarged grid with a two-pixel margin."""
    rows = -(-len(pictures) // columns)
    step = SIZE * zoom + 2
    sheet = Image.new("RGB", (columns * step, rows * step), "white")
    for k, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((SIZE * zoom, SIZE * zoom), Image.NEAREST)
        sheet.paste(tile, (k % columns * step, k // columns * step))
    return sheet


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    contact_sheet([render(s) for d in DOMAINS for s in scenes(d, "validation", 64)]).save(sys.argv[1])
