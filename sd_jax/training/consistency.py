"""`config.method="lcm_lora"`: a LoRA that lets a model make pictures in a few steps (Luo et al. 2023, LCM-LoRA, arXiv
2311.05556), distilled from the model itself.

A step of n noise levels goes from sigma_n down to sigma_m, the next of `solver_steps` levels. The teacher, which is the
model without the LoRA, walks it by DDIM with guidance; the student's answer before it is to be what its own is behind
it, of which no gradient is taken:

    D_w(x) = D(x, empty) + w (D(x, text) - D(x, empty))                w drawn from guidance_min to guidance_max    (1)
    x_m    = D_w(x_n) + (x_n - D_w(x_n)) sigma_m / sigma_n                                        DDIM              (2)
    f(x)   = c_skip(t) x / sqrt(1 + sigma^2) + c_out(t) D_student(x, text)                                          (3)
    loss   = mean(sqrt((f(x_n) - f(x_m))^2 + c^2) - c),   c = 0.001                               pseudo-Huber      (4)
    c_skip = s^2 / ((10 t)^2 + s^2),  c_out = 10 t / sqrt((10 t)^2 + s^2),  s = 0.5                                 (5)

Sample with sampler="lcm", schedule="lcm", guidance_scale=1 and 4 to 8 steps. The step and its constants are those of
the authors' training script.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.diffusion import noise
from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.predictions import along_batch
from sd_jax.diffusion.schedules import sigmas_of
from sd_jax.models.presets import ModelSpec
from sd_jax.training import adapting, conditioning, full
from sd_jax.training.adapting import LORA
from sd_jax.training.context import GUIDANCE, NOISE, TIMESTEP, Context, Keys
from sd_jax.training.method import Batch
from sd_jax.types import Params

HUBER, SIGMA_DATA, TIME_SCALE = 1e-3, 0.5, 10.0


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    """The mean of Eq. 4 over the batch; `params` holds the LoRA as the part "adapter"."""
    schedule, cfg = context.networks.spec.noise_schedule, context.config.consistency
    sigmas = jnp.asarray(sigmas_of(schedule), jnp.float32)
    stride = schedule.num_train_timesteps // cfg.solver_steps
    latents = full.latents_of(context.networks, params, batch, keys)
    number = jnp.floor(noise.uniform(keys, TIMESTEP) * cfg.solver_steps).astype(jnp.int32)
    t_n = (number + 1) * stride - 1
    t_m = t_n - stride  # of the last step -1: no noise is left
    sigma_n, sigma_m = sigmas[t_n], jnp.where(t_m < 0, 0.0, sigmas[jnp.maximum(t_m, 0)])
    w = cfg.guidance_min + (cfg.guidance_max - cfg.guidance_min) * noise.uniform(keys, GUIDANCE)
    x_n = latents.astype(jnp.float32) + along_batch(sigma_n, latents) * noise.normal(keys, NOISE, latents.shape[1:])

    def denoiser(worn: Context, its_params: Params):
        predict = lambda x, t, told: worn.networks.unet.apply({"params": its_params["unet"]}, x, t, told)  # noqa: E731
        return make_denoiser(predict, schedule)

    # Teacher
    told, empty = conditioning.told_and_empty(context, params, batch)
    teacher = denoiser(context, params)
    with_text, without = teacher(x_n, sigma_n, told), teacher(x_n, sigma_n, empty)
    guided = without + along_batch(w, without) * (with_text - without)
    x_m = jax.lax.stop_gradient(guided + (x_n - guided) * along_batch(sigma_m / sigma_n, x_n))

    # Student
    student_context, student_params = LORA.adapting.wear(context, params, batch, keys)
    student = denoiser(student_context, student_params)
    heard = conditioning.told_and_empty(student_context, student_params, batch)[0]
    answer = _consistent(student, x_n, sigma_n, t_n, heard)
    at_end = jax.lax.stop_gradient(
        _consistent(student, x_m, jnp.maximum(sigma_m, sigmas[0]), jnp.maximum(t_m, 0), heard)
    )
    target = jnp.where((t_m < 0)[:, None, None, None], x_m, at_end)
    error = jnp.mean(jnp.sqrt(jnp.square(answer - target) + HUBER**2) - HUBER, axis=(1, 2, 3))
    return jnp.mean(error * batch.get("loss_weight", jnp.float32(1))), {}


def _consistent(denoise, x, sigma, t, told) -> Float[Array, "batch h w c"]:
    """f of Eq. 3."""
    scaled = TIME_SCALE * t.astype(jnp.float32)
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / jnp.sqrt(scaled**2 + SIGMA_DATA**2)
    seen = x / along_batch(jnp.sqrt(1 + sigma**2), x)
    return along_batch(c_skip, x) * seen + along_batch(c_out, x) * denoise(x, sigma, told)


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend."""
    adapting.check_lora(config, spec)
    if config.diffusion.masked_loss:
        raise ValueError(
            "config.diffusion.masked_loss: config.method='lcm_lora' learns from whole pictures, set it to False"
        )
    cfg, steps = config.consistency, spec.noise_schedule.num_train_timesteps
    if not 1 <= cfg.solver_steps <= steps or steps % cfg.solver_steps:
        raise ValueError(f"config.consistency.solver_steps={cfg.solver_steps}: give a divisor of the {steps} timesteps")
    if not 0 <= cfg.guidance_min <= cfg.guidance_max < np.inf:
        raise ValueError(
            f"config.consistency.guidance_min={cfg.guidance_min} and guidance_max={cfg.guidance_max}: give two numbers "
            "from 0, the second no less than the first"
        )


LCM_LORA = LORA._replace(check=check, loss=_loss)
