"""Random pipelines of the stock classes, small enough to build in a blink; no network."""

import json
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes with spinning threads are ten times slower

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

torch.set_num_threads(1)


def delta(layer, slot: int, bank: int = 0) -> torch.Tensor:
    """What an expert adds to the base weight, alpha / r * B A in fp32: (d_out, d_in[, kh, kw])."""
    A, B = (factor.detach().float() for factor in layer.expert(slot, bank))
    return (B.t() @ A.flatten(1)).view(B.shape[1], *A.shape[1:]) * layer.scaling


def tiny_tokenizer(length: int = 12) -> CLIPTokenizer:
    """CLIP's byte vocabulary without merges: every text can be encoded, a letter a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=length)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = tiny_vae()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (unet, vae, text_encoder):
        module.eval()
    return pipe


def tiny_pixart(seed: int = 0) -> PixArtAlphaPipeline:
    torch.manual_seed(seed)
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *letters], extra_ids=0, model_max_length=120
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,  # with a learned variance
    )
    nn.init.normal_(transformer.proj_out.weight)
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=tiny_vae(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return tiny_sd()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A saved random pipeline and an image folder of 22 pictures of several sizes."""
    root = tmp_path_factory.mktemp("world")
    tiny_sd().save_pretrained(root / "model")
    (root / "images").mkdir()
    numbers, lines = random.Random(0), []
    for k in range(22):
        size = numbers.randrange(18, 30), numbers.randrange(18, 30)
        pixels = bytes(numbers.randrange(256) for _ in range(3 * size[0] * size[1]))
        Image.frombytes("RGB", size, pixels).save(root / "images" / f"{k:02d}.png")
        lines.append(json.dumps({"file_name": f"{k:02d}.png", "text": f"thing {k}"}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **more}


def assert_identical(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
