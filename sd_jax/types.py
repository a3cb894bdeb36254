"""The dictionary: the words and states that every room of sd_jax shares. Imports nothing of ours.

States of a picture, in the order in which they occur (every array is NHWC):

    pixels   uint8, [0, 255]            what files hold
    image    float, [-1, 1]             what the autoencoder reads and writes
    latents  float, about unit variance what the U-Net denoises (posterior mean or sample times `scaling_factor`)

Two clocks, never mixed: `sigma` is the noise level in the variance-exploding convention `x = x0 + sigma * noise`
(Karras et al. 2022); `timestep` is the index into the discrete schedule that the U-Net was trained with, in
[0, num_train_timesteps - 1], possibly fractional.
"""

import dataclasses
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

AnyArray = Array | np.ndarray
Pixels = UInt8[AnyArray, "batch height width 3"]
Image = Float[AnyArray, "batch height width 3"]
Latents = Float[AnyArray, "batch h w channels"]  # h, w: an eighth of height, width in SD
TokenIds = Int[AnyArray, "batch tokens"]
Params = Any  # a nested dict of arrays, named as diffusers names them

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


@flax.struct.dataclass
class Conditioning:
    """What the U-Net is told of the prompt; training and sampling share it.

    context: [batch, tokens, width], the hidden states of the text encoder, read by cross-attention.
    pooled:  [batch, width], the state at the end-of-text token; None where the family has no use for it.
    """

    context: Float[Array, "batch tokens width"]
    pooled: Float[Array, "batch width"] | None = None


@dataclasses.dataclass(frozen=True)
class NoiseScheduleConfig:
    """The discrete forward process and what the U-Net predicts; names and values as in scheduler_config.json."""

    beta_schedule: str = "scaled_linear"  # "linear" | "scaled_linear" | "squaredcos_cap_v2" (cosine)
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"  # one of PREDICTION_TYPES
    rescale_betas_zero_snr: bool = False  # the last timestep is pure noise; for models that were trained so


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a picture, given the model. The keyword arguments of a job are these fields."""

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None  # pixels; None = the size that the model was trained at
    height: int | None = None
    steps: int = 20
    guidance_scale: float = 7.5  # 1 = no guidance
    sampler: str = "euler"
    schedule: str = "normal"
    seed: int = 0  # image i of a batch is drawn from seed + i
    batch_size: int = 1  # pictures of this prompt
    clip_skip: int | None = None  # as A1111 counts: 1 = last layer; None = the family's own

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
