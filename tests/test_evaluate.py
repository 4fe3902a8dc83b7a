"""evaluate.py: mini scores of renders, validation loss per interval."""

import json
import math

import numpy as np
import pytest
from conftest import tiny_sd
from PIL import Image
from test_train_foster import run
from test_tsm_lora import save_all

import evaluate
from mini import digits
from mini import world as mini_world


def write_samples(folder, pictures, prompts):
    (folder / "samples").mkdir(parents=True)
    rows = [{"file_name": f"samples/{k:06d}.png", "text": prompt} for k, prompt in enumerate(prompts)]
    for row, picture in zip(rows, pictures):
        Image.fromarray(picture).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_evaluate(*argv):
    args = evaluate.parse_args(list(map(str, argv)))
    (evaluate.evaluate_loss if args.command == "loss" else evaluate.evaluate_pictures)(args)
    return json.loads(open(args.output_file).read())


@pytest.fixture(scope="module")
def renders():
    rng = np.random.default_rng(0)
    scenes = mini_world.scenes("target", "test", 60)
    return [mini_world.render(s) for s in scenes], [mini_world.caption(s, rng) for s in scenes]


def test_renders_score_100_percent(tmp_path, renders, capsys):
    right = write_samples(tmp_path / "right", *renders)
    grey = write_samples(tmp_path / "grey", [np.full((32, 32, 3), 128, np.uint8)] * 60, renders[1])
    scores = run_evaluate("mini", right, grey, "--output_file", tmp_path / "scores.json")
    for name, score in scores[str(right)].items():
        assert score["mean"] == 1 and 5 < score["count"] <= 60, name
        assert scores[str(grey)][name]["mean"] == 0
    assert scores[str(right)]["binding"]["count"] == 60
    assert "100.0 ± 0.0" in capsys.readouterr().out


def test_wrong_folders(tmp_path, renders):
    with pytest.raises(ValueError, match="has no metadata.jsonl"):
        run_evaluate("mini", tmp_path)
    folder = write_samples(tmp_path / "a", *renders)
    (folder / "samples" / "000007.png").write_bytes((folder / "samples" / "000007.png").read_bytes()[:90])
    with pytest.raises(ValueError, match="000007.png is no picture or is truncated"):
        run_evaluate("mini", folder)
    (folder / "samples" / "000007.png").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 60 samples"):
        run_evaluate("mini", folder)


def test_digits_are_read(tmp_path):
    """Held-out scans score high under their own digit and never under another."""
    folder = digits.image_folder("validation", tmp_path)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(folder / row["file_name"])) for row in rows]
    right = [row["text"] for row in rows]
    wrong = [f"the digit {digits.NAMES[(digits.NAMES.index(text.split()[-1]) + 1) % 10]}" for text in right]
    for name, prompts, low, high in (("right", right, 0.95, 1.0), ("wrong", wrong, 0.0, 0.03)):
        out = write_samples(tmp_path / name, pictures, prompts)
        score = run_evaluate("digits", out, "--output_file", tmp_path / "s.json")[str(out)]["digit"]
        assert low <= score["mean"] <= high and score["count"] == 256
    with pytest.raises(ValueError, match="names no digit"):
        digits.score(Image.new("RGB", (32, 32)), "a red circle")
    assert digits.image_folder("validation", tmp_path) == folder


def test_mean_and_error():
    mean, error = evaluate.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3 and error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert math.isnan(evaluate.mean_and_error([1.0])[1])


def test_loss_equals_that_of_training(world, tmp_path):
    """The same pictures, t and noise, whichever script asks; and a table with other intervals than the experts'."""
    folder = run(world, tmp_path / "run", "--validation_data_dir", world / "images")
    table = json.loads((tmp_path / "run" / "validation.json").read_text())["intervals"]
    flags = ("--validation_data_dir", world / "images", "--pretrained_model_name_or_path", world / "model")
    flags += ("--train_data_dir", world / "images")
    flags += ("--output_file", tmp_path / "loss.json", "--experts", folder)
    loss = run_evaluate("loss", *flags, "--num_intervals", 4)
    for ours, theirs in zip(loss["intervals"], table):
        assert ours["base"] == pytest.approx(theirs["base"], rel=1e-5)
        assert ours["experts"][str(folder)]["loss"] == pytest.approx(theirs["expert"], rel=1e-5)
        assert ours["experts"][str(folder)]["gain"]["mean"] == pytest.approx(theirs["gain"], rel=1e-3, abs=1e-6)
    save_all(tiny_sd(), tmp_path / "n1", 1)
    other = run_evaluate("loss", *flags, tmp_path / "n1", "--num_intervals", 2)
    assert [r["timesteps"] for r in other["intervals"]] == [[0, 499], [500, 999]]
    assert len(other["intervals"][0]["experts"]) == 2
