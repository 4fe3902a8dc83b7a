"""T2I-CompBench's rules, beside numbers that the official functions gave; its networks on tiny models; GORS."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spacy
import torch
from conftest import environment, tiny_tokenizer
from PIL import Image
from spacy.language import Language
from spacy.tokens import Doc
from test_evalcrafter import noise_clip, tiny_detector, tiny_text_model
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

import evaluate
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
    [
        *(
            ([0.9, 0.5], "0.4500"),
            ([0.3333, 0.3333], "0.1111"),
            ([0.1234], "0.1234"),
            ([0.7], "0.7000"),
            ([], "1.0000"),
        ),
        ([0.5, 0.0001], "0.0000"),  # float32: 0.00004999...
        ([0.99996, 0.5], "0.5000"),
    ],
)
def test_attributes(probabilities, formatted):
    assert f"{t2i.attribute_score(probabilities):.4f}" == formatted


def test_questions():
    assert t2i.questions(["a green bench", "a blue bowl"]) == ["a green bench?", "a blue bowl?"]
    assert t2i.questions(["the left", "it", "top", "The left"]) == ["it?", "The left?"]
    assert len(t2i.questions([str(k) for k in range(12)])) == 8
    assert t2i.clean_question('The "Red" Car; (new)?  ') == "the red car new?"
    assert t2i.clean_question("A big, red ball?") == "a big, red ball?"
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


# -- prompts read by spaCy

TAGS = {"DET": "a the", "ADJ": "red small", "ADP": "near to on of", "PROPN": "Tom Thumb", "CCONJ": "and", "AUX": "is"}
KNOWN = {word: tag for tag, words in TAGS.items() for word in words.split()} | {".": "PUNCT", "next": "ADV"}
VOCAB = spacy.blank("en").vocab


def read(words: str, vocab=VOCAB) -> Doc:
    """Articles and adjectives belong to the next noun, other words to the first; what is not known is a noun."""
    words = words.split()
    tags = [KNOWN.get(word, "NOUN") for word in words]
    nouns = [k for k, tag in enumerate(tags) if tag in ("NOUN", "PROPN")] or [0]
    heads = [
        next((n for n in nouns if n > k), nouns[0]) if tag in ("DET", "ADJ") else nouns[0]
        for k, tag in enumerate(tags)
    ]
    deps = ["ROOT" if k == nouns[0] else "conj" if k in nouns else "det" for k in range(len(words))]
    return Doc(vocab, words, pos=tags, heads=heads, deps=deps)


@pytest.mark.parametrize(
    "prompt, nouns",
    [
        ("the cat is on top of the red car .", ("cat", "car")),
        ("the cat is on top of a dog near the car .", None),  # four nouns
        ("the cat is near Tom Thumb .", ("cat", "Thumb")),
        ("the cat is near Tom Thumb", None),  # the name ends the prompt
        ("Tom is next to the car .", ("Tom", "car")),
        ("the cat and the dog .", None),
        ("the girl on the left and the cat .", ("girl", "cat")),
        ("near the dog .", None),
    ],
)
def test_complex_nouns(prompt, nouns):
    assert t2i.complex_nouns(read(prompt)) == nouns


def test_words_of_prompts():
    assert t2i.spatial_nouns(read("a girl near a red car and a dog")) == ("girl", "dog")
    assert t2i.spatial_nouns(read("a cat .")) == ("cat", "cat") and t2i.spatial_nouns(read("near to")) is None
    assert t2i.without_adjectives(read("a small red cat near the dog .")) == "a cat near the dog ."
    assert [chunk.text for chunk in read("a red cat and the dog").noun_chunks] == ["a red cat", "the dog"]


# -- networks

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", "a", "red", "cat", "the", "dog"]


def tiny_vqa():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {"vocab_size": 15, "bos_token_id": 13, "encoder_hidden_size": 16, "max_position_embeddings": 40, **sizes}
    vision = {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, **sizes}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).eval()
    for parameter in model.parameters():  # larger than at the start, so that answers differ
        torch.nn.init.normal_(parameter, std=0.5)
    return model, BertTokenizer(vocab={word: k for k, word in enumerate(WORDS)})


def test_blip_network():
    """The question starts with [ENC], the answer with [DEC], other questions do not count, and yes is weighed against
    no."""
    (model, tokenizer), picture = tiny_vqa(), Image.fromarray(noise_clip(1, 40, 60)[0])
    asked = ["a red cat?", "the dog?", "a?"]
    together = t2i.blip_probabilities(model, tokenizer, picture, asked)
    alone = [t2i.blip_probabilities(model, tokenizer, picture, [question])[0] for question in asked]
    assert together == pytest.approx(alone, abs=1e-6) and np.ptp(together) > 1e-4
    assert t2i.blip_probabilities(model, tokenizer, picture, []) == []

    squeezed = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = torch.from_numpy((squeezed - t2i.PIXEL_MEAN) / t2i.PIXEL_STD).float().movedim(-1, 0)[None]
    with torch.no_grad():
        seen = model.vision_model(pixels).last_hidden_state

        def answer(first):
            ids = torch.tensor([[first, 8, 9, 10, 7, 3]])
            ones = torch.ones_like(ids)
            options = {"encoder_hidden_states": seen, "encoder_attention_mask": torch.ones(seen.shape[:2])}
            states = model.text_encoder(input_ids=ids, attention_mask=ones, **options).last_hidden_state
            options = {"encoder_hidden_states": states, "encoder_attention_mask": ones}
            p = model.text_decoder(input_ids=torch.tensor([[13]]), **options).logits[0, -1].softmax(-1)
            return (p[5] / (p[5] + p[6])).item()

    assert together[0] == pytest.approx(answer(14), abs=1e-6)
    assert abs(together[0] - answer(2)) > 1e-4  # [CLS] would answer something else


def official_names(model) -> dict:
    """Weights under the names of the official BLIP code."""
    names = {"vision_model.embeddings.class_embedding": "visual_encoder.cls_token"}
    names |= {"vision_model.embeddings.position_embedding": "visual_encoder.pos_embed"}
    inner = {"embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "self_attn": "attn"}
    inner |= {"attn.projection": "attn.proj", "layer_norm": "norm", "post_norm": "norm", "post_layernorm": "norm"}
    state = {}
    for key, value in model.state_dict().items():
        new = names.get(key, key)
        if new.startswith("vision_model."):
            new = "visual_encoder." + new.removeprefix("vision_model.")
            for ours, theirs in inner.items():
                new = new.replace(ours, theirs)
        state[new] = value
    return state | {"text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def test_official_weights_of_blip(tmp_path):
    (model, tokenizer), picture = tiny_vqa(), Image.fromarray(noise_clip(1, 40, 60)[0])
    state = official_names(model)
    assert {"visual_encoder.blocks.1.attn.proj.bias", "visual_encoder.norm.weight"} < set(state)
    torch.save({"model": state}, tmp_path / "blip.pth")
    loaded = t2i.blip_of_weights(evaluate.weights(str(tmp_path / "blip.pth")))
    asked = ["a red cat?", "the dog?"]
    expected = t2i.blip_probabilities(model, tokenizer, picture, asked)
    assert t2i.blip_probabilities(loaded, tokenizer, picture, asked) == pytest.approx(expected, abs=1e-6)
    state["visual_encoder.head.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="head.weight"):
        t2i.blip_of_weights(state)


def test_clip_network():
    """The short side is scaled, the middle cut out, and 77 tokens are read at most."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model, picture = tiny_text_model(tokenizer), Image.fromarray(noise_clip(1, 12, 20)[0])
    cosine = t2i.clip_similarity(model, tokenizer, picture, "run")
    scaled = picture.resize((13, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    pixels = (np.asarray(scaled, np.float32) / 255 - t2i.PIXEL_MEAN) / t2i.PIXEL_STD
    with torch.no_grad():
        outputs = model(
            **tokenizer(["run"], return_tensors="pt"),
            pixel_values=torch.from_numpy(pixels).float().movedim(-1, 0)[None],
        )
    assert cosine == pytest.approx((outputs.image_embeds @ outputs.text_embeds.T).item(), abs=1e-5)


def test_zero_shot_detections():
    """In the official 479 pixels, the surest first."""
    (detector, processor), picture = tiny_detector(), Image.fromarray(noise_clip(1, 40, 60)[0])
    found = t2i.detections(detector, processor, picture, ("bear", "girl"))
    assert {label for label, _, _ in found} == {"bear", "person"}
    sure = [confidence for _, confidence, _ in found]
    assert sure == sorted(sure, reverse=True) and min(sure) > 0.25
    boxes, _ = t2i.evalcrafter.detect(detector, processor, np.asarray(picture), "bear", threshold=0.25)
    corners = torch.tensor([box for label, _, box in found if label == "bear"])
    expected = boxes * torch.tensor([479 / 60, 479 / 40] * 2)
    torch.testing.assert_close(corners.sort(0).values, expected.sort(0).values, atol=1e-3, rtol=1e-4)


# -- the command


@Language.component("toy_parser")
def toy_parser(doc):
    return read(doc.text, doc.vocab)


PROMPTS = {
    "color": ["a red cat and the dog", "the red dog"],
    "spatial": ["a cat on the left of a dog", "a cat near a dog"],
    "non_spatial": ["the dog runs"],
    "complex": ["the red cat is near the dog .", "the small dog runs .", "the cat is next to the small dog ."],
}


@pytest.fixture
def bench(tmp_path):
    """Two pictures per prompt under the official names, networks in folders, and UniDet's detections."""
    number, generator = 0, np.random.default_rng(0)
    for category, prompts in PROMPTS.items():
        (tmp_path / "run" / category / "samples").mkdir(parents=True)
        for number, text in enumerate(text for text in prompts for _ in range(2)):
            pixels = Image.fromarray(generator.integers(0, 256, (40, 60, 3), np.uint8))
            pixels.save(tmp_path / "run" / category / "samples" / f"{text}_{number:06d}.png")
    for category in ("spatial", "complex"):
        names = sorted(path.name for path in (tmp_path / "run" / category / "samples").iterdir())
        found = [["cat", 0.9, [0, 0, 100, 100]], ["dog", 0.7, [200, 20, 300, 120]]]
        (tmp_path / "run" / category / "detections.json").write_text(json.dumps({name: found for name in names}))
    nlp = spacy.blank("en")
    nlp.add_pipe("toy_parser", name="parser")
    nlp.to_disk(tmp_path / "english")
    tokenizer = tiny_tokenizer()
    for name, parts in {"vqa": tiny_vqa(), "clip": (tiny_text_model(tokenizer), tokenizer)}.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    (tmp_path / "complex_val_spatial.txt").write_bytes(b"The red cat is near the dog .\r\n")
    (tmp_path / "complex_val_action.txt").write_text("the small dog runs .\n")
    return tmp_path


def bench_args(folder, *flags):
    given = [folder / "run", "--spacy_model", folder / "english", "--vqa_model", folder / "vqa"]
    given += ["--clip_model", folder / "clip", "--complex_lists", folder, "--output_dir", folder / "out"]
    return evaluate.parse_args(["t2i_compbench", *(str(part) for part in (*given, *flags))])


def official(folder, where):
    return json.loads((folder / where / "vqa_result.json").read_text())


def test_command(bench, monkeypatch, capsys):
    flags = ["--categories", *PROMPTS, "--paper", "1: SD2", "--chart", bench / "chart.png"]
    evaluate.evaluate_t2i_compbench(bench_args(bench, *flags))
    result = json.loads((bench / "out" / "result.json").read_text())
    assert result["counts"] == {"color": 4, "spatial": 4, "non_spatial": 2, "complex": 6}
    printed = capsys.readouterr().out
    assert "(1: SD2)" in printed and "50.6500" in printed and Image.open(bench / "chart.png").width > 300

    model, tokenizer = tiny_vqa()
    rows = official(bench / "run" / "color", "annotation_blip")
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]
    for row, (_, path, text) in zip(rows, evaluate.numbered_samples(bench / "run" / "color")):
        asked = ["a red cat?", "the dog?"] if "cat" in text else ["the red dog?"]
        answers = t2i.blip_probabilities(model, tokenizer, Image.open(path), asked)
        assert row["answer"] == f"{t2i.attribute_score(answers):.4f}" == f"{math.prod(answers):.4f}"
    assert result["scores"]["color"] == pytest.approx(np.mean([float(row["answer"]) for row in rows]))

    rows = official(bench / "run" / "spatial", "labels/annotation_obj_detection_2d")
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]
    assert [row["answer"] for row in rows] == pytest.approx([0.25 * 1.6 + 0.5] * 4)

    parts = [official(bench / "run" / "complex", name) for name in ("annotation_blip", "annotation_clip")]
    blip, clip = ([float(row["answer"]) for row in rows] for rows in parts)
    found = [row["answer"] for row in official(bench / "run" / "complex", "labels/annotation_obj_detection_2d")]
    assert found == pytest.approx([0.9, 0.9, 0, 0, 0.9, 0.9])  # the second prompt has one noun
    expected = [(b + d) / 2 for b, d in zip(blip[:2], found[:2])] + [(b + c) / 2 for b, c in zip(blip[2:4], clip[2:4])]
    expected += [(b + d + c) / 3 for b, d, c in zip(blip[4:], found[4:], clip[4:])]
    merged = [row["answer"] for row in official(bench / "run" / "complex", "annotation_3_in_1")]
    assert merged == pytest.approx(expected) and result["scores"]["complex"] == pytest.approx(np.mean(merged))

    (bench / "out" / "complex" / "clip" / "000003.npy").unlink()  # as if stopped there
    seen, measured = [], t2i.clip_similarity
    monkeypatch.setattr(t2i, "clip_similarity", lambda *given: seen.append(given[-1]) or measured(*given))
    monkeypatch.setattr(t2i, "blip_probabilities", lambda *given: pytest.fail("all are there"))
    evaluate.evaluate_t2i_compbench(bench_args(bench, *flags))
    assert json.loads((bench / "out" / "result.json").read_text()) == result
    assert seen == ["the dog runs ."]  # without its adjective


def test_two_processes_measure_the_same(bench):
    evaluate.evaluate_t2i_compbench(bench_args(bench, "--categories", "non_spatial"))
    one = official(bench / "run" / "non_spatial", "annotation_clip")
    (bench / "run" / "non_spatial" / "annotation_clip" / "vqa_result.json").unlink()
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", evaluate.__file__, "t2i_compbench"]
    argv += [
        bench / "run",
        "--categories",
        "non_spatial",
        "--clip_model",
        bench / "clip",
        "--output_dir",
        bench / "two",
    ]
    argv = [sys.executable, *(str(part) for part in argv)]
    subprocess.run(argv, env=environment(), check=True, capture_output=True)
    two = official(bench / "run" / "non_spatial", "annotation_clip")
    assert [row["answer"] for row in two] == pytest.approx([row["answer"] for row in one], abs=1e-6)


def test_substitute_detector_is_named(bench):
    (bench / "run" / "spatial" / "detections.json").unlink()
    for part in tiny_detector():
        part.save_pretrained(bench / "detector")
    evaluate.evaluate_t2i_compbench(bench_args(bench, "--categories", "spatial", "--detector", bench / "detector"))
    result = json.loads((bench / "out" / "result.json").read_text())
    assert result["settings"]["spatial"]["detector"].endswith("not comparable with published numbers")


def test_wrong_input(bench):
    def run(*flags):
        evaluate.evaluate_t2i_compbench(bench_args(bench, *flags))

    with pytest.raises(ValueError, match="--spacy_model nothing is not there: `python -m spacy download"):
        run("--categories", "color", "--spacy_model", "nothing")
    spacy.blank("en").to_disk(bench / "blank")
    with pytest.raises(ValueError, match="has no parser"):
        run("--categories", "color", "--spacy_model", bench / "blank")
    with pytest.raises(ValueError, match="texture.* has no pictures: run sample.py"):
        run("--categories", "texture")
    with pytest.raises(ValueError, match="Complex needs complex_val_spatial.txt"):
        run("--categories", "complex", "--complex_lists", bench / "run")
    (bench / "complex_val_spatial.txt").write_text("Another prompt.\n")
    (bench / "complex_val_action.txt").write_text("")
    with pytest.raises(ValueError, match="no prompt of the pictures is in its lists"):
        run("--categories", "complex")
    (bench / "complex_train_action.txt").write_text("the small dog runs .\n")
    run("--categories", "complex")
    with pytest.raises(ValueError, match="table 1 has the rows"):
        run("--paper", "1: SD9")
    with pytest.raises(ValueError, match="a table from 1 to 13"):
        run("--paper", "SD2")
    detections = bench / "run" / "spatial" / "detections.json"
    detections.write_text("{}")
    with pytest.raises(ValueError, match="detections.json lacks a cat"):
        run("--categories", "spatial")
    samples = bench / "run" / "color" / "samples"
    (samples / "the red dog_000002.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is no picture or is truncated"):
        run("--categories", "color")
    Image.new("RGB", (8, 8)).save(samples / "again_000002.png")
    with pytest.raises(ValueError, match="has the number of another picture"):
        run("--categories", "color")
    Image.new("RGB", (8, 8)).save(samples / "grid.png")
    with pytest.raises(ValueError, match="grid.png is not called <prompt>_<number>.png"):
        run("--categories", "color")


# -- GORS


def test_gors_folder(tmp_path):
    """Official thresholds by the line of a prompt's first picture, rewards as they are, and no picture twice."""
    prompts = [f"p{k}" for k in range(558)] + ["p3", "twice", "natural", "twice"]
    (tmp_path / "samples").mkdir()
    for number, text in enumerate(text for text in prompts for _ in range(2)):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"{text}_{number:06d}.png")
    rewards = {0: 0.93, 1: 0.92, 6: 0.95, 1116: 0.91, 1117: 0.94, 1119: 0.8, 1120: 0.71, 1121: 0.70, 1122: 0.9}
    rows = [rewards.get(number, 0.1) for number in range(2 * len(prompts))]
    evaluate.write_official(tmp_path, "blip", rows)
    flags = ["gors", str(tmp_path), "--category", "color", "--output_dir", str(tmp_path / "train")]
    with pytest.raises(ValueError, match="say --num_images_per_prompt"):
        evaluate.evaluate_gors(evaluate.parse_args(flags))
    evaluate.evaluate_gors(evaluate.parse_args([*flags, "--num_images_per_prompt", "2"]))
    kept = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"].split("_")[1]: row["reward"] for row in kept} == {
        "000000.png": 0.93,
        "000006.png": 0.95,
        "001117.png": 0.94,  # p3 again, of line 3
        "001120.png": 0.71,  # the first natural prompt, of line 560
    }
    assert {path.name for path in (tmp_path / "train").glob("*.png")} == {row["file_name"] for row in kept}
    with pytest.raises(ValueError, match="exists: choose another"):
        evaluate.evaluate_gors(evaluate.parse_args(flags))


def test_gors_of_cosines(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"p_{number:06d}.png")
    flags = ["gors", str(tmp_path), "--category", "non_spatial", "--num_images_per_prompt", "1"]
    flags += ["--output_dir", str(tmp_path / "train")]
    with pytest.raises(ValueError, match="is not scored"):
        evaluate.evaluate_gors(evaluate.parse_args(flags))
    evaluate.write_official(tmp_path, "clip", [0.31, 0.29])
    evaluate.evaluate_gors(evaluate.parse_args(flags))
    [row] = [json.loads(line) for line in Path(tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    assert row["reward"] == pytest.approx(0.775)  # 2.5 times the cosine
    evaluate.write_official(tmp_path, "clip", [0.1, 0.2])
    with pytest.raises(ValueError, match="nothing to train on"):
        evaluate.evaluate_gors(evaluate.parse_args([*flags[:-1], str(tmp_path / "other")]))
