"""EvalCrafter's rules, beside numbers that the official functions gave."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import environment, tiny_clip, tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_large
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    PreTrainedTokenizerFast,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)

import data
import evalcrafter as ec
import evaluate


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


# -- networks, small and random, of the real classes


def noise_clip(frames=16, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


class Stand(nn.Module):
    """In the place of the Inception file: softmax over channel means."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([5.0, 0.0, 0.0]))

    def forward(self, x: torch.Tensor, no_output_bias: bool = False):
        assert x.shape[2] == 299 and x.shape[3] == 299
        logits = x.mean((2, 3)) / 50
        return (logits if no_output_bias else logits + self.bias).softmax(1)


def test_inception_network(tmp_path):
    torch.jit.script(Stand()).save(tmp_path / "inception.pt")
    clip = noise_clip()
    ours = ec.inception_probabilities(torch.jit.load(tmp_path / "inception.pt"), clip)
    frames = F.interpolate(torch.from_numpy(clip).permute(0, 3, 1, 2).float(), (299, 299), mode="bilinear")
    torch.testing.assert_close(ours, (frames.mean((2, 3)) / 50).softmax(1))


def tiny_videomae():
    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    return VideoMAEForVideoClassification(config).eval()


def mmaction_names(state):
    """The inverse of the key map, written from mmaction2's side."""
    theirs = {"backbone.pos_embed": torch.zeros(1, 8, 16)}
    for key, value in state.items():
        key = key.replace("videomae.embeddings.patch_embeddings", "backbone.patch_embed")
        key = key.replace("videomae.encoder.layer", "backbone.blocks").replace("layernorm_before", "norm1")
        key = key.replace("layernorm_after", "norm2").replace("attention.output.dense", "attn.proj")
        key = key.replace("intermediate.dense", "mlp.layers.0.0").replace("output.dense", "mlp.layers.1")
        key = key.replace("attention.attention.query.bias", "attn.q_bias")
        key = key.replace("attention.attention.value.bias", "attn.v_bias")
        theirs[key.replace("fc_norm", "backbone.fc_norm").replace("classifier", "cls_head.fc_cls")] = value
    for i in range(2):
        names = [f"backbone.blocks.{i}.attention.attention.{name}.weight" for name in ("query", "key", "value")]
        theirs[f"backbone.blocks.{i}.attn.qkv.weight"] = torch.cat([theirs.pop(name) for name in names])
    return theirs


def test_videomae_key_map():
    model = tiny_videomae()
    theirs = mmaction_names(model.state_dict())
    assert "backbone.blocks.1.attn.qkv.weight" in theirs and "cls_head.fc_cls.bias" in theirs
    converted = ec.convert_videomae(theirs)
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="backbone.neck.weight is no weight"):
        ec.convert_videomae({"backbone.neck.weight": torch.zeros(1)})


def test_action_network():
    """15 views: 5 times 3 crops at the left, middle and right of a wide clip; the mean of their probabilities."""
    model, clip = tiny_videomae(), noise_clip(24)
    views = ec.action_views(clip, 32)
    assert views.shape == (15, 16, 3, 32, 32)
    frame = F.interpolate(torch.from_numpy(clip[20:21]).permute(0, 3, 1, 2) / 255, (32, 43), mode="bilinear")[0]
    mean, std = torch.tensor(ec.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(ec.IMAGENET_STD).view(3, 1, 1)
    for crop, x in enumerate((0, 5, 10)):
        torch.testing.assert_close(views[5 * crop, 5], (frame[..., x : x + 32] - mean) / std, atol=1e-5, rtol=1e-5)
    tall = ec.action_views(clip.transpose(0, 2, 1, 3), 32)
    torch.testing.assert_close(tall, views.transpose(-1, -2), atol=1e-5, rtol=1e-5)
    probabilities = ec.action_probabilities(model, clip)
    with torch.no_grad():
        expected = model(views).logits.softmax(-1).mean(0)
    assert probabilities == pytest.approx(expected.numpy(), abs=1e-6) and probabilities.sum() == pytest.approx(1)


def tiny_text_model(tokenizer):
    text = tiny_clip(tokenizer).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def test_text_similarities():
    """Padding does not count, and a text is like itself."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_text_model(tokenizer)
    together = ec.text_similarities(model, tokenizer, ["abc", "run", "x"], "run")
    alone = [ec.text_similarities(model, tokenizer, [label], "run")[0] for label in ("abc", "run", "x")]
    assert together == pytest.approx(alone, abs=1e-5) and together[1] == pytest.approx(1, abs=1e-5)
    assert together[0] < 0.999


def test_flow_network():
    """The last of 20 updates on padded frames in [-1, 1], its length averaged with the padding."""
    torch.manual_seed(0)
    raft, clip = raft_large(weights=None).eval(), noise_clip(3, 130, 132)
    ours = ec.mean_flows(raft, clip)
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
    frames = F.pad(frames, (2, 2, 3, 3), mode="replicate")
    with torch.no_grad():
        flow = raft(frames[:1], frames[1:2], num_flow_updates=20)[-1]
    assert len(ours) == 2 and ours[0] == pytest.approx(flow.square().sum(1).sqrt().mean().item(), rel=1e-5)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_blip():
    torch.manual_seed(0)
    vocab = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special, additional_special_tokens=["<image>"])
    text = {"model_type": "opt", "vocab_size": 13, "ffn_dim": 16, "word_embed_proj_dim": 16, **SMALL}
    text |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Blip2Config(
        vision_config={"image_size": 16, "patch_size": 8, **SMALL},
        qformer_config={"vocab_size": 13, "encoder_hidden_size": 16, **SMALL},
        text_config=text,
        num_query_tokens=3,
        image_token_index=4,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    pictures = BlipImageProcessor(size={"height": 16, "width": 16}, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    return model, Blip2Processor(pictures, tokenizer, num_query_tokens=3)


def tiny_detector():
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "bear"]
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    swin = {"window_size": 7, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "out_indices": [2, 3, 4]}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(image_size=64, **swin),
        text_config={"model_type": "bert", "vocab_size": 8, **SMALL},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=20,
        max_text_len=16,
        disable_custom_kernels=True,
    )
    detector = GroundingDinoForObjectDetection(config).eval()
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 80, "longest_edge": 120})
    return detector, GroundingDinoProcessor(pictures, tokenizer)


def tiny_segmenter():
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 16, "mlp_dim": 16, "output_channels": 16, "window_size": 2, **SMALL}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "image_embedding_size": 4}
    decoder = {"mlp_dim": 16, "iou_head_hidden_dim": 16, **SMALL}
    config = SamConfig(
        vision_config={**vision, "global_attn_indexes": [0], "num_pos_feats": 8},
        prompt_encoder_config={**prompt, "mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    sam, size = SamModel(config).eval(), {"height": 64, "width": 64}
    small = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    return sam, SamProcessor(SamImageProcessor(size={"longest_edge": 64}, pad_size=size, **small))


def test_captions(monkeypatch):
    """Five frames with red and blue exchanged reach BLIP-2, and its greedy words come back."""
    (model, processor), seen = tiny_blip(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    clip = np.zeros((17, 40, 50, 3), np.uint8)
    clip[..., 0], clip[..., 2] = 200, np.arange(17)[:, None, None] * 10  # red, and blue that grows
    captions = ec.blip_captions(model, processor, clip)
    assert len(captions) == 5 and all(set(c.split()) <= set("abcdefgh") and len(c.split()) <= 20 for c in captions)
    assert not seen[0]["do_sample"] and seen[0]["max_new_tokens"] == 20 and seen[0]["num_beams"] == 1
    levels = seen[0]["pixel_values"].mean((2, 3)) * 255
    assert levels[:, 2].tolist() == pytest.approx([200] * 5, abs=1)
    assert levels[:, 0].tolist() == pytest.approx([0, 40, 80, 120, 160], abs=1)


def test_boxes():
    (detector, processor), frame = tiny_detector(), noise_clip(1, 40, 60)[0]
    boxes, scores = ec.detect(detector, processor, frame, "Bear")
    inputs = processor(images=frame, text="bear.", return_tensors="pt")
    with torch.no_grad():
        outputs = detector(**inputs)
    sure = outputs.logits[0].sigmoid().amax(-1) > 0.6
    centres, sizes = outputs.pred_boxes[0, sure].split(2, -1)
    corners = torch.cat([centres - sizes / 2, centres + sizes / 2], -1) * torch.tensor([60, 40, 60, 40])
    torch.testing.assert_close(boxes, corners, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scores, outputs.logits[0, sure].sigmoid().amax(-1))


def test_masks():
    """Ids in the boxes' order, the later over the earlier, of the best mask refined by its own logits."""
    sam, processor = tiny_segmenter()
    frame, boxes = noise_clip(1, 40, 60)[0], torch.tensor([[5.0, 5.0, 30.0, 30.0], [10.0, 2.0, 50.0, 30.0]])
    masks = []
    for box in boxes:
        inputs, mask = processor(frame, input_boxes=[[box.tolist()]], return_tensors="pt"), None
        with torch.no_grad():
            for _ in range(2):
                out = sam(**inputs, input_masks=mask)
                mask = out.pred_masks[0, :, out.iou_scores[0, 0].argmax()][:, None]
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        masks.append(processor.image_processor.post_process_masks([mask], *sizes)[0][0, 0].numpy())
    expected = np.where(masks[1], 2, np.where(masks[0], 1, 0))
    ids = ec.object_ids(boxes, sam, processor, frame)
    assert (ids == expected).mean() > 0.999 and ids.any()
    assert not ec.object_ids(boxes[:0], sam, processor, frame).any()


# -- the command


@pytest.fixture
def videos(tmp_path):
    """Three clips, their metadata, and networks in files."""
    (tmp_path / "videos").mkdir()
    for k in range(3):
        frames = noise_clip(4, 128, 128) if k < 2 else np.stack([noise_clip(1, 128, 128)[0]] * 4)
        data.write_clip([Image.fromarray(frame) for frame in frames], tmp_path / "videos" / f"{k:04d}.mp4", 8)
    entries = {f"{k:04d}": {"prompt": "a bear", "attributes": {"amp": "large" if k == 0 else ""}} for k in range(4)}
    entries["0002"]["attributes"]["amp"] = "slow"
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    torch.jit.script(Stand()).save(tmp_path / "inception.pt")
    torch.manual_seed(0)
    save_file(raft_large(weights=None).state_dict(), tmp_path / "raft.safetensors")
    return tmp_path


def flags_of(videos, *flags):
    files = ["--metadata", videos / "metadata.json", "--inception_path", videos / "inception.pt"]
    files += ["--raft_path", videos / "raft.safetensors", "--output_dir", videos / "out"]
    return [str(flag) for flag in ("evalcrafter", videos / "videos", *files, *flags)]


def command(videos, *flags):
    return evaluate.parse_args(flags_of(videos, *flags))


def test_command_measures_each_clip_once(videos, monkeypatch):
    evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is", "amplitude"))
    result = json.loads((videos / "out" / "result.json").read_text())
    assert result["counts"] == {"is": 3, "amplitude": 2} and 1 <= result["scores"]["is"] < 1.1
    flows = {name: np.load(videos / "out" / "amplitude" / f"{name}.npy") for name in ("0000", "0002")}
    right = [ec.amplitude(flows["0000"]) == "large", ec.amplitude(flows["0002"]) == "slow"]
    assert result["scores"]["amplitude"] == np.mean(right)
    (videos / "out" / "is" / "0001.npy").unlink()
    seen, measured = [], ec.inception_probabilities
    monkeypatch.setattr(ec, "inception_probabilities", lambda *a: seen.append(1) or measured(*a))
    monkeypatch.setattr(ec, "mean_flows", lambda *a: pytest.fail("all flows are there"))
    evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is", "amplitude"))
    assert json.loads((videos / "out" / "result.json").read_text()) == result and len(seen) == 1


def test_two_processes_measure_the_same(videos):
    evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    one = json.loads((videos / "out" / "result.json").read_text())
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", evaluate.__file__]
    argv += flags_of(videos, "--metrics", "is", "--output_dir", videos / "two")
    subprocess.run([sys.executable, *argv], env=environment(), check=True, capture_output=True)
    assert json.loads((videos / "two" / "result.json").read_text()) == one


def test_command_loads_every_network(videos):
    """From folders as a hub has them."""
    entries = json.loads((videos / "metadata.json").read_text())
    for entry in entries.values():
        entry["attributes"] |= {"action": "run", "color": "red bear", "count": "3 bear"}
    (videos / "metadata.json").write_text(json.dumps(entries))
    tokenizer = tiny_tokenizer()
    folders = {"caption_model": tiny_blip(), "detector": tiny_detector(), "segmenter": tiny_segmenter()}
    folders["clip_model"] = tiny_text_model(tokenizer), tokenizer
    for name, parts in folders.items():
        for part in parts:
            part.save_pretrained(videos / name)
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, num_labels=3))
    model.save_pretrained(videos / "action_model")
    (videos / "labels.txt").write_text("run\njump\nsit\n")
    flags = [part for name in (*folders, "action_model") for part in (f"--{name}", videos / name)]
    flags += ["--action_labels", videos / "labels.txt", "--metrics", "action", "blip_bleu", "color", "count"]
    evaluate.evaluate_evalcrafter(command(videos, *flags))
    scores = json.loads((videos / "out" / "result.json").read_text())["scores"]
    assert scores.keys() == {"action", "blip_bleu", "color", "color_corrected", "count"}
    assert all(0 <= value <= 1 for value in scores.values()) and scores["action"] > 0
    rows = np.load(videos / "out" / "count" / "0000.npy")
    assert rows.shape == (1, 3)  # of 4 frames the first alone is looked at


def test_command_wrong_input(videos):
    with pytest.raises(ValueError, match="--inception_path nowhere.pt: there is no such file"):
        evaluate.evaluate_evalcrafter(command(videos, "--inception_path", "nowhere.pt"))
    with pytest.raises(ValueError, match="the metric action needs --action_model and --action_labels"):
        entries = {"0000": {"prompt": "x", "action": "run"}, "0001": {"prompt": "x"}, "0002": {"prompt": "x"}}
        (videos / "other.json").write_text(json.dumps(entries))
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "action", "--metadata", videos / "other.json"))
    with pytest.raises(ValueError, match="gives none of the 3 clips the attribute 'color'"):
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "color"))
    evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    with pytest.raises(ValueError, match="was measured with"):
        (videos / "metadata.json").write_text((videos / "metadata.json").read_text().replace("bear", "cat"))
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    (videos / "metadata.json").write_text((videos / "metadata.json").read_text().replace("cat", "bear"))
    (videos / "metadata.jsonl").write_text(json.dumps({"file_name": "samples/0001.mp4", "text": "a car"}) + "\n")
    with pytest.raises(ValueError, match="0001.mp4 was made for 'a car', .* says 'a bear'"):
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    (videos / "metadata.jsonl").unlink()
    (videos / "videos" / "0001.mp4").write_bytes(b"no clip")
    os.utime(videos / "videos" / "0001.mp4", (1, 1))  # another time also where a file system's are coarse
    with pytest.raises(ValueError, match="0001.mp4 is no clip"):
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    (videos / "videos" / "0009.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"knows no \['0009'\]"):
        evaluate.evaluate_evalcrafter(command(videos, "--metrics", "is"))
    with pytest.raises(ValueError, match="no .mp4 there"):
        args = command(videos, "--metrics", "is")
        args.video_dir = str(videos / "out")
        evaluate.evaluate_evalcrafter(args)
