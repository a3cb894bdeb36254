"""`config.method="hypernetwork"`: small networks learn to change what attention makes its keys and values of.

adapters/hypernetwork.py says what they are. One pair serves every attention that reads states of one width; here all
widths of the model have theirs unless `config.hypernetwork.widths` names some. The run leaves `hypernetwork.pt` in its
workdir, A1111's file.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sd_jax.adapters import hypernetwork
from sd_jax.adapters.hooks import hooked
from sd_jax.adapters.hypernetwork import Hypernetwork, widths_of
from sd_jax.checkpoints import hypernetworks
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.sampling import adapters
from sd_jax.training import full
from sd_jax.training.adapting import as_it_is, method_of
from sd_jax.training.context import ADAPTER, Context, Keys
from sd_jax.training.method import Adapting, Batch
from sd_jax.types import Params


def _made(config: ConfigDict, spec: ModelSpec, key: Any) -> Hypernetwork:
    cfg = config.hypernetwork
    return hypernetwork.init(
        key,
        tuple(cfg.widths) or widths_of(spec),
        tuple(cfg.layer_structure),
        cfg.activation,
        cfg.layer_norm,
        cfg.weight_init,
        cfg.activate_output,
        tuple(cfg.dropout) or None,
    )


def _with(config: ConfigDict, spec: ModelSpec, layers: Params) -> Hypernetwork:
    shapes = jax.eval_shape(lambda: _made(config, spec, jax.random.key(0)))
    return shapes.replace(layers=layers, strength=jnp.float32(1))


def _init(config: ConfigDict, networks: Networks, key: Any, loaded: Params) -> Params:
    return _made(config, networks.spec, key).layers


def _wear(context: Context, params: Params, batch: Batch, keys: Keys | None) -> tuple[Context, Params]:
    worn = _with(context.config, context.networks.spec, params["adapter"])
    drawn = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, ADAPTER))(keys)
    return context._replace(networks=hooked(context.networks, [(worn, jnp.float32(1))], drawn)), params


def _put_on(config: ConfigDict, pipe: Any, layers: Params) -> Any:
    return pipe.with_adapter(_with(config, pipe.spec, layers))


def _save(config: ConfigDict, model: Any, layers: Params, workdir: pathlib.Path) -> None:
    worn = _with(config, model.networks.spec, jax.device_get(layers))
    hypernetworks.save(workdir / adapters.HYPERNETWORK, worn, overwrite=True)


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend."""
    full.check(config, spec)
    cfg, there = config.hypernetwork, widths_of(spec)
    for width in cfg.widths:
        if width not in there:
            raise ValueError(f"config.hypernetwork.widths={width}: attentions read {', '.join(map(str, there))}")
    try:
        jax.eval_shape(lambda: _made(config, spec, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"config.hypernetwork: {error}") from None


HYPERNETWORK = method_of(Adapting(as_it_is, _init, _wear, _put_on, _save), check)
