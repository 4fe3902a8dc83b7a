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
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from PIL import Image  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from videocrafter import UNet3DVideoCrafterConditionModel, VideoCrafterDDIMScheduler  # noqa: E402

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


def tiny_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def tiny_clip(tokenizer, width: int = 16, projected: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tiny_t5(width: int = 16) -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=120)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval(), tokenizer


def tiny_unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **options,
    ).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = tiny_clip(tokenizer)
    unet = tiny_unet(cross_attention_dim=16)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return quiet(
        StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = tiny_unet(
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 24,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(tokenizer, 24, projected=True),
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )
    )


def tiny_pixart(seed: int = 0) -> PixArtAlphaPipeline:
    torch.manual_seed(seed)
    text_encoder, tokenizer = tiny_t5()
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
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=tiny_vae(),
            transformer=transformer.eval(),
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


def tiny_sd3(seed: int = 0, with_t5: bool = True) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer, (t5, t5_tokenizer) = tiny_tokenizer(), tiny_t5(48) if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=48,  # wider than both CLIPs together, as SD3's
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
    )
    nn.init.normal_(transformer.proj_out.weight)
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=tiny_clip(tokenizer, projected=True),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(tokenizer, 24, projected=True),
            tokenizer_2=tokenizer,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
    )


def tiny_flux(seed: int = 0) -> FluxPipeline:
    torch.manual_seed(seed)
    tokenizer, (t5, t5_tokenizer) = tiny_tokenizer(), tiny_t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    nn.init.normal_(transformer.proj_out.weight)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    return quiet(pipe)


def tiny_video(seed: int = 0, modelscope: bool = False) -> TextToVideoSDPipeline:
    """VideoCrafter2's classes, or the stock ones."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = (UNet3DConditionModel if modelscope else UNet3DVideoCrafterConditionModel)(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for name, parameter in unet.named_parameters():
        if "temp_convs" in name and not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # the stock init leaves the temporal convolutions out
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return quiet(
        TextToVideoSDPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_clip(tokenizer),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=(DDIMScheduler if modelscope else VideoCrafterDDIMScheduler)(
                **schedule, clip_sample=False, set_alpha_to_one=False
            ),
        )
    )


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
