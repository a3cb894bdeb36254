"""What the frozen parts of a model say of the data, computed once before training: moments of pictures, states of text.

Every process encodes its share on its own devices; what is kept, and when it is refused, is `data/cache.py`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sd_jax import sharding
from sd_jax.checkpoints.place import place
from sd_jax.data import buckets, cache
from sd_jax.data.cache_shards import Encode
from sd_jax.data.sources import Source
from sd_jax.models.vae import to_image
from sd_jax.training import conditioning, setup
from sd_jax.training.context import EmptyPrompt
from sd_jax.training.start import Model


def precompute(
    config: ConfigDict,
    model: Model,
    sources: dict[str, Source],  # by the names that their caches have
    assignments: dict[str, buckets.Assignment],  # by the same names; who has none is square
    folder: pathlib.Path,
) -> tuple[dict[str, Source], EmptyPrompt | None]:
    """-> the sources with what is cached in place of pictures and captions, and the empty prompt as their batches have
    captions. Raises as `cache.cached`."""
    cache.check(config)
    tokenize, networks = model.caption_tokenizer(), model.networks
    local = Mesh(np.asarray(jax.local_devices()), ("local",), axis_types=(AxisType.Auto,))
    whole, over = NamedSharding(local, PartitionSpec()), NamedSharding(local, PartitionSpec("local"))
    parts = setup.cached_parts(config, networks.spec)
    there = {part: jax.tree.map(lambda _: whole, model.loaded[part]) for part in parts}
    params = place({part: model.loaded[part] for part in parts}, jnp.float32, there, where=config.init)

    def pictures(pixels):
        split = len(pixels) % local.size == 0
        return _encode_moments(params["vae"], networks, jax.device_put(pixels, over if split else whole))

    def captions(texts):
        return conditioning.encode_captions(networks, params, tokenize(texts), config)

    encode = Encode(pictures if config.data.cache_latents else None, captions if config.data.cache_text else None)
    if encode != Encode():
        keys = {part: cache.hash_weights(params[part]) for part in parts}
        square = functools.partial(buckets.one_size, data=config.data)
        of = {name: assignments.get(name) or square(len(source)) for name, source in sources.items()}
        sources = {
            name: cache.cached(source, name, folder, config, of[name], encode, keys, model.num_time_ids)
            for name, source in sources.items()
        }
    return sources, conditioning.make_empty(tokenize, networks, params, config)


@functools.partial(sharding.jit, static_argnums=1)
def _encode_moments(params, networks, pixels):
    posterior = networks.vae.apply({"params": params}, to_image(pixels), method="encode")
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)
