"""Methods that train something outside a model, which stays as it is: what they share, and `config.method="lora"`.

A LoRA (or LoHa, LoKr, DoRA: `config.adapter.algorithm`) at the layers that `config.adapter.targets` names learns what
`full` teaches a whole model. The run leaves `adapter.safetensors` in its workdir, in the layout that
`config.adapter.format` names; its checkpoints hold the adapter and not the model.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sd_jax.adapters import lora
from sd_jax.adapters.hooks import hooked
from sd_jax.checkpoints import keys_peft
from sd_jax.checkpoints.adapters import save_adapter
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.training import full
from sd_jax.training.context import Context, Keys
from sd_jax.training.method import Adapting, Batch, Method
from sd_jax.types import Params

FILE = "adapter.safetensors"  # in the workdir


def method_of(adapting: Adapting, check: Callable, loss: Callable = full.FULL.loss, reads_text: bool = True) -> Method:
    """The row of a method that trains an adapter to denoise. `loss` sees the model with the adapter on."""

    def worn(function, drops: bool):
        def of(context: Context, params: Params, batch: Batch, keys: Keys):
            return function(*adapting.wear(context, params, batch, keys if drops else None), batch, keys)

        return of

    return Method(
        trainable=lambda config, spec: ("adapter",),
        frozen=lambda config, spec: (*("vae",) * ("vae" in spec.parts), "unet", *spec.text_encoders),
        reads=("latents", "captions"),
        check=check,
        loss=worn(loss, drops=True),
        held_out=worn(full.FULL.held_out, drops=False),
        adapting=adapting,
    )


def as_it_is(config: ConfigDict, spec: ModelSpec, params: Params, tokenizer: Any):
    """`Adapting.prepare` of what brings nothing that the model lacks."""
    return spec, params, tokenizer


# -- The LoRA family -------------------------------------------------------------------------------------------------


def targets_of(config: ConfigDict, spec: ModelSpec) -> lora.Targets:
    """Raises ValueError, naming the key, for layers or ranks that cannot be."""
    cfg = config.adapter
    return lora.targets_of(keys_peft.shapes_of(spec), cfg.targets, cfg.rank, float(cfg.alpha), cfg.rslora)


def _init(config: ConfigDict, networks: Networks, key: Any, loaded: Params) -> Params:
    targets, cfg = targets_of(config, networks.spec), config.adapter
    trained, _ = lora.split(lora.init(key, targets, cfg.algorithm, cfg.dora, cfg.factor, loaded))
    return trained


def _layers(config: ConfigDict, spec: ModelSpec, trained: Params):
    fixed = {
        part: {path: {"alpha": jnp.float32(target.alpha)} for path, target in targets.items()}
        for part, targets in targets_of(config, spec).items()
    }
    return lora.join(trained, fixed)


def _wear(context: Context, params: Params, batch: Batch, keys: Keys | None) -> tuple[Context, Params]:
    networks = context.networks
    layers = _layers(context.config, networks.spec, params["adapter"])
    return context._replace(networks=hooked(networks, [(layers, jnp.float32(1))])), params


def _save(config: ConfigDict, model: Any, trained: Params, workdir: pathlib.Path) -> None:
    spec, cfg = model.networks.spec, config.adapter
    layers = jax.device_get(_layers(config, spec, trained))
    told = {
        "ss_training_comment": f"sd_jax, method {config.method}",
        "ss_learning_rate": str(config.optimizer.learning_rate),
    }
    save_adapter(workdir / FILE, layers, spec, cfg.format, told, cfg.dtype, overwrite=True)


def check_lora(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend, before anything is compiled."""
    cfg = config.adapter
    full.check(config, spec)
    if cfg.algorithm not in lora.ALGORITHMS:
        raise ValueError(f"config.adapter.algorithm={cfg.algorithm!r} is unknown: use {', '.join(lora.ALGORITHMS)}")
    if cfg.format not in ("kohya", "diffusers"):
        raise ValueError(f"config.adapter.format={cfg.format!r} is unknown: use kohya or diffusers")
    if cfg.format == "diffusers" and cfg.algorithm != "lora":
        raise ValueError(f"config.adapter.format='diffusers' has no place for {cfg.algorithm}: set it to 'kohya'")
    parts = set(targets_of(config, spec))
    if config.data.cache_text and parts - {"unet"}:
        raise ValueError(
            "config.data.cache_text keeps what the text encoders say, and config.adapter.targets changes them: set the "
            "one to False, or leave text_encoder out of the other"
        )


LORA = method_of(
    Adapting(
        prepare=as_it_is,
        init=_init,
        wear=_wear,
        put_on=lambda config, pipe, trained: pipe.with_adapter(_layers(config, pipe.spec, trained)),
        save=_save,
    ),
    check=check_lora,
)
