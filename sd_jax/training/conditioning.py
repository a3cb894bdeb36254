"""What the U-Net is told of each picture while it learns: its caption, encoded or as it was stored, or none; or, of
models for image variation, the very picture, through a CLIP.

A batch says it as `input_ids`, which are encoded in the step, or as `context` and `pooled`, which `encode_captions`
made before. Both ways go through `Networks.encode_text`, as sampling does.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax import sharding
from sd_jax.data import captions
from sd_jax.diffusion import noise
from sd_jax.models.clip import as_read
from sd_jax.models.networks import Networks
from sd_jax.models.presets import CLIPConfig, ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.sampling.image_prompt import features_of
from sd_jax.training.context import DROPOUT, Context, EmptyPrompt, Keys
from sd_jax.types import AnyArray, Conditioning, Params, TokenIds

States = tuple[Float[Array, "batch tokens width"], Float[Array, "batch wide"] | None]  # context and pooled


def conditioning(context: Context, params: Params, batch: dict[str, Array], keys: Keys) -> Conditioning:
    """What the U-Net is told of each picture, its sizes and crop included, some captions dropped.

    A dropped caption is what sampling makes of an empty negative prompt: the empty prompt's encoding or, in families
    that were trained so (SDXL), zeros. Context and pooled state go together.
    """
    networks, config, empty = context
    drop = noise.uniform(keys, DROPOUT) < config.diffusion.caption_dropout
    if "context" not in batch and not networks.spec.force_zeros_for_empty_prompt:  # one text for each picture
        ids = jnp.where(drop[:, None], jnp.asarray(empty.ids)[None], batch["input_ids"])
        told = networks.encode_text(params, ids, _clip_skip(config))
    else:
        told, nothing = _both(context, params, batch)
        told = _where(drop, nothing, told)
    return told.replace(time_ids=batch.get("time_ids"))


def told_and_empty(context: Context, params: Params, batch: dict[str, Array]) -> tuple[Conditioning, Conditioning]:
    """What each picture's caption says, none dropped, and what none at all says, for as many."""
    told, nothing = _both(context, params, batch)
    everywhere = jnp.ones(len(batch["slot"]), bool)
    both = told, _where(everywhere, nothing, told)
    return tuple(each.replace(time_ids=batch.get("time_ids")) for each in both)


def _both(context: Context, params: Params, batch: dict[str, Array]) -> tuple[Conditioning, Conditioning]:
    """(of the captions, of the empty prompt, for as many or for one)."""
    networks, config, empty = context
    if "context" in batch:
        told = Conditioning(batch["context"], batch.get("pooled"))
    elif networks.spec.sees_pictures:
        squares = squares_of(networks.spec.image_encoder, batch["pixels"])
        seen = features_of(networks.image_encoder, params["image_encoder"], "base", squares)[:-1]
        told = Conditioning(seen[:, None])
    else:
        told = networks.encode_text(params, batch["input_ids"], _clip_skip(config))
    if networks.spec.force_zeros_for_empty_prompt:
        return told, jax.tree.map(jnp.zeros_like, told)
    if "context" in batch:
        return told, Conditioning(*(x if x is None else jnp.asarray(x)[None] for x in empty.states))
    return told, networks.encode_text(params, jnp.asarray(empty.ids)[None], _clip_skip(config))


def squares_of(encoder: CLIPConfig, pixels: AnyArray) -> Float[Array, "batch size size 3"]:
    """The middle of each picture, as the encoder reads it. pixels: uint8 [batch, height, width, 3]."""
    pictures = to_image(pixels)
    side = min(pictures.shape[1:3])
    top, left = ((length - side) // 2 for length in pictures.shape[1:3])
    return as_read(encoder, pictures[:, top : top + side, left : left + side])


def encode_captions(networks: Networks, params: Mapping[str, Params], ids: TokenIds, config: ConfigDict) -> States:
    """(context, pooled) of token ids, as `conditioning` encodes them, in `config.dtype`; for keeping.

    pooled is None where the U-Net does not read it. params: by part.
    """
    return _encode(params, networks, jnp.asarray(ids, jnp.int32), _clip_skip(config), config.dtype)


def states_of(networks: Networks, params: Mapping[str, Params], ids: TokenIds, config: ConfigDict) -> States:
    """`encode_captions` without a program of its own, to be traced."""
    return _states(params, networks, ids, _clip_skip(config), config.dtype)


def make_empty(
    tokenize: Callable[[Sequence[str]], np.ndarray] | None,  # of `Model.caption_tokenizer`
    networks: Networks,
    params: Mapping[str, Params],  # by part; read where text is cached
    config: ConfigDict,
) -> EmptyPrompt | None:
    """The empty prompt, as the batches of this config have their captions: ids, or states where text is cached.

    None for methods that read no captions.
    """
    if tokenize is None:
        return None
    ids = tokenize([""])
    if not config.data.cache_text:
        return EmptyPrompt(ids[0])
    context, pooled = encode_captions(networks, params, ids, config)
    return EmptyPrompt(None, (np.asarray(context)[0], None if pooled is None else np.asarray(pooled)[0]))


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError where a config asks for captions or conditioning that there cannot be; names key and mend."""
    captions.check(config.data)
    diffusion, data = config.diffusion, config.data
    if diffusion.text_chunks < 1:
        raise ValueError(f"config.diffusion.text_chunks={diffusion.text_chunks}: give 1 or more")
    if spec.sees_pictures:
        _check_pictures(config, spec)
    layers = min((text.num_hidden_layers for text in spec.text_encoders.values()), default=0)
    if not 0 <= diffusion.clip_skip <= layers:
        raise ValueError(
            f"config.diffusion.clip_skip={diffusion.clip_skip}: give 1 (the last layer) to {layers}, or 0 for the "
            "family's own"
        )
    if not 0 <= diffusion.caption_dropout <= 1:
        raise ValueError(f"config.diffusion.caption_dropout={diffusion.caption_dropout}: give a share from 0 to 1")
    if data.cache_captions < 1:
        raise ValueError(f"config.data.cache_captions={data.cache_captions}: give 1 or more")
    if data.cache_text and diffusion.train_text_encoder:
        raise ValueError(
            "config.data.cache_text keeps what the text encoders say, and config.diffusion.train_text_encoder changes "
            "it: set one of them to False"
        )


def _check_pictures(config: ConfigDict, spec: ModelSpec) -> None:
    if config.method != "full":
        raise ValueError(f"config.method={config.method!r}: a model that is told pictures is trained by 'full' alone")
    width, read = spec.image_encoder.projection_dim, spec.unet.cross_attention_dim
    if read != width:
        raise ValueError(
            f"config.model.unet.cross_attention_dim={read}: the features of config.init_clip, which it is to read, are "
            f"{width} wide: set it to {width}, or give another CLIP"
        )
    for key in ("cache_latents", "cache_text"):
        if config.data[key]:
            raise ValueError(f"config.data.{key}: CLIP sees pixels, which are not kept: set it to False")


def _clip_skip(config: ConfigDict) -> int | None:
    return config.diffusion.clip_skip or None


def _where(drop: Array, nothing: Conditioning, told: Conditioning) -> Conditioning:
    """`nothing`, of one prompt or of as many, for the pictures that `drop` names; else `told`."""
    choose = lambda no, yes: jnp.where(drop.reshape(-1, *[1] * (yes.ndim - 1)), no, yes)  # noqa: E731
    return jax.tree.map(choose, nothing, told)


def _states(params, networks, ids, clip_skip, dtype):
    told = networks.encode_text(params, ids, clip_skip)
    pooled = told.pooled.astype(dtype) if networks.spec.unet.addition_embed_type == "text_time" else None
    return told.context.astype(dtype), pooled


_encode = sharding.jit(_states, static_argnums=(1, 3, 4))
