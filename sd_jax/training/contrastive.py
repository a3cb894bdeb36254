"""`config.method="clip"`: pictures and captions learn to find each other (Radford et al. 2021, figure 3).

    logits = exp(min(s, log 100)) f g^T,   L = (CE(logits, diagonal) + CE(logits^T, diagonal)) / 2               (Eq. 1)

f, g: features of all pictures and captions of the global batch, over all devices; s is learnt.

With `config.clip.noised` the pictures are noised as they are where a diffusion model works, in the latents of `vae`,
at a timestep of its schedule, and decoded again (`noised_pictures`): what a CLIP must know to guide sampling (Nichol et
al. 2021, section 2.4). It is not told the timestep: its files stay those of any CLIP.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.diffusion import losses, noise, timesteps
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training.context import NOISE, TIMESTEP, Context, Keys
from sd_jax.training.full import latents_of
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Image, Params

HIGHEST_LOGIT_SCALE = math.log(100.0)


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    logits = _logits(context, params, batch, keys, context.config.batch_size)
    return jnp.mean(contrastive_losses(logits)), {"logit_scale": params["clip"]["logit_scale"]}


def contrastive_losses(logits: Float[Array, "batch batch"]) -> Float[Array, " batch"]:
    """(Eq. 1) of each pair, float32. logits: of every picture with every caption, pairs on the diagonal."""
    own = jnp.arange(len(logits))
    both = (optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), own) for x in (logits, logits.T))
    return 0.5 * sum(both)


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    """Besides the loss how often a picture's own caption comes first of the batch; one that reads the same counts."""
    logits = _logits(context, params, batch, keys, batch["slot"].shape[0])
    first = jnp.diagonal(logits) >= logits.max(axis=1)
    return {"loss": sum_of(contrastive_losses(logits)), "top1": sum_of(first.astype(jnp.float32))}


def _logits(
    context: Context, params: Params, batch: Batch, keys: Keys, batch_size: int
) -> Float[Array, "pictures captions"]:
    clip, own = context.networks.clip, params["clip"]
    image = to_image(batch["pixels"])
    if context.config.clip.noised:
        image = _noised_pictures(context, params, batch, keys, batch_size)
    own = {**own, "logit_scale": jnp.minimum(own["logit_scale"], HIGHEST_LOGIT_SCALE)}
    return clip.similarity(own, clip.encode_picture(own, image), clip.encode_text(own, batch["input_ids"]))


def _noised_pictures(context: Context, params: Params, batch: Batch, keys: Keys, batch_size: int) -> Image:
    """What the autoencoder makes of noised latents; no gradient comes here."""
    networks = context.networks
    schedule = networks.spec.noise_schedule
    latents = latents_of(networks, params, batch, keys)
    times = timesteps.times_of("uniform", 0.0, 1.0)
    t = timesteps.draw_timesteps(keys, TIMESTEP, schedule.num_train_timesteps, (batch["slot"], batch_size), times)
    x = losses.noised(latents, noise.normal(keys, NOISE, latents.shape[1:]), t, schedule).model_input
    image = networks.vae.apply({"params": params.get("vae", {})}, x / networks.spec.vae.scaling_factor, method="decode")
    return jax.lax.stop_gradient(image).astype(jnp.float32)


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    if spec.clip is None:
        raise ValueError("config.method='clip' needs config.model.clip, or config.init_clip")
    size = spec.clip.vision_config.image_size
    if config.data.resolution != size or config.data.buckets.step:
        raise ValueError(
            f"config.data.resolution={config.data.resolution}: this CLIP reads squares of {size} pixels, no buckets"
        )
    if config.grad_accumulation > 1 or config.parallelism == "pmap":
        raise ValueError(
            "config.method='clip' compares all pictures of a step with each other: set config.grad_accumulation=1 and "
            "config.parallelism='jit'"
        )


CLIP = Method(
    trainable=lambda config, spec: ("clip",),
    frozen=lambda config, spec: ("vae",) * (config.clip.noised and "vae" in spec.parts),
    reads=("pixels", "captions"),
    check=_check,
    loss=_loss,
    held_out=_held_out,
)
