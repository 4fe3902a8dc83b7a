"""EvalCrafter's scores of Tables 2 and 5: IS, Action, Amplitude, BLIP-BLEU, Color and Count of generated clips.

The rules of https://github.com/evalcrafter/EvalCrafter (https://arxiv.org/abs/2310.11440): per score the pure rule,
then the network that feeds it. Where a rule has a plain defect, the official one keeps its name and `corrected=True`
gives ours. All scores lie in 0..1 but IS; the paper prints them times 100. Clips are (F, H, W, 3) uint8.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Inception score


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation over `splits` contiguous parts of exp(mean KL(p || mean p)).

    probabilities: (frames, classes), the frames of each clip together. A probability of exactly 0 gives nan, as there.
    """
    scores = []
    for i in range(splits):
        part = probabilities[i * len(probabilities) // splits : (i + 1) * len(probabilities) // splits]
        divergence = (part * (part.log() - part.mean(0, keepdim=True).log())).sum(1).mean()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std().item() if splits > 1 else 0.0


@torch.no_grad()
def inception_probabilities(inception, clip: np.ndarray) -> torch.Tensor:
    """(F, 1008) of each frame, squeezed to 299x299. `inception` is the TorchScript file inception-2015-12-05.pt, whose
    pictures are 0..255 and whose `no_output_bias` drops the last bias, as EvalCrafter does."""
    frames = torch.from_numpy(clip).movedim(-1, 1).float()  # (F, 3, H, W)
    frames = F.interpolate(frames, size=(299, 299), mode="bilinear", align_corners=False)
    device = next(inception.parameters()).device
    return torch.cat([inception(part.to(device), no_output_bias=True).cpu() for part in frames.split(16)])


# ---------------------------------------------------------------------------------------------------------------------
# Action


def action_frames(total: int) -> np.ndarray:
    """Frames of the 5 clips that the classifier sees, (5, 16): every fourth one, over again where a clip is short."""
    starts = np.round(np.arange(5) * max(total - 61, 0) / 4).astype(int)
    return (starts[:, None] + 4 * np.arange(16)) % total


def action_score(probabilities: Sequence[float], similarities: Sequence[float]) -> float:
    """Sum over the five likeliest of 400 actions of probability times the similarity of their names to the demanded
    one."""
    best = np.argsort(np.asarray(probabilities, float))[::-1][:5]
    return float(sum(probabilities[k] * similarities[k] for k in best))


def convert_videomae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of mmaction2's VideoMAE-v2 under the names of transformers' VideoMAEForVideoClassification. Its fixed
    sinusoidal positions are left out. Raises ValueError for a name that is not known."""
    layer = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    layer |= {"mlp.layers.0.0": "intermediate.dense", "mlp.layers.1": "output.dense"}
    own = {"backbone.patch_embed.projection": "videomae.embeddings.patch_embeddings.projection"}
    own |= {"backbone.fc_norm": "fc_norm", "cls_head.fc_cls": "classifier"}
    converted = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key == "backbone.pos_embed" or key.startswith("data_preprocessor."):
            continue
        if module in own:
            converted[f"{own[module]}.{kind}"] = value
        elif key.startswith("backbone.blocks."):
            number, inner = key.removeprefix("backbone.blocks.").split(".", 1)
            block, inner_module = f"videomae.encoder.layer.{number}", inner.rpartition(".")[0]
            attention = f"{block}.attention.attention"
            if inner == "attn.qkv.weight":
                for name, part in zip(("query", "key", "value"), value.chunk(3)):
                    converted[f"{attention}.{name}.weight"] = part
            elif inner in ("attn.q_bias", "attn.v_bias"):
                converted[f"{attention}.{'query' if inner == 'attn.q_bias' else 'value'}.bias"] = value
            elif inner_module in layer:
                converted[f"{block}.{layer[inner_module]}.{kind}"] = value
            else:
                raise ValueError(f"{key} is no weight of VideoMAE-v2 as mmaction2 names them")
        else:
            raise ValueError(f"{key} is no weight of VideoMAE-v2 as mmaction2 names them")
    return converted


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def action_views(clip: np.ndarray, size: int = 224) -> torch.Tensor:
    """(15, 16, 3, size, size): 5 clips by 3 crops along the longer side, normalised."""
    frames = torch.from_numpy(clip[action_frames(len(clip)).ravel()]).movedim(-1, 1).float()  # (80, 3, H, W)
    h, w = frames.shape[2:]
    shape = (size, round(w * size / h)) if h <= w else (round(h * size / w), size)
    frames = F.interpolate(frames, size=shape, mode="bilinear", align_corners=False) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    frames = ((frames - mean) / std).unflatten(0, (5, 16))
    steps = [(side - size) // 2 for side in shape]
    return torch.cat([frames[..., k * y : k * y + size, k * x : k * x + size] for y, x in [steps] for k in range(3)])


@torch.no_grad()
def action_probabilities(model, clip: np.ndarray) -> np.ndarray:
    """(400,): the mean over the views. `model` is a VideoMAEForVideoClassification."""
    views = action_views(clip, model.config.image_size)
    logits = torch.cat([model(view[None].to(model.device)).logits for view in views])
    return logits.softmax(-1).mean(0).cpu().numpy()


@torch.no_grad()
def text_similarities(clip_model, tokenizer, texts: Sequence[str], text: str) -> np.ndarray:
    """Cosines between CLIP's embeddings of `texts` and of `text`."""
    tokens = tokenizer([*texts, text], padding=True, truncation=True, return_tensors="pt").to(clip_model.device)
    embeddings = clip_model.text_projection(clip_model.text_model(**tokens).pooler_output)
    embeddings = F.normalize(embeddings.float(), dim=-1)
    return (embeddings[:-1] @ embeddings[-1]).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Amplitude


def flow_padding(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) to multiples of 8, centred."""
    down, across = -height % 8, -width % 8
    return across // 2, across - across // 2, down // 2, down - down // 2


def amplitude(mean_flows: Sequence[float]) -> str:
    """`large` or `slow`, of the mean length of the optical flow between consecutive frames, in pixels."""
    return "large" if float(np.mean(mean_flows)) > 5 else "slow"


@torch.no_grad()
def mean_flows(raft, clip: np.ndarray) -> list[float]:
    """Mean flow length of each pair of consecutive frames, padding included. `raft` is torchvision's raft_large."""
    frames = torch.from_numpy(clip).movedim(-1, 1).float() / 127.5 - 1
    frames = F.pad(frames, flow_padding(*frames.shape[2:]), mode="replicate")
    frames = frames.to(next(raft.parameters()).device)
    pairs = zip(frames[:-1, None], frames[1:, None])
    return [raft(a, b, num_flow_updates=20)[-1].norm(dim=1).mean().item() for a, b in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# BLIP-BLEU


def caption_frames(total: int) -> np.ndarray:
    """The five frames that are captioned."""
    return np.floor(np.linspace(0, total - 1, 5)).astype(int)


def bleu(reference: str, candidate: str, order: int = 4) -> list[float]:
    """BLEU-1 .. BLEU-`order` of one sentence by pycocoevalcap's rules: words as they stand, clipped counts,
    (c + 1e-15) / (g + 1e-9), and the brevity penalty."""
    words, wanted = candidate.split(), reference.split()
    product, scores = 1.0, []
    for n in range(1, order + 1):
        grams, known = (Counter(tuple(w[k : k + n]) for k in range(len(w) - n + 1)) for w in (words, wanted))
        product *= ((grams & known).total() + 1e-15) / (max(0, len(words) - n + 1) + 1e-9)
        scores.append(product ** (1 / n))
    ratio = (len(words) + 1e-15) / (len(wanted) + 1e-9)
    return [score * math.exp(1 - 1 / ratio) if ratio < 1 else score for score in scores]


def blip_bleu(prompt: str, captions: Sequence[str]) -> float:
    """Mean over n = 1..4 of the largest of BLEU-1 .. BLEU-n over the captions (so it is the largest BLEU-1)."""
    return float(np.mean([max(max(bleu(prompt, caption, n)) for caption in captions) for n in range(1, 5)]))


@torch.no_grad()
def blip_captions(model, processor, clip: np.ndarray) -> list[str]:
    """BLIP-2's greedy captions of five frames at 224x224, red and blue exchanged, as officially."""
    frames = torch.from_numpy(clip[caption_frames(len(clip))]).movedim(-1, 1).float()
    frames = F.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False).round().byte().flip(1)
    inputs = processor(images=list(frames), return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=1)
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Color and Count: on frames 0, 5, 10, ... and the ids of the tracked objects in them


def attribute_frames(total: int) -> np.ndarray:
    return np.arange(0, total, 5)


def opencv_hue(frame: np.ndarray) -> np.ndarray:
    """H of OpenCV's 8-bit RGB to HSV, 0..179, in its own integer arithmetic: (H, W, 3) uint8 -> (H, W) int."""
    r, g, b = np.moveaxis(frame.astype(np.int64), -1, 0)
    value = frame.max(-1).astype(np.int64)
    chroma = value - frame.min(-1)
    table = np.zeros(256, np.int64)
    table[1:] = np.rint((180 << 12) / (6.0 * np.arange(1, 256)))
    sixths = np.where(value == r, g - b, np.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = (sixths * table[chroma] + (1 << 11)) >> 12
    return hue + 180 * (hue < 0)


def mean_hue(frame: np.ndarray, ids: np.ndarray, corrected: bool = False) -> float:
    """Mean hue of the tracked objects, nan where there are none. The official one multiplies the hue by the id in
    8 bits, so that ids above 1 turn the colour; corrected, an id only says whether a pixel counts."""
    hue = opencv_hue(frame)
    if corrected:
        return float(hue[ids > 0].mean()) if (ids > 0).any() else math.nan
    product = hue.astype(np.uint8) * ids.astype(np.uint8)
    return float(product.sum() / np.count_nonzero(product)) if product.any() else math.nan


def hue_class(hue: float) -> str:
    """The colour name of a mean hue; nan counts as red, officially."""
    limits = (("red", 15), ("orange", 22), ("yellow", 39), ("green", 78), ("blue", 131))
    return next((name for name, limit in limits if hue < limit), "red")


def color_score(hues: Sequence[float], color: str, corrected: bool = False) -> float:
    """Share of frames whose mean hue has the demanded colour. Corrected, a frame without an object is a miss."""
    return float(np.mean([hue_class(hue) == color and not (corrected and math.isnan(hue)) for hue in hues]))


def count_score(counts: Sequence[int], wanted: float) -> float:
    """1 less the mean relative error of the number of objects, at least 0."""
    return 1 - min(1.0, float(np.mean(np.abs(np.asarray(counts, float) - wanted) / wanted)))


def attribute(text: str) -> tuple[str, str]:
    """`3 bear` or `blue car` of the metadata: the first word and the noun."""
    first, _, noun = text.strip().partition(" ")
    if not noun:
        raise ValueError(f"the attribute {text!r} is not of the form '3 bear' or 'blue car'")
    return first, noun


@torch.no_grad()
def detect(
    detector, processor, frame: np.ndarray, noun: str, threshold: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, 4) corners, in pixels, of what GroundingDINO takes for the noun with more than the threshold, and (k,) how
    sure it is."""
    inputs = processor(images=frame, text=noun.lower() + ".", return_tensors="pt").to(detector.device)
    options = {"threshold": threshold, "text_threshold": 0.5, "target_sizes": [frame.shape[:2]]}
    outputs = detector(**inputs)
    found = processor.post_process_grounded_object_detection(outputs, inputs["input_ids"], **options)[0]
    return found["boxes"].cpu(), found["scores"].cpu()


@torch.no_grad()
def object_ids(boxes: torch.Tensor, segmenter, processor, frame: np.ndarray) -> np.ndarray:
    """(H, W): SAM's best mask for each box, refined by its own logits and painted with 1, 2, ... in the boxes' order,
    later ones over earlier ones.

    Officially the ids of frame 0 are tracked by DeAOT, which no package provides: here every frame is segmented anew.
    """
    ids = np.zeros(frame.shape[:2], np.uint8)
    if not len(boxes):
        return ids
    inputs = processor(frame, input_boxes=[boxes.tolist()], return_tensors="pt").to(segmenter.device)
    image = segmenter.get_image_embeddings(inputs["pixel_values"])
    for k in range(len(boxes)):
        box, mask = inputs["input_boxes"][:, k : k + 1].float(), None
        for _ in range(2):
            outputs = segmenter(image_embeddings=image, input_boxes=box, input_masks=mask, multimask_output=True)
            best = outputs.iou_scores[0, 0].argmax()
            mask = outputs.pred_masks[:, 0, best : best + 1]  # (1, 1, h, w)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        whole = processor.image_processor.post_process_masks([mask], *sizes)[0]
        ids[whole[0, 0].cpu().numpy()] = k + 1
    return ids
