"""The world's promises: exact detection, honest captions, frozen splits."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mini import world

ROOT = Path(__file__).resolve().parents[1]


def key(thing):
    return thing.colour, thing.shape, thing.texture


def reads(picture, scene):
    """Whether the detector finds exactly the scene's objects, each within one pixel."""
    found, real = world.detect(picture), sorted(scene.things, key=lambda t: (t.x, t.y))
    near = all(max(abs(f.x - r.x), abs(f.y - r.y)) <= 1 for f, r in zip(found, real))
    return len(found) == len(real) and near and all(key(f) == key(r) for f, r in zip(found, real))


def noisy(picture, rng):
    return ((picture / 255 + rng.normal(0, 0.1, picture.shape)).clip(0, 1) * 255).round().astype(np.uint8)


def blurred(picture):
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))


def smooth_noise(rng, cells, strength):
    """Low-frequency colour noise: cells x cells normal values, enlarged."""
    grid = rng.normal(0, strength, (3, cells, cells)).astype(np.float32)
    planes = [np.array(Image.fromarray(g).resize((world.SIZE,) * 2, Image.BICUBIC)) for g in grid]
    return ((np.stack(planes, -1) + 0.5).clip(0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def some():
    return {d: [(world.render(s), s) for s in world.scenes(d, "test", 400)] for d in world.DOMAINS}


def test_detector_is_exact_on_10000_renders():
    wrong = [
        (domain, k)
        for domain in world.DOMAINS
        for k, scene in enumerate(world.scenes(domain, "pretrain", 5000))
        if not reads(world.render(scene), scene)
    ]
    assert not wrong


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_detector_stands_noise_and_blur(some, domain):
    rng = np.random.default_rng(0)
    assert np.mean([reads(noisy(p, rng), s) for p, s in some[domain]]) >= 0.95
    assert np.mean([reads(blurred(p), s) for p, s in some[domain]]) >= 0.95
    assert np.mean([reads(blurred(noisy(p, rng)), s) for p, s in some[domain]]) >= 0.95
    assert np.mean([reads(noisy(blurred(p), rng), s) for p, s in some[domain]]) >= 0.8


def test_detector_sees_nothing_in_noise():
    rng = np.random.default_rng(0)
    size = (200, world.SIZE, world.SIZE, 3)
    sets = {"uniform": rng.integers(0, 256, size).astype(np.uint8)}
    for s in (0.05, 0.1, 0.2, 0.4):
        sets[f"normal {s}"] = (rng.normal(0.5, s, size).clip(0, 1) * 255).astype(np.uint8)
    for cells in (2, 3, 4, 6, 8):
        for s in (0.05, 0.1, 0.2, 0.4):
            sets[f"smooth {cells} {s}"] = [smooth_noise(rng, cells, s) for _ in range(200)]
    seen = {name: np.mean([bool(world.detect(p)) for p in pictures]) for name, pictures in sets.items()}
    assert max(seen.values()) <= 0.05, seen


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_detector_sees_nothing_on_backgrounds(domain):
    rng = np.random.default_rng(0)
    grounds = [world.render(world.Scene(domain, (), None, s.ground)) for s in world.scenes(domain, "test", 300)]
    assert not any(world.detect(g) for g in grounds)
    assert np.mean([bool(world.detect(noisy(g, rng))) for g in grounds]) <= 0.05


def test_detector_reads_larger_pictures_and_rejects_others(some):
    picture, scene = some["target"][0]
    assert reads(np.kron(picture, np.ones((4, 4, 1), np.uint8)), scene)
    assert reads(Image.fromarray(picture), scene)
    for bad in (picture.astype(np.float32), picture[..., 0], picture[:, :30], np.zeros((40, 40, 3), np.uint8)):
        with pytest.raises(ValueError):
            world.detect(bad)


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_scenes_keep_their_rules(domain):
    scenes = world.scenes(domain, "train", 2000)
    pairs = [s for s in scenes if len(s.things) == 2]
    assert 0.65 < len(pairs) / len(scenes) < 0.75
    for scene in scenes:
        for t in scene.things:
            assert t.diameter / 2 + 1 <= min(t.x, t.y) and max(t.x, t.y) <= world.SIZE - t.diameter / 2 - 1
    for scene in pairs:
        a, b = scene.things
        holding = [r for r in world.RELATIONS if world.stands(a, b, r)]
        assert holding == [scene.relation] and world.stands(b, a, world.OPPOSITE[scene.relation])
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.diameter + b.diameter) / 2 + world.GAP
        assert min(abs(a.x - b.x), abs(a.y - b.y)) <= max(abs(a.x - b.x), abs(a.y - b.y)) / 2
    assert np.mean([all(x != y for x, y in zip(key(s.things[0]), key(s.things[1]))) for s in pairs]) > 0.8


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_true_captions_score_one(some, domain):
    rng = np.random.default_rng(0)
    for picture, scene in some[domain]:
        text = world.caption(scene, rng)
        assert 1 < len(text.split()) <= 18 and set(text.split()) <= set(world.WORDS)
        assert all(v in (1.0, None) for v in world.score(picture, text).values()), (text, scene)


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_swapped_attributes_never_bind(some, domain):
    for picture, scene in some[domain]:
        if len(scene.things) == 1 or any(x == y for x, y in zip(*map(key, scene.things))):
            continue
        (c1, s1, t1), (c2, s2, t2) = map(key, scene.things)
        swapped = ((c2, s1, c1, s2), (t2, s1, t1, s2), (f"{t1} {c2}", s1, f"{t2} {c1}", s2))
        for words in swapped:
            text = "a {} {} and a {} {}".format(*words)
            values = world.score(picture, text)
            assert values["binding"] == values["complex"] == 0
            assert values["shape"] == 1 and values["colour"] in (1, None) and values["texture"] in (1, None)
        wrong = world.score(picture, f"a {s1} {world.OPPOSITE[scene.relation]} a {s2}")
        assert (wrong["spatial"], wrong["binding"], wrong["complex"]) == (0, 1, 0)


def test_prompts_of_other_pictures_score_at_chance(monkeypatch):
    """Prompt and picture each have two objects that differ in all they have, drawn without regard to one another. Of 6
    colours, 4 shapes and 3 textures a picture shows two, so that a demanded one is there with 2/6, 2/4, 2/3. Ordered
    pairs: 30 of colours, 12 of shapes, 6 of textures; the picture's two objects may be taken in either order."""
    pair = {"colour": 30, "shape": 12, "texture": 6}
    named = {category: ("shape",) for category in world.CATEGORIES} | {"complex": ("colour", "shape", "texture")}
    named |= {"colour": ("colour", "shape"), "spatial": ("colour", "shape"), "texture": ("texture", "shape")}
    chance = {}
    for category, keys in named.items():
        bound = 2 / np.prod([pair[key] for key in keys])
        related = category in ("spatial", "complex")
        chance[category] = {"shape": 1 / 2, "binding": bound, "complex": bound / 4 if related else bound}
        chance[category] |= {"colour": 1 / 3} if "colour" in keys else {}
        chance[category] |= {"texture": 2 / 3} if "texture" in keys else {}
        chance[category] |= {"spatial": 2 / 12 / 4} if related else {}  # one of four relations stands
    scenes = [s for s in world.scenes("target", "pretrain", 4000) if len(s.things) == 2]
    scenes = [s for s in scenes if all(x != y for x, y in zip(*map(key, s.things)))]
    texts = {category: list(dict.fromkeys(world.prompts(category, "test"))) for category in world.CATEGORIES}
    rng, values = np.random.default_rng(0), {}
    for scene in scenes:
        found = world.detect(world.render(scene))
        monkeypatch.setattr(world, "detect", lambda image, found=found: found)
        for category in world.CATEGORIES:
            for k in rng.integers(len(texts[category]), size=40):
                for name, value in world.score(None, texts[category][k]).items():
                    values.setdefault((category, name), []).append(value)
        monkeypatch.undo()
    for (category, name), seen in values.items():
        if name not in chance[category]:
            assert set(seen) == {None}
            continue
        p = chance[category][name]  # the rarest, 1 of 4,320, is expected 20 times: within 4 standard errors, not 0
        assert abs(np.mean(seen) - p) < 4 * np.sqrt(p * (1 - p) / len(seen)), (category, name, p)
    assert len(scenes) > 2000


def test_score_of_partial_pictures():
    def draw(*things):
        return world.render(world.Scene("source", things, None, (0.5,)))

    red = world.Thing("red", "circle", "plain", 8, 16, 12)
    blue = world.Thing("blue", "square", "striped", 24, 16, 12)
    text = "a red circle and a blue square"
    assert world.score(draw(red), text) == {
        "colour": 0.5, "shape": 0.5, "texture": None, "spatial": None, "binding": 0, "complex": 0
    }  # fmt: skip
    assert world.score(draw(red, blue), "a red circle")["binding"] == 1
    assert world.score(draw(red, blue), "a red circle")["complex"] == 0  # one object too many
    assert world.score(draw(), text)["shape"] == 0
    assert world.score(draw(red), "a red circle and a red circle")["binding"] == 0  # one object is not two


def test_web_captions_are_wrong_as_often_as_they_say():
    rng = np.random.default_rng(0)
    scenes = [s for s in world.scenes("source", "train") if len(s.things) == 2]
    texts = [(world.web_caption(s, rng), s) for s in scenes]
    assert 0.08 < np.mean([t == "" for t, _ in texts]) < 0.12
    colours = [t for t in texts if t[0] and all("colour" in d for d in world.parse(t[0])[0])]
    swapped = 0
    count = 0
    for text, scene in colours:
        a, b = scene.things
        if a.shape == b.shape or a.colour == b.colour:
            continue
        named = {d["shape"]: d["colour"] for d in world.parse(text)[0]}
        swapped, count = swapped + (named[a.shape] == b.colour), count + 1
    assert 0.41 < swapped / count < 0.49
    assert all(set(t.split()) <= set(world.WORDS) for t, _ in texts)


def test_parse_reads_every_prompt_and_names_the_grammar():
    seen = {}
    for category in world.CATEGORIES:
        for split, count in world.PROMPTS.items():
            texts = world.prompts(category, split)
            seen[category, split] = set(texts)
            assert len(texts) == count and all(len(world.parse(t)[0]) == 2 for t in texts)
            assert all((world.parse(t)[1] is not None) == (category in ("spatial", "complex")) for t in texts)
        assert not seen[category, "validation"] & seen[category, "test"]
    assert world.parse("A striped red circle on the left of a square.") == (
        ({"texture": "striped", "colour": "red", "shape": "circle"}, {"shape": "square"}),
        "on the left of",
    )
    for bad in ("", "a dog", "a red striped circle", "a red circle near a blue square", "red circle"):
        with pytest.raises(ValueError, match="OBJECT"):
            world.parse(bad)


def test_splits_are_frozen_and_disjoint():
    first = {(d, s): world.scenes(d, s, 200) for d in world.DOMAINS for s in world.SPLITS}
    assert first["source", "train"][:50] == world.scenes("source", "train", 50)
    everything = [scene for scenes in first.values() for scene in scenes]
    assert len(set(everything)) == len(everything)
    text = json.dumps([world.prompts(c, s) for c in world.CATEGORIES for s in world.PROMPTS])
    pixels = b"".join(world.render(s).tobytes() for scenes in first.values() for s in scenes[:20])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "26bc2abf5435084f"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "34350b92e858588e"


def test_image_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(world.SPLITS, "train", 40)
    paths = []

    def job():
        paths.append(world.image_folder("target", "train", tmp_path))

    jobs = [threading.Thread(target=job) for _ in "ab"]
    [j.start() for j in jobs]
    [j.join() for j in jobs]
    assert len(set(paths)) == 1 and [p.name for p in tmp_path.iterdir()] == [paths[0].name]
    rows = [json.loads(line) for line in (paths[0] / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    for row in rows:
        picture = np.array(Image.open(paths[0] / row["file_name"]))
        assert world.score(picture, row["text"])["complex"] == 1
    web = world.image_folder("target", "train", tmp_path, captions="web")
    assert (web / "metadata.jsonl").read_text() != (paths[0] / "metadata.jsonl").read_text()
    with pytest.raises(ValueError):
        world.image_folder("target", "train", tmp_path, captions="none")


def test_autoencoder_keeps_the_attributes():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(ROOT / "mini" / "sd15" / "vae").float()
    for domain in world.DOMAINS:
        scenes = world.scenes(domain, "test", 250)
        x = torch.from_numpy(np.stack([world.render(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        y = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.mean([reads(p, s) for p, s in zip(y, scenes)]) >= 0.99


def test_bundled_pipeline_is_stock():
    diffusers = pytest.importorskip("diffusers")
    folder = ROOT / "mini" / "sd15"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4.8e6
    assert not any("_name_or_path" in f.read_text() for f in folder.rglob("*.json"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert config.prediction_type == "epsilon" and config.num_train_timesteps == 1000
    assert all(len(pipe.tokenizer(word).input_ids) == 3 for word in world.WORDS)
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    image = pipe("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (world.SIZE, world.SIZE, 3)
