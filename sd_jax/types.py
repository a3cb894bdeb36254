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

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow", "edm")


@flax.struct.dataclass
class Conditioning:
    """What the U-Net is told of the prompt; training and sampling share it.

    context: [batch, tokens, width], the hidden states of the text encoders, read by cross-attention.
    pooled:  [batch, width], the state at the end-of-text token; None where the family has no use for it.

    What only some families read (None = the family's usual):
    time_ids:       [batch, numbers], SDXL's micro-conditioning, in pixels: original height, width, crop top, left,
                    target height, width; its refiner's: original height, width, crop top, left, aesthetic score
    class_labels:   [batch], the x4 upscaler's noise level
    guidance_scale: [batch], for models distilled by LCM, which are told the scale w that they imitate
    """

    context: Float[Array, "batch tokens width"]
    pooled: Float[Array, "batch width"] | None = None
    time_ids: Float[Array, "batch numbers"] | None = None
    class_labels: Int[Array, " batch"] | None = None
    guidance_scale: Float[Array, " batch"] | None = None


@flax.struct.dataclass
class Control:
    """What is added to a U-Net's states from outside, by ControlNets and T2I-Adapters; of several, the sums.

    skips:    of each state that the up blocks read, in the order in which the down blocks make them; () = none
    middle:   of the middle block's answer; None = none
    features: of the last state of each down block, before its size is halved where the block has attention, and behind
              the last one perhaps of the middle block's answer; () = none
    """

    skips: tuple[Float[Array, "batch _ _ _"], ...] = ()
    middle: Float[Array, "batch _ _ _"] | None = None
    features: tuple[Float[Array, "batch _ _ _"], ...] = ()


@dataclasses.dataclass(frozen=True)
class NoiseScheduleConfig:
    """The discrete forward process and what the U-Net predicts; names and values as in scheduler_config.json."""

    beta_schedule: str = "scaled_linear"  # a name in diffusion/schedules.py
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"  # one of PREDICTION_TYPES
    rescale_betas_zero_snr: bool = False  # the last timestep is pure noise; for models that were trained so


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a picture, given the model and the pictures it starts from; the keyword arguments of a job.

    None = the model's, the sampler's or the job's own. A job refuses a field that it does not read, unless it has its
    default.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None  # pixels; None = that of the given picture, or what the model was trained at
    height: int | None = None
    steps: int = 20
    guidance_scale: float = 7.5  # 1 = no guidance
    sampler: str = "euler"
    schedule: str = "normal"
    seed: int = 0  # image i of a batch is drawn from seed + i
    batch_size: int = 1  # pictures of this prompt
    clip_skip: int | None = None  # as A1111 counts: 1 = last layer
    prompt_syntax: str = "a1111"  # what brackets mean: a1111, comfy, or plain

    # What SDXL is told besides the prompt; models that are not told it refuse it
    original_size: tuple[int, int] | None = None  # height, width in pixels before scaling; None = the picture's
    target_size: tuple[int, int] | None = None  # height, width that it was scaled to; None = the picture's
    crops_coords_top_left: tuple[int, int] = (0, 0)  # pixels that were then cut away at the top and at the left
    aesthetic_score: float = 6.0  # of the prompt, 0 to 10; the refiner alone
    negative_aesthetic_score: float = 2.5  # of the negative prompt
    refiner_switch: float = 0.8  # with a refiner: it takes over where so much of the timesteps is walked

    # The sampler's options, of `diffusion.samplers_ode.SamplerOptions`
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None

    # Guidance, of `diffusion.guidance.Guidance`
    guidance_rescale: float | None = None
    guidance_start: float = 0.0  # guided from this fraction of the steps on,
    guidance_stop: float = 1.0  # and up to this one
    apg_eta: float | None = None
    apg_norm_threshold: float | None = None
    apg_momentum: float | None = None
    clip_guidance_scale: float | None = None  # with a CLIP: how far along its gradient,
    clip_guidance_clamp: float | None = None  # at most so far a call, as a root mean square over the latents

    # Noise, of `diffusion.noise_sources`
    noise_source: str = "threefry"  # or torch_cpu, nv: that of other programs
    ensd: int = 0  # A1111's eta noise seed delta; not for threefry
    variation_seed: int = 0  # image i of a batch mixes seed with variation_seed + i,
    variation_strength: float = 0.0  # so far: 0 = seed alone, 1 = the other alone

    # Jobs that start from a picture
    strength: float | None = None  # how much of the way is walked again: 0.75, inpaint 1, hires_fix 0.4
    strength_steps: str = "diffusers"  # how strength counts steps: diffusers, a1111 or comfy
    only_masked: bool = False  # inpaint: work on what is around the mask, in the recipe's size
    padding: int = 32  # inpaint: pixels around the mask that only_masked takes in
    extend: tuple[int, int, int, int] | None = None  # inpaint: pixels to add at the left, top, right, bottom
    scale: float | None = None  # hires_fix: how much larger the second pass is; 2
    second_steps: int | None = None  # hires_fix: None = steps
    upscaler: str = "lanczos"  # hires_fix: lanczos on the picture; nearest, bilinear, bicubic, bislerp on latents
    noise_level: int | None = None  # upscale: timesteps of noise that the small picture gets, 0 to 350; 20
    tile: int | None = None  # pixels: denoise in overlapping tiles of this size; None = the whole at once
    tile_prompts: tuple[str, ...] | None = None  # of the tiles, row by row; "" and None = the prompt

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
