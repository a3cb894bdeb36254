"""`config.method="controlnet"` and `"t2i_adapter"`: a network beside a model, which stays as it is, learns to steer it
by pictures (adapters/controlnet.py, adapters/t2i_adapter.py).

Each picture has its hint: in a folder, a picture of its name in hints/ beside it, which `python -m
sd_jax.preprocessors` makes of many kinds; in a data set, the column `config.control.hint_key`. A ControlNet begins as a
copy of the model's first half, of which nothing reaches the model yet. The run leaves the folder control/ in its
workdir, or control.safetensors, which `sd_jax.load_control` opens.

`config.control.hint_key="inpaint"` trains a ControlNet to redraw: its hint is the picture itself, -1 where a random
mask hides it (`config.inpainting`), as that of control_v11p_sd15_inpaint.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sd_jax.adapters import controlnet, t2i_adapter
from sd_jax.adapters.controlnet import EMBEDDING, ControlNet, ControlNetConfig, HintEmbedding
from sd_jax.adapters.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sd_jax.checkpoints import control as files
from sd_jax.config import INPAINT, reads_hints
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec, UNetConfig
from sd_jax.sampling.control import ControlModel
from sd_jax.training import full
from sd_jax.training.adapting import as_it_is, method_of
from sd_jax.training.context import Context, Keys
from sd_jax.training.inpainting import check_masks, masks_of
from sd_jax.training.method import Adapting, Batch
from sd_jax.types import Conditioning, Params

_READERS = (16, 32, 96, 256, 512)  # widths of what reads a ControlNet's hint, each half the size of the one before


def config_of(config: ConfigDict, spec: ModelSpec) -> files.Config:
    """What is trained beside a model. Raises ValueError for a model that it cannot be trained for."""
    unet, halvings = spec.unet, int(math.log2(spec.vae.downscale))
    if config.method == "controlnet":
        if halvings >= len(_READERS):
            raise ValueError(f"config.method='controlnet': latents {spec.vae.downscale} times smaller than pictures")
        channels = spec.vae.latent_channels
        unet = dataclasses.replace(unet, in_channels=channels, out_channels=channels, time_cond_proj_dim=None)
        unet = dataclasses.replace(unet, sample_size=UNetConfig.sample_size)  # of which its files say nothing
        return ControlNetConfig(unet, _READERS[: halvings + 1])
    widths, resnets = unet.block_out_channels, config.control.num_res_blocks
    if unet.attention_blocks[0]:
        if not config.control.light:
            return T2IAdapterConfig("full_adapter", 3, widths, resnets, spec.vae.downscale)
        if len(widths) > 1 and widths[-1] == widths[-2]:
            return T2IAdapterConfig("light_adapter", 3, widths[:-1], resnets, spec.vae.downscale)
    elif not config.control.light and len(widths) in (2, 3):
        # SDXL's, whose first features are added behind the first halving, and the last behind the middle
        levels = (*widths, widths[-1]) if len(widths) == 3 else widths
        return T2IAdapterConfig("full_adapter_xl", 3, levels, resnets, 2 * spec.vae.downscale)
    raise ValueError(
        f"config.control.light={config.control.light}: no T2I-Adapter of this kind fits a U-Net of widths {widths}: "
        "set it to False, or train a ControlNet"
    )


def model_of(config: ConfigDict, spec: ModelSpec, trained: Params) -> ControlModel:
    """What has been trained, to be sampled with."""
    return ControlModel(config_of(config, spec), trained, config.dtype)


def hints_of(config: ConfigDict, batch: Batch, keys: Keys) -> jax.Array:
    """float32 [batch, height, width, 3] in [0, 1], those of the data; or the pictures, -1 where masks hide them."""
    if reads_hints(config):
        return jnp.asarray(batch["hint"]).astype(jnp.float32) / 255
    masks = masks_of(config, batch["pixels"], keys)
    return jnp.where(masks == 1, -1.0, jnp.asarray(batch["pixels"]).astype(jnp.float32) / 255)


class _Steered:
    """A U-Net that a control steers, by a batch's "hint" of `hints_of`: as much of linen's interface as losses use."""

    def __init__(self, unet: nn.Module, config: files.Config, params: Params, batch: Batch):
        self._unet, self._config, self._params, self._batch = unet, config, params, batch

    def apply(self, variables: Mapping[str, Params], latents, timesteps, conditioning: Conditioning):
        config, params, dtype = self._config, self._params, self._unet.dtype
        hint = self._batch["hint"]
        if isinstance(config, T2IAdapterConfig):
            control = T2IAdapter(config, dtype).apply({"params": params}, hint)
        else:
            read = HintEmbedding(config, dtype).apply({"params": params[EMBEDDING]}, hint)
            network = ControlNet(config.unet, dtype, remat=self._unet.remat)
            control = network.apply({"params": params}, latents, timesteps, conditioning, read)
        return self._unet.apply(variables, latents, timesteps, conditioning, control)


def _init(config: ConfigDict, networks: Networks, key: Any, loaded: Params) -> Params:
    made = config_of(config, networks.spec)
    if isinstance(made, T2IAdapterConfig):
        return t2i_adapter.init(key, made)
    return controlnet.init(key, made, loaded["unet"])


def _wear(context: Context, params: Params, batch: Batch, keys: Keys | None) -> tuple[Context, Params]:
    networks = context.networks
    unet = _Steered(networks.unet, config_of(context.config, networks.spec), params["adapter"], batch)
    return context._replace(networks=networks._replace(unet=unet)), params


def _save(config: ConfigDict, model: Any, trained: Params, workdir: pathlib.Path) -> None:
    made, single = config_of(config, model.networks.spec), config.control.format == "single_file"
    path = workdir / (f"{files.FOLDER}.safetensors" if single else files.FOLDER)
    files.save_control(path, made, jax.device_get(trained), config.control.format, overwrite=True)


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    full.check(config, spec)
    made = config_of(config, spec)
    if config.control.format not in ("diffusers", "single_file"):
        raise ValueError(f"config.control.format={config.control.format!r}: use diffusers or single_file")
    if config.control.format == "single_file" and spec.unet.addition_embed_type == "text":
        raise ValueError("config.control.format='single_file' has no place for this model's text: use diffusers")
    if not reads_hints(config):
        if config.method != "controlnet":
            raise ValueError(f"config.control.hint_key={INPAINT!r} is for config.method='controlnet' alone")
        check_masks(config)
    if config.data.cache_latents:
        raise ValueError("config.data.cache_latents: hints are cut as pixels are, which are not kept: set it to False")
    if reads_hints(config) and (config.prior.path or config.prior.prompt):
        raise ValueError(f"config.prior: those pictures have no hints, which {config.method!r} needs: leave it out")
    factor = made.downscale_factor if isinstance(made, T2IAdapterConfig) else made.downscale
    if config.data.resolution % factor:
        raise ValueError(f"config.data.resolution={config.data.resolution}: give a multiple of {factor}")


def _hinted(function):
    def of(context: Context, params: Params, batch: Batch, keys: Keys):
        return function(context, params, {**batch, "hint": hints_of(context.config, batch, keys)}, keys)

    return of


# Of both; nothing is put on a pipeline, whose jobs are given hints
_METHOD = method_of(
    Adapting(prepare=as_it_is, init=_init, wear=_wear, put_on=lambda config, pipe, trained: pipe, save=_save), _check
)
CONTROL = _METHOD._replace(loss=_hinted(_METHOD.loss), held_out=_hinted(_METHOD.held_out))
