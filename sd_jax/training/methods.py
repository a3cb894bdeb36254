"""The table of training methods; `config.method` names a row."""

from ml_collections import ConfigDict

from sd_jax.training.adapting import LORA
from sd_jax.training.aesthetic import AESTHETIC
from sd_jax.training.autoencoder import AUTOENCODER
from sd_jax.training.consistency import LCM_LORA
from sd_jax.training.contrastive import CLIP
from sd_jax.training.control import CONTROL
from sd_jax.training.dreambooth import DREAMBOOTH
from sd_jax.training.esrgan import ESRGAN
from sd_jax.training.features import FEATURES
from sd_jax.training.full import FULL
from sd_jax.training.hypernetwork import HYPERNETWORK
from sd_jax.training.inpainting import INPAINTING
from sd_jax.training.ip_adapter import IP_ADAPTER
from sd_jax.training.method import Method
from sd_jax.training.super_resolution import SUPER_RESOLUTION
from sd_jax.training.textual_inversion import TEXTUAL_INVERSION

METHODS = {
    "full": FULL,
    "dreambooth": DREAMBOOTH,
    "lora": LORA,
    "lcm_lora": LCM_LORA,
    "textual_inversion": TEXTUAL_INVERSION,
    "hypernetwork": HYPERNETWORK,
    "ip_adapter": IP_ADAPTER,
    "controlnet": CONTROL,
    "t2i_adapter": CONTROL,
    "autoencoder": AUTOENCODER,
    "esrgan": ESRGAN,
    "inpainting": INPAINTING,
    "super_resolution": SUPER_RESOLUTION,
    "clip": CLIP,
    "features": FEATURES,
    "aesthetic": AESTHETIC,
}


def method_of(config: ConfigDict) -> Method:
    """The row of `config.method`. Raises ValueError with the names that there are."""
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r} is unknown: use {', '.join(METHODS)}")
    return METHODS[config.method]
