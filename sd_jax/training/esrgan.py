"""`config.method="esrgan"`: a network learns to make a picture larger in one step, of pictures made small.

The small picture is the mean over squares of `config.model.upscaler.scale` pixels a side
(`diffusion/low_resolution.py`), and the large one what is to be made of it: l1, a perceptual distance, and a
discriminator that joins later (`training/adversarial.py`). Wang et al. 2018 (arXiv 1809.00219), whose relativistic
discriminator is a PatchGAN with hinge losses here, as the autoencoder's.
"""

from ml_collections import ConfigDict

from sd_jax.diffusion.low_resolution import make_small
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training import adversarial
from sd_jax.training.context import Context, Keys
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Params


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    network, image = context.networks.upscaler, to_image(batch["pixels"])
    small = make_small(image, network.config.scale)
    enlarge = lambda own: network.apply({"params": own}, small)  # noqa: E731
    return adversarial.adversarial_loss(context, params, batch, image, enlarge, "upscaler", (network.last, "kernel"))


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    network, image = context.networks.upscaler, to_image(batch["pixels"])
    again = network.apply({"params": params["upscaler"]}, make_small(image, network.config.scale))
    rec, _ = adversarial.reconstruction(context, params, image, again)
    return {"loss": sum_of(rec), **adversarial.psnr(image, again)}


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    if spec.upscaler is None:
        raise ValueError("config.method='esrgan' needs config.model.upscaler, or config.init_upscaler")
    scale, data = spec.upscaler.scale, config.data
    if scale < 2:
        raise ValueError(f"config.model.upscaler.scale={scale}: pictures are made so much smaller: give 2 or more")
    step = scale * spec.upscaler.unshuffle
    for key, side in (("resolution", data.resolution), ("buckets.step", data.buckets.step)):
        if side % step:
            raise ValueError(f"config.data.{key}={side}: this upscaler learns of multiples of {step} pixels")
    adversarial.check(config, spec)


ESRGAN = Method(
    trainable=adversarial.trainable("upscaler"),
    frozen=adversarial.frozen,
    reads=("pixels",),
    check=_check,
    loss=_loss,
    held_out=_held_out,
)
