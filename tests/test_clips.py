"""The clips' promises: exact detection, honest captions, frozen splits."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
from mini import clips, world

SOME = 300  # clips of each domain


@pytest.fixture(scope="module")
def some():
    return {d: [(clips.render(c), c) for c in clips.scenes(d, "test", SOME)] for d in world.DOMAINS}


def truth(clip):
    return {"action": clip.action, "speed": clip.speed, "colour": clip.colour, "count": clip.count}


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_detector_is_exact(some, domain):
    assert all(clips.detect(frames) == truth(clip) for frames, clip in some[domain])
    assert all(
        min(v for v in clips.score(f, clips.caption(c)).values() if v is not None) == 1 for f, c in some[domain]
    )


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_detector_stands_noise_and_compression(some, domain, tmp_path):
    """98 % of all attributes with noise of 5 % of the range; all of them after the .mp4."""
    rng, right = np.random.default_rng(0), []
    for frames, clip in some[domain][:100]:
        noisy = (frames + rng.normal(0, 12, frames.shape)).clip(0, 255).astype(np.uint8)
        right += [clips.detect(noisy)[key] == value for key, value in truth(clip).items()]
    assert np.mean(right) > 0.98
    for frames, clip in some[domain][:20]:
        data.write_clip([clips.Image.fromarray(frame) for frame in frames], tmp_path / "a.mp4", clips.FPS)
        assert clips.detect(data.read_clip(tmp_path / "a.mp4")) == truth(clip)


def test_random_clips_score_at_chance():
    """By hand: 7 actions; a clip moves in 6 of 7 and then at one of 2 speeds; 6 colours; 3 counts."""
    told = [clips.parse(prompt) for prompt in clips.prompts("test")]
    shown = [truth(clip) for clip in clips.scenes("source", "test", 2000)]
    for key, chance in {"action": 1 / 7, "speed": 3 / 7, "colour": 1 / 6, "count": 1 / 3}.items():
        right = np.mean([found[key] == demanded[key] for demanded in told for found in shown])
        assert abs(right - chance) < 4 * (chance * (1 - chance) / len(shown)) ** 0.5, key


def test_nothing_is_seen_in_noise_and_on_empty_grounds():
    rng = np.random.default_rng(0)
    for clip in clips.scenes("target", "test", 20):
        empty = np.stack([(world.background("target", clip.ground).clip(0, 1) * 255).astype(np.uint8)] * clips.FRAMES)
        noise = (rng.random(empty.shape) * 255).astype(np.uint8)
        assert clips.detect(empty)["count"] == clips.detect(noise)["count"] == 0


def test_other_frames_are_other_actions(some):
    """Backwards: left is right and growing is shrinking; frozen: standing still."""
    opposite = dict(zip(clips.ACTIONS, ("moving right", "moving left", "moving down", "moving up")))
    opposite |= {"growing": "shrinking", "shrinking": "growing", "standing still": "standing still"}
    for frames, clip in some["source"][:60]:
        assert clips.detect(frames[::-1])["action"] == opposite[clip.action]
        frozen = np.stack([frames[3]] * clips.FRAMES)
        assert clips.detect(frozen) == truth(clip) | {"action": "standing still", "speed": None}


def test_web_captions_are_wrong_as_stated():
    rng, pairs = (
        np.random.default_rng(0),
        [(c, clips.parse(clips.caption(c))) for c in clips.scenes("source", "test", 500)],
    )
    found = [(truth, clips.web_caption(clip, rng)) for clip, truth in pairs for _ in range(4)]
    texts = [(truth, clips.parse(text)) for truth, text in found if text]
    assert 0.08 < 1 - len(texts) / len(found) < 0.12
    assert 0.12 < np.mean([truth["count"] != told["count"] for truth, told in texts]) < 0.18
    assert all(truth["colour"] == told["colour"] for truth, told in texts)
    assert 0.16 < np.mean(["action" not in told for _, told in texts]) < 0.24
    moving = [(truth, told) for truth, told in texts if truth.get("speed") and "action" in told]
    assert 0.16 < np.mean(["speed" not in told for _, told in moving]) < 0.24
    for key in ("action", "speed"):
        assert all(told[key] == truth[key] for truth, told in texts if key in told)


def test_prompts_and_splits():
    validation, test = clips.prompts("validation"), clips.prompts("test")
    assert len(validation) == 60 and len(test) == 120 and not set(validation) & set(test)
    assert (Path(clips.__file__).parent / "prompts/clips.txt").read_text().splitlines() == validation
    assert all(set(clips.parse(prompt)) == set(clips.ATTRIBUTES) for prompt in validation + test)
    assert len(Counter(clips.parse(prompt)["action"] for prompt in test)) == 6
    for wrong in ("a red circle on a table", "four red circles", "a red circle moving"):
        with pytest.raises(ValueError, match="cannot read the prompt"):
            clips.parse(wrong)


def test_clips_are_frozen():
    """Another digest means another world: CLIPS_VERSION must change with it."""
    content = b"".join(clips.render(c).tobytes() for d in world.DOMAINS for c in clips.scenes(d, "test", 5))
    captions = "".join(clips.caption(c) for d in world.DOMAINS for c in clips.scenes(d, "validation", 50))
    assert hashlib.sha256(content).hexdigest()[:12] == "cef296a18dac"
    assert hashlib.sha256(captions.encode()).hexdigest()[:12] == "5d9a43eddd66"


def test_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(clips.SPLITS, "validation", 3)
    folder = clips.clip_folder("target", "validation", tmp_path)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["00000.mp4", "00001.mp4", "00002.mp4"]
    for row, clip in zip(rows, clips.scenes("target", "validation")):
        frames = data.read_clip(folder / row["file_name"])
        assert (
            len(frames) == clips.FRAMES and clips.detect(frames) == truth(clip) and row["text"] == clips.caption(clip)
        )
    assert clips.clip_folder("target", "validation", tmp_path) == folder and len(list(tmp_path.iterdir())) == 1
