"""EvalCrafter's rules, beside numbers that the official functions gave."""

import math

import numpy as np
import pytest
import torch

import evalcrafter as ec


def test_inception_score():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1]], dtype=torch.float64)
    assert ec.inception_score(rows, 1)[0] == pytest.approx(1.2810536979791294, abs=1e-14)
    assert ec.inception_score(rows, 2) == pytest.approx((1.2095205980876973, 0.05685700799061945), abs=1e-14)
    rows = torch.full((20, 4), 0.01, dtype=torch.float64)
    rows[range(20), [i % 4 for i in range(20)]] = 0.97
    for splits, score in ((10, 1.8654191198682966), (5, 3.382428099696618), (1, 3.3824280996966194)):
        assert ec.inception_score(rows, splits)[0] == pytest.approx(score, abs=1e-13)
    rows = torch.from_numpy(np.random.RandomState(0).dirichlet(np.ones(10) * 0.3, 103))
    assert ec.inception_score(rows) == pytest.approx((2.2003951960579453, 0.21221927), abs=1e-8)
    assert ec.inception_score(torch.full((30, 5), 0.2))[0] == pytest.approx(1.0)
    assert math.isnan(ec.inception_score(torch.eye(4).repeat(5, 1), 5)[0])


def test_action():
    probabilities = [0.6, 0.2, 0.1, 0.05, 0.02] + [0.001] * 30
    assert ec.action_score(probabilities, [0.9, 0.8, 0.7, 0.6, 0.5] + [1.0] * 30) == pytest.approx(0.81, abs=1e-12)
    assert ec.action_score(probabilities[::-1], ([0.9, 0.8, 0.7, 0.6, 0.5] + [1.0] * 30)[::-1]) == pytest.approx(0.81)
    assert ec.action_frames(16).tolist() == [[0, 4, 8, 12] * 4] * 5
    expected = [0, 4, 8, 12, 16, 20, 0, 4, 8, 12, 16, 20, 0, 4, 8, 12]
    assert ec.action_frames(24)[0].tolist() == expected
    assert ec.action_frames(64)[:, 0].tolist() == [0, 1, 2, 2, 3] and ec.action_frames(64)[4, -1] == 63


def test_amplitude():
    assert [ec.amplitude([flow]) for flow in (4.999, 5.0, 5.0001)] == ["slow", "slow", "large"]
    assert ec.amplitude([1.0, 2.0, 20.0]) == "large"
    assert ec.flow_padding(333, 500) == (2, 2, 1, 2) and ec.flow_padding(240, 426) == (3, 3, 0, 0)
    assert {ec.flow_padding(*size) for size in ((320, 512), (576, 1024), (640, 1024))} == {(0, 0, 0, 0)}
    wanted = ["large"] * 28 + ["slow"] * 22  # the official split's counts
    assert np.mean([ec.amplitude([0.1]) == w for w in wanted]) == pytest.approx(0.44)


def test_bleu_by_hand():
    reference, candidate = "a b c d", "a b x"
    brevity = math.exp(1 - 4 / 3)
    assert ec.bleu(reference, candidate, 2) == pytest.approx([2 / 3 * brevity, (2 / 3 * 1 / 2) ** 0.5 * brevity])
    assert ec.bleu("a a", "a a a a")[0] == pytest.approx(0.5)  # clipped, and no penalty for length
    assert ec.bleu("A cat", "a cat")[0] == pytest.approx(0.5)  # words as they stand
    assert ec.bleu("a b c d e", "a b c d e") == pytest.approx([1, 1, 1, 1], abs=1e-8)


def test_blip_bleu_is_the_largest_bleu_1():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt, *captions = (" ".join(rng.choice(list("abcdef"), rng.integers(1, 9))) for _ in range(6))
        expected = max(ec.bleu(prompt, caption)[0] for caption in captions)
        assert ec.blip_bleu(prompt, captions) == pytest.approx(expected, abs=3e-12)
    frames = {17: [0, 4, 8, 12, 16], 24: [0, 5, 11, 17, 23], 28: [0, 6, 13, 20, 27], 16: [0, 3, 7, 11, 15]}
    assert all(ec.caption_frames(n).tolist() == expected for n, expected in frames.items())


def test_hue():
    pure = {(255, 0, 0): 0, (255, 128, 0): 15, (255, 255, 0): 30, (0, 255, 0): 60, (0, 255, 255): 90, (0, 0, 255): 120}
    pure |= {(128, 0, 255): 135, (255, 0, 255): 150, (255, 255, 255): 0, (0, 0, 0): 0}
    for colour, hue in pure.items():
        assert ec.opencv_hue(np.array([[colour]], np.uint8)).item() == hue
    names = {0: "red", 14.99: "red", 15: "orange", 21.99: "orange", 22: "yellow", 38.9: "yellow", 39: "green"}
    names |= {77.9: "green", 78: "blue", 130.9: "blue", 131: "red", 179: "red", math.nan: "red"}
    assert all(ec.hue_class(hue) == name for hue, name in names.items())


def test_mean_hue_with_its_defects():
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[:, :2], frame[:, 2:] = (0, 0, 255), (255, 255, 0)  # blue, yellow
    left, right = np.arange(4) < 2, np.arange(4) >= 2
    one, two, three = (np.tile(side * k, (4, 1)) for side, k in ((left, 1), (right, 2), (left, 3)))
    assert ec.mean_hue(frame, one) == ec.mean_hue(frame, one, corrected=True) == 120
    assert ec.mean_hue(frame, two) == 60 and ec.mean_hue(frame, two, corrected=True) == 30
    assert ec.mean_hue(frame, one + two) == 90 and ec.mean_hue(frame, one + two, corrected=True) == 75
    assert ec.mean_hue(frame, three) == 104 and ec.mean_hue(frame, three, corrected=True) == 120  # 360 mod 256
    for corrected in (False, True):
        assert math.isnan(ec.mean_hue(frame, 0 * one, corrected))
    assert ec.color_score([120, math.nan, 10, math.nan], "red") == 0.75
    assert ec.color_score([120, math.nan, 10, math.nan], "red", corrected=True) == 0.25


def test_count():
    cases = (([2, 2, 2, 2], 2, 1), ([0, 0, 0, 0], 2, 0), ([1, 2, 3, 2], 2, 0.75), ([5, 5, 5, 5], 2, 0))
    cases += (([0, 0, 0, 8], 2, 0), ([20, 18, 22, 0], 20, 0.7))
    assert all(ec.count_score(counts, wanted) == pytest.approx(score) for counts, wanted, score in cases)
    assert ec.attribute_frames(16).tolist() == [0, 5, 10, 15]
    assert ec.attribute("3 bear") == ("3", "bear") and ec.attribute("blue race car") == ("blue", "race car")
    with pytest.raises(ValueError, match="not of the form"):
        ec.attribute("bear")
