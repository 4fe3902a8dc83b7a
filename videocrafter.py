"""VideoCrafter2 (https://arxiv.org/abs/2401.09047) as a diffusers pipeline: what stock diffusers lacks of it.

Its UNet is diffusers' UNet3DConditionModel plus an embedding of the frame rate, and its noise process scales the clean
latents by s_t. Both are silently lost by the stock classes. The public conversion holds the UNet alone; join it with
the text encoder, VAE and schedule of its family into a folder that every script takes:

    python videocrafter.py --unet adamdad/videocrafterv2_diffusers --components cerspense/zeroscope_v2_576w \
        --output_dir models/videocrafter2

The stock TextToVideoSDPipeline of such a folder then samples by VideoCrafter's own DDIM, whose settings are 320x512
pixels, 16 frames, 50 steps, eta 1, guidance 12 and 28 frames per second (`pipe.unet.fps`).
"""

import argparse

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    ModelMixin,  # noqa: F401, diffusers looks for the base classes beside a pipeline's own ones
    SchedulerMixin,  # noqa: F401
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from transformers import CLIPTextModel, CLIPTokenizer


class _Checkpointed:
    """Gradient checkpointing for a block of UNet3DConditionModel, which has the switch but not the deed."""

    def forward(self, *args, **kwargs):
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return super().forward(*args, **kwargs)
        forward = super().forward
        return self._gradient_checkpointing_func(lambda: forward(*args, **kwargs))


class _TimeAndFrameRate(TimestepEmbedding):
    """The timestep's embedding plus `added`, the frame rate's."""

    def forward(self, sample, condition=None):
        return super().forward(sample, condition) + self.added


class UNet3DVideoCrafterConditionModel(UNet3DConditionModel):
    """UNet3DConditionModel with gradient checkpointing, and with the frame rate beside the timestep.

    In the config beside the stock arguments: `fps_cond`, whether there is a frame-rate embedding; `fps`, the frames
    per second if `forward` is not told (the stock pipeline does not tell: set `unet.fps`); `num_frames`, of the clips
    that it was trained on.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size=None,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        downsample_padding=1,
        mid_block_scale_factor=1,
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        cross_attention_dim=1024,
        attention_head_dim=64,
        num_attention_heads=None,
        time_cond_proj_dim=None,
        fps_cond=True,
        fps=28,
        num_frames=16,
    ):
        stock = dict(locals())
        for name in ("self", "__class__", "fps_cond", "fps", "num_frames"):
            del stock[name]
        super().__init__(**stock)
        self.fps = fps
        if fps_cond:
            self.fps_proj = Timesteps(block_out_channels[0], True, 0)
            self.fps_embedding = TimestepEmbedding(block_out_channels[0], 4 * block_out_channels[0])
            self.time_embedding.__class__ = _TimeAndFrameRate
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.gradient_checkpointing = False  # the middle block does not even have the switch
            block.__class__ = type(type(block).__name__, (_Checkpointed, type(block)), {})

    @classmethod
    def from_pretrained(cls, name, output_loading_info=False, **options):
        """ValueError where weights are missing, instead of random ones: without its frame-rate embedding VideoCrafter2
        is another model."""
        model, info = super().from_pretrained(name, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the UNet of {name} lacks {len(missing)} weights, such as {missing[0]}. VideoCrafter2's holds "
                "fps_embedding; a plain text-to-video UNet belongs to diffusers' own UNet3DConditionModel"
            )
        return (model, info) if output_loading_info else model

    def forward(self, sample, timestep, encoder_hidden_states, *args, fps=None, **kwargs):
        """Noise prediction for sample (B, c, F, h, w) at `timestep`, a number or (B,); `fps` likewise."""
        if self.config.fps_cond:
            fps = torch.as_tensor(self.fps if fps is None else fps, device=sample.device).expand(len(sample))
            self.time_embedding.added = self.fps_embedding(self.fps_proj(fps).to(self.dtype))  # (B, 4 * width)
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)


class VideoCrafterDDIMScheduler(DDIMScheduler):
    """DDIM for x_t = sqrt(alpha_bar_t) s_t x0 + sqrt(1 - alpha_bar_t) noise, where s_t falls evenly from 1 at t = 0 to
    0.7 at t = 399 and stays there (https://github.com/AILab-CVC/VideoCrafter: use_scale of
    configs/inference_t2v_512_v2.0.yaml, lvdm/models/ddpm3d.py, lvdm/models/samplers/ddim.py)."""

    _compatibles = []  # others would drop s_t

    @property
    def signal_scale(self) -> torch.Tensor:
        """s_t, (T,)."""
        return torch.cat([torch.linspace(1, 0.7, 400), torch.full((self.config.num_train_timesteps - 400,), 0.7)])

    def _scaled(self, original_samples, timesteps):
        scale = self.signal_scale.to(original_samples)[timesteps]
        return scale.view(*scale.shape, *[1] * (original_samples.ndim - scale.ndim)) * original_samples

    def add_noise(self, original_samples, noise, timesteps):
        return super().add_noise(self._scaled(original_samples, timesteps), noise, timesteps)

    def get_velocity(self, sample, noise, timesteps):
        return super().get_velocity(self._scaled(sample, timesteps), noise, timesteps)

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True):
        """The stock step takes s_t x0 for x0: put s_t' x0 in its place at the earlier timestep t'."""
        stock = super().step(model_output, timestep, sample, eta, generator=generator)
        before = max(0, timestep - self.config.num_train_timesteps // self.num_inference_steps)
        scale, scale_before = self.signal_scale[timestep].to(sample), self.signal_scale[before].to(sample)
        x0 = stock.pred_original_sample / scale
        prev_sample = stock.prev_sample + self.alphas_cumprod[before].sqrt().to(sample) * (scale_before - scale) * x0
        return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", required=True, help="folder or hub id of the converted UNet")
    parser.add_argument("--components", required=True, help="folder or hub id of a pipeline with text encoder and VAE")
    parser.add_argument("--fps", type=float, default=28, help="frames per second if a caller does not say")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    unet = UNet3DVideoCrafterConditionModel.from_pretrained(args.unet)
    unet.register_to_config(fps=args.fps)
    pipe = TextToVideoSDPipeline(
        vae=AutoencoderKL.from_pretrained(args.components, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(args.components, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(args.components, subfolder="tokenizer"),
        unet=unet,
        scheduler=VideoCrafterDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )
    pipe.save_pretrained(args.output_dir)
    print(f"a complete pipeline folder: {args.output_dir}")


if __name__ == "__main__":
    import videocrafter

    videocrafter.main()  # classes of __main__ could not be found again
