"""The networks of a text-to-image model as one value, hashable, so that it can be a static argument of `jit`."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sd_jax.models.clip_text import CLIPText
from sd_jax.models.presets import ModelSpec, TinyVAEConfig
from sd_jax.models.remat import policy_of
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.models.vae_tiny import TinyVAE
from sd_jax.types import Conditioning, Params, TokenIds


class Networks(NamedTuple):
    """The modules of a model, in the dtypes of a run; None where the family has no such part."""

    spec: ModelSpec
    unet: UNet
    vae: VAE | TinyVAE
    text_encoder: CLIPText | None
    text_encoder_2: CLIPText | None

    @staticmethod
    def of(spec: ModelSpec, dtype: str = "float32", remat: str = "none") -> "Networks":
        """Raises ValueError for a `remat` that models/remat.py does not know."""
        policy_of(remat)
        kwargs = {"dtype": jnp.dtype(dtype), "remat": remat}
        vae = TinyVAE if isinstance(spec.vae, TinyVAEConfig) else VAE
        text = {part: CLIPText(config, **kwargs) for part, config in spec.text_encoders.items()}
        first, second = (text.get(part) for part in ("text_encoder", "text_encoder_2"))
        return Networks(spec, UNet(spec.unet, **kwargs), vae(spec.vae, **kwargs), first, second)

    def with_scaling_factor(self, factor: float) -> "Networks":
        vae = dataclasses.replace(self.spec.vae, scaling_factor=factor)
        return self._replace(spec=dataclasses.replace(self.spec, vae=vae), vae=self.vae.clone(config=vae))

    def encode_text(self, params: Mapping[str, Params], ids: TokenIds, clip_skip: int | None = None) -> Conditioning:
        """Token ids -> the states of all text encoders, joined along their width, and the last one's pooled state.

        ids: padded for the first encoder; [batch, n * positions] are n chunks a text, each with its start and its end.
        They are read one by one and joined along the tokens; the pooled state is the first chunk's (A1111's way).
        params: by part. clip_skip: None = each encoder's own.
        Raises ValueError for more ids than positions that are no multiple of them.
        """
        batch, tokens = ids.shape
        positions = min(tokens, self.spec.positions)
        if tokens % positions:
            raise ValueError(f"{tokens} token ids a text are no whole chunks of {positions}")
        ids, states, pad = ids.reshape(-1, positions), [], None
        for part, config in self.spec.text_encoders.items():
            if pad is not None and pad != config.pad_token_id:
                ids = _pad_behind_end(ids, config.eos_token_id, config.pad_token_id)
            pad = config.pad_token_id
            states.append(getattr(self, part).apply({"params": params[part]}, ids, clip_skip))
        context = states[0].context if len(states) == 1 else jnp.concatenate([s.context for s in states], axis=-1)
        pooled = states[-1].pooled.reshape(batch, tokens // positions, -1)[:, 0]
        return Conditioning(context.reshape(batch, tokens, -1), pooled)

    def init(self, part: str, key: jax.Array) -> Params:
        """Fresh parameters of one part, float32."""
        return getattr(self, part).init(key, *self._smallest_inputs(part))["params"]

    def _smallest_inputs(self, part: str) -> tuple:
        unet, vae = self.spec.unet, self.spec.vae
        if part == "vae":
            return (jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)),)
        if part != "unet":
            return (jnp.zeros((1, 1), jnp.int32),)
        side = 2 ** (len(unet.block_out_channels) - 1)
        conditioning = Conditioning(jnp.zeros((1, 1, unet.cross_attention_dim)))
        if unet.addition_embed_type == "text_time":
            numbers = self.spec.num_time_ids
            width = unet.projection_class_embeddings_input_dim - numbers * unet.addition_time_embed_dim
            conditioning = conditioning.replace(pooled=jnp.zeros((1, width)), time_ids=jnp.zeros((1, numbers)))
        if unet.num_class_embeds is not None:
            conditioning = conditioning.replace(class_labels=jnp.zeros((1,), jnp.int32))
        if unet.time_cond_proj_dim is not None:
            conditioning = conditioning.replace(guidance_scale=jnp.ones((1,)))
        return jnp.zeros((1, side, side, unet.in_channels)), jnp.zeros((1,)), conditioning


def _pad_behind_end(ids: TokenIds, end: int, pad: int) -> TokenIds:
    """Everything behind a row's first end token becomes `pad`."""
    ended = jnp.cumsum(ids == end, axis=1, dtype=jnp.int32)
    behind = jnp.concatenate([jnp.zeros_like(ended[:, :1]), ended[:, :-1]], axis=1) > 0
    return jnp.where(behind, jnp.asarray(pad, ids.dtype), ids)
