"""T2I-CompBench's scores of Tables 1, 4, 8, 10 and 11: Color, Shape, Texture, Spatial, Non-Spatial and Complex.

The rules of https://github.com/Karine-Huang/T2I-CompBench (https://arxiv.org/abs/2307.06350): how answers, detections
and similarities become a score, and the networks that give answers and similarities. Scores lie in 0..1; the paper
prints them times 100. A detection is (label, confidence, (x1, y1, x2, y2)), the likeliest first, in the 479x479 pixels
that the official detector sees. `doc` is a prompt read by spaCy, officially with en_core_web_sm.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torchvision import transforms

import evalcrafter

Box = tuple[float, float, float, float]
Detection = tuple[str, float, Box]

# ---------------------------------------------------------------------------------------------------------------------
# Color, Shape, Texture: BLIP-VQA

MAX_PHRASES = 8
NO_PHRASES = ("top", "the side", "the left", "the right")


def questions(noun_chunks: Sequence[str]) -> list[str]:
    """What BLIP is asked: each noun chunk of the prompt with a question mark, the first eight of them."""
    return [f"{chunk}?" for chunk in noun_chunks if chunk not in NO_PHRASES][:MAX_PHRASES]


def clean_question(text: str) -> str:
    """As BLIP's data loader cleans it: lower case, without . ! " ( ) * # : ; ~ but with commas, at most 50 words."""
    kept = "".join(character for character in text.lower() if character not in '.!"()*#:;~').rstrip(" ")
    return " ".join(kept.split(" ")[:50])


def attribute_score(probabilities: Sequence[float]) -> float:
    """Product of the probabilities of yes in float32, each and the product rounded to four decimals; 1 without a
    question."""
    product = np.float32(1)
    for probability in probabilities:
        product *= np.float32(f"{probability:.4f}")
    return float(f"{product:.4f}")


PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, and BLIP's


def pixel_values(image: Image.Image, size: int, crop: bool) -> torch.Tensor:
    """(1, 3, size, size), normalised. `crop`: CLIP's short side and middle square, else BLIP's squeeze to a square."""
    steps = [transforms.Resize(size if crop else (size, size), transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(PIXEL_MEAN, PIXEL_STD)]
    return transforms.Compose(steps)(image.convert("RGB"))[None]


@torch.no_grad()
def blip_probabilities(model, tokenizer, image: Image.Image, asked: Sequence[str]) -> list[float]:
    """How sure BLIP is of yes rather than no, per question. `model` is a BlipForQuestionAnswering.

    BLIP was trained with [ENC] in place of [CLS] and answers after [DEC]; transformers' own `generate` keeps [CLS].
    Each question is read by itself: transformers loses the mask of padding on the way to the decoder's attention.
    """
    config, device = model.config, model.device
    pixels = pixel_values(image, config.vision_config.image_size, crop=False).to(device)
    seen = model.vision_model(pixels).last_hidden_state
    dec = config.text_config.bos_token_id
    yes_no, probabilities = tokenizer.convert_tokens_to_ids(["yes", "no"]), []
    for question in asked:
        tokens = tokenizer(clean_question(question), truncation=True, max_length=35, return_tensors="pt")
        ids = tokens.input_ids.to(device)
        ids[:, 0] = dec + 1  # [ENC]
        states = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        start = torch.full((1, 1), dec, device=device)
        logits = model.text_decoder(input_ids=start, encoder_hidden_states=states).logits
        probabilities.append(logits[0, -1, yes_no].float().softmax(-1)[0].item())
    return probabilities


def blip_of_weights(state: dict[str, torch.Tensor]) -> transformers.BlipForQuestionAnswering:
    """The model of the official model_base_vqa_capfilt_large.pth, whose pictures are 480 wide (the hub's conversion
    Salesforce/blip-vqa-base squeezed its positions to 384). Sizes are read off the weights. Raises RuntimeError for
    weights that are missing or not BLIP's."""
    names = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    names |= {"patch_embed.proj.": "embeddings.patch_embedding.", "blocks.": "encoder.layers."}
    inner = {".attn.": ".self_attn.", ".proj.": ".projection.", ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2."}
    converted = {}
    for key, value in state.items():
        if key.startswith("visual_encoder."):
            key = key.removeprefix("visual_encoder.")
            old = next((old for old in names if key.startswith(old)), None)
            key = names[old] + key.removeprefix(old) if old else key.replace("norm.", "post_layernorm.")
            for old, new in inner.items() if key.startswith("encoder.") else ():
                key = key.replace(old, new)
            converted["vision_model." + key] = value
        elif not key.endswith("position_ids"):
            converted[key] = value
    width, patch = state["visual_encoder.patch_embed.proj.weight"].shape[::3]
    words, text_width = state["text_encoder.embeddings.word_embeddings.weight"].shape
    vision = {
        "image_size": patch * round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5),
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": len(state["visual_encoder.blocks.0.mlp.fc1.bias"]),
        "num_hidden_layers": sum(key.endswith("fc1.bias") for key in state),
        "num_attention_heads": max(1, width // 64),
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": words,
        "hidden_size": text_width,
        "encoder_hidden_size": width,
        "intermediate_size": len(state["text_encoder.encoder.layer.0.intermediate.dense.bias"]),
        "num_hidden_layers": sum(key.endswith("intermediate.dense.bias") for key in state) // 2,
        "num_attention_heads": max(1, text_width // 64),
        "max_position_embeddings": len(state["text_encoder.embeddings.position_embeddings.weight"]),
        "bos_token_id": words - 2,  # [DEC], before [ENC]
    }
    model = transformers.BlipForQuestionAnswering(transformers.BlipConfig(text_config=text, vision_config=vision))
    model.load_state_dict(converted)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Spatial

RELATIONS = (  # the first that the prompt contains counts
    *("on side of", "next to", "near", "on the left of", "on the right of"),
    *("on the bottom of", "on the top of", "on top of"),
)
PERSONS = ("girl", "boy", "man", "woman")
NEAR_PIXELS, MAX_IOU = 150, 0.1


def relation_of(prompt: str) -> str | None:
    return next((relation for relation in RELATIONS if relation in prompt), None)


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (sum(areas) - width * height) if width * height else 0.0


def position_score(relation: str | None, first: Box, second: Box) -> float:
    """How well two boxes stand in a relation. `on top of` has no rule and always gives 0, officially."""
    dx, dy = ((second[k] + second[k + 2]) / 2 - (first[k] + first[k + 2]) / 2 for k in (0, 1))
    if relation in ("next to", "on side of", "near"):
        if abs(dx) < NEAR_PIXELS or abs(dy) < NEAR_PIXELS:
            return 1.0
        return NEAR_PIXELS / max(abs(dx), abs(dy))
    holds = {
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }
    if not holds.get(relation, False):
        return 0.0
    overlap = iou(first, second)
    return 1.0 if overlap < MAX_IOU else MAX_IOU / overlap


def spatial_score(prompt: str, nouns: tuple[str, str] | None, detections: Sequence[Detection]) -> float:
    """Half for the two objects' confidences, half for their position; less than half of it all counts as nothing."""
    if nouns is None:
        return 0.0
    names = ["person" if noun in PERSONS else noun for noun in nouns]
    found = [next((d for d in detections if d[0] == name), None) for name in names]
    score = sum(0.25 * d[1] for d in found if d is not None)
    if all(d is not None for d in found):
        score += 0.5 * position_score(relation_of(prompt), found[0][2], found[1][2])
    return score if score >= 0.5 else 0.0


def spatial_nouns(doc) -> tuple[str, str] | None:
    """First and last noun of a spatial prompt."""
    nouns = [token.text for token in doc if token.pos_ == "NOUN"]
    return (nouns[0], nouns[-1]) if nouns else None


def detections(detector, processor, image: Image.Image, nouns: tuple[str, str]) -> list[Detection]:
    """What GroundingDINO finds of two nouns: a substitute for UniDet, whose numbers it does not give."""
    scale, found = (479 / image.width, 479 / image.height) * 2, []
    for name in {"person" if noun in PERSONS else noun for noun in nouns}:
        boxes, sure = evalcrafter.detect(detector, processor, np.array(image), name, threshold=0.25)
        found += [(name, s, tuple(x * k for x, k in zip(box, scale))) for box, s in zip(boxes.tolist(), sure.tolist())]
    return sorted(found, key=lambda d: -d[1])


# ---------------------------------------------------------------------------------------------------------------------
# Non-Spatial: CLIP


@torch.no_grad()
def clip_similarity(model, tokenizer, image: Image.Image, text: str) -> float:
    """Cosine between CLIP's embeddings of a picture and of a text, cut to CLIP's 77 tokens."""
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt").to(model.device)
    words = model.text_projection(model.text_model(**tokens).pooler_output)
    pixels = pixel_values(image, model.config.vision_config.image_size, crop=True).to(model.device, model.dtype)
    seen = model.visual_projection(model.vision_model(pixels).pooler_output)
    return F.cosine_similarity(seen.float(), words.float()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Complex: 3-in-1

PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")


def complex_nouns(doc) -> tuple[str, str] | None:
    """The nouns before and after the one preposition of a complex prompt; None unless there are exactly two.

    A name counts before the preposition, and after it where no noun follows: then the end of the first run of names,
    unless the prompt ends with it.
    """
    nouns = []
    for i in range(len(doc)):
        length = next((k for k in (3, 2, 1) if doc[i : i + k].text in PREPOSITIONS), None)
        if length is None:
            continue
        after = doc[i + length :]
        nouns += [token.text for token in reversed(doc[:i]) if token.pos_ in ("NOUN", "PROPN")][:1]
        behind = [token.text for token in after if token.pos_ == "NOUN"]
        if not behind:
            pairs = zip(after, after[1:])
            behind = [token.text for token, following in pairs if token.pos_ == "PROPN" != following.pos_]
        nouns += behind[:1]
    return tuple(nouns) if len(nouns) == 2 else None


def without_adjectives(doc) -> str:
    """What CLIP is given of a complex prompt."""
    return " ".join(token.text for token in doc if token.pos_ != "ADJ")


def prompt_key(prompt: str) -> str:
    """What the official lists of spatial and of action prompts are searched for: up to the first full stop."""
    return prompt.strip().split(".")[0].lower()


def complex_score(prompt: str, attribute: float, spatial: float, clip: float, lists: dict[str, set[str]]) -> float:
    """Mean of the attributes' score with that of what else the prompt demands. `lists` holds prompt_key of the
    prompts of complex_val_spatial.txt and complex_val_action.txt under "spatial" and "action"."""
    if prompt_key(prompt) in lists["spatial"]:
        return (spatial + attribute) / 2
    if prompt_key(prompt) in lists["action"]:
        return (clip + attribute) / 2
    return (attribute + spatial + clip) / 3


# ---------------------------------------------------------------------------------------------------------------------
# GORS

THRESHOLDS = {  # for the 560 template prompts of a training file, and for the natural ones; `mini` is our own
    "color": (0.92, 0.70),
    "shape": (0.85, 0.60),
    "texture": (0.90, 0.65),
    "spatial": (0.8, 0.8),
    "non_spatial": (0.75, 0.75),  # of 2.5 * cosine: a raw cosine never gets there
    "complex": (0.4, 0.4),
    "mini": (0.8, 0.8),
}
TEMPLATES = 560


def keep_reward(category: str, prompt_index: int, reward: float) -> bool:
    """Whether GORS trains on a picture of the prompt with that (0-based) number in the training file."""
    return reward > THRESHOLDS[category][prompt_index >= TEMPLATES]
