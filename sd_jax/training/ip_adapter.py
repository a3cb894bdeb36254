"""`config.method="ip_adapter"`: cross-attentions learn to read a picture beside the prompt (Ye et al. 2023).

adapters/ip_adapter.py says what is trained. What it is shown is the very picture that is to be denoised, through a CLIP
that stays as it is, of `config.init_clip`; of a picture that is no square, the middle. One draw decides what is left
out, so that half of the captions that are dropped go with their picture: with 0.1 of each, 0.05 lose the caption alone,
0.05 both, which is what guidance goes away from, and 0.05 the picture alone. The run leaves `ip_adapter.safetensors` in
its workdir, in h94/IP-Adapter's layout.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from sd_jax.adapters import ip_adapter
from sd_jax.adapters.hooks import hooked
from sd_jax.adapters.ip_adapter import KINDS, IPAdapter
from sd_jax.checkpoints import ip_adapters
from sd_jax.diffusion import noise
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.sampling import adapters
from sd_jax.sampling.image_prompt import ImageEncoder, features_of
from sd_jax.training import full
from sd_jax.training.adapting import as_it_is, method_of
from sd_jax.training.conditioning import squares_of
from sd_jax.training.context import DROPOUT, Context, Keys
from sd_jax.training.method import Adapting, Batch
from sd_jax.types import Params


def _init(config: ConfigDict, networks: Networks, key: Any, loaded: Params) -> Params:
    spec, kind = networks.spec, config.ip_adapter.kind
    vision = spec.image_encoder.vision_config
    width = vision.hidden_size if kind == "plus" else vision.projection_dim
    made = ip_adapter.init(key, kind, width, spec.unet, loaded["unet"])
    return {"projection": made.projection, "layers": made.layers}


def _wear(context: Context, params: Params, batch: Batch, keys: Keys | None) -> tuple[Context, Params]:
    networks, adapter = context.networks, IPAdapter(**params["adapter"])
    squares = squares_of(networks.spec.image_encoder, batch["pixels"])
    seen = features_of(networks.image_encoder, params["image_encoder"], adapter.kind, squares)
    features, nothing = seen[:-1], seen[-1:]
    if keys is not None:
        dropped = _dropped(context.config, keys).reshape(-1, *[1] * (features.ndim - 1))
        features = jnp.where(dropped, nothing, features)
    adapter = adapter.replace(tokens=ip_adapter.project(adapter.projection, features))
    return context._replace(networks=hooked(networks, [(adapter, jnp.float32(1))])), params


def _dropped(config: ConfigDict, keys: Keys) -> Bool[Array, " batch"]:
    """Which pictures are not shown, by the draw that drops captions."""
    draw, first = noise.uniform(keys, DROPOUT), config.diffusion.caption_dropout / 2
    return (first <= draw) & (draw < first + config.ip_adapter.image_dropout)


def _put_on(config: ConfigDict, pipe: Any, trained: Params) -> Any:
    encoder = ImageEncoder(pipe.spec.image_encoder, pipe.params["image_encoder"], config.dtype)
    return pipe.with_adapter(IPAdapter(**trained), image_encoder=encoder)


def _save(config: ConfigDict, model: Any, trained: Params, workdir: pathlib.Path) -> None:
    made, unet = IPAdapter(**jax.device_get(trained)), model.networks.spec.unet
    ip_adapters.save(workdir / adapters.IP_ADAPTER, made, unet, overwrite=True)


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend."""
    full.check(config, spec)
    cfg = config.ip_adapter
    if spec.image_encoder is None:
        raise ValueError("config.method='ip_adapter' sees through a CLIP: give its path as config.init_clip")
    if cfg.kind not in KINDS:
        raise ValueError(f"config.ip_adapter.kind={cfg.kind!r} is unknown: use {' or '.join(KINDS)}")
    if not 0 <= cfg.image_dropout <= 1 - config.diffusion.caption_dropout / 2:
        raise ValueError(
            f"config.ip_adapter.image_dropout={cfg.image_dropout}: give a share from 0, and none too large"
        )
    if config.data.cache_latents:
        raise ValueError("config.data.cache_latents: CLIP sees pixels, which are not kept: set it to False")


_METHOD = method_of(Adapting(as_it_is, _init, _wear, _put_on, _save), check)
IP_ADAPTER = _METHOD._replace(frozen=lambda config, spec: (*_METHOD.frozen(config, spec), "image_encoder"))
