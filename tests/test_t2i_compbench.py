"""T2I-CompBench's rules, beside numbers that the official functions gave."""

import pytest

import t2i_compbench as t2i

A = (0, 0, 100, 100)
LEFT, RIGHT, TOP, BOTTOM = (f"on the {side} of" for side in ("left", "right", "top", "bottom"))


@pytest.mark.parametrize(
    "relation, first, second, score",
    [
        (LEFT, A, (200, 20, 300, 120), 1),
        (RIGHT, A, (200, 20, 300, 120), 0),
        (RIGHT, (200, 20, 300, 120), A, 1),
        (TOP, (100, 0, 200, 100), (110, 200, 210, 300), 1),
        (BOTTOM, (100, 0, 200, 100), (110, 200, 210, 300), 0),
        (BOTTOM, (110, 200, 210, 300), (100, 0, 200, 100), 1),
        ("on top of", (100, 0, 200, 100), (110, 200, 210, 300), 0),
        (LEFT, A, (50, 0, 150, 100), 0.30000000000000004),
        (LEFT, A, (90, 0, 190, 100), 1),
        (LEFT, A, (100, 100, 200, 200), 0),
        (LEFT, A, (101, 100, 201, 200), 1),
        (TOP, A, (0, 60, 100, 160), 0.4),
        ("next to", A, (200, 20, 300, 120), 1),
        ("next to", A, (300, 300, 400, 400), 0.5),
        ("next to", A, (300, 149, 400, 249), 1),
        ("near", A, (300, 150, 400, 250), 0.5),
        ("on side of", A, (150, 300, 250, 400), 0.5),
        (None, A, A, 0),
    ],
)
def test_position(relation, first, second, score):
    assert t2i.position_score(relation, first, second) == pytest.approx(score, abs=1e-15)


def test_spatial():
    prompt, boxes = "a girl on the left of a cat", [("person", 0.9, A), ("cat", 0.7, (200, 20, 300, 120))]
    assert t2i.spatial_score(prompt, ("girl", "cat"), boxes) == pytest.approx(0.25 * 0.9 + 0.25 * 0.7 + 0.5)
    assert t2i.spatial_score(prompt, ("girl", "cat"), [*boxes, ("cat", 0.6, A)]) == pytest.approx(0.9)  # the first cat
    assert t2i.spatial_score(prompt, ("cat", "girl"), boxes) == 0  # wrong side: 0.4 is less than half
    assert t2i.spatial_score(prompt, ("girl", "cat"), boxes[:1]) == 0
    assert t2i.spatial_score("a cat on top of a girl", ("cat", "girl"), [("cat", 1.0, A), ("person", 1.0, A)]) == 0.5
    assert t2i.spatial_score(prompt, None, boxes) == 0
    assert t2i.relation_of("a cat next to a dog on the left of a car") == "next to"
    assert t2i.relation_of("a cat and a dog") is None


@pytest.mark.parametrize(
    "probabilities, formatted",
    [([0.9, 0.5], "0.4500"), ([0.3333, 0.3333], "0.1111"), ([0.1234], "0.1234"), ([0.7], "0.7000"), ([], "1.0000")],
)
def test_attributes(probabilities, formatted):
    assert f"{t2i.attribute_score(probabilities):.4f}" == formatted


def test_questions():
    assert t2i.questions(["a green bench", "a blue bowl"]) == ["a green bench?", "a blue bowl?"]
    assert t2i.questions(["the left", "it", "top", "The left"]) == ["it?", "The left?"]
    assert len(t2i.questions([str(k) for k in range(12)])) == 8
    assert t2i.clean_question('The "Red" Car; (new)?  ') == "the red car new?"
    assert t2i.clean_question("a " * 60).count("a") == 50


def test_complex():
    lists = {"spatial": {"a red cup is near a plate"}, "action": {"the tall man runs"}}
    assert t2i.complex_score("A red cup is near a plate.\n", 0.8, 0.6, 0.3, lists) == pytest.approx(0.7)
    assert t2i.complex_score("The tall man runs. Fast.", 0.8, 0.6, 0.3, lists) == pytest.approx(0.55)
    assert t2i.complex_score("Something else.", 0.8, 0.6, 0.3, lists) == pytest.approx(1.7 / 3)


def test_gors_thresholds():
    assert t2i.keep_reward("color", 559, 0.93) and not t2i.keep_reward("color", 559, 0.92)
    assert t2i.keep_reward("color", 560, 0.71) and not t2i.keep_reward("color", 560, 0.70)
    assert not t2i.keep_reward("non_spatial", 0, 0.31)
