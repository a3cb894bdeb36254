"""The networks of a model, and those beside it, as one value, hashable: it can be a static argument of `jit`."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sd_jax.models.aesthetic import AestheticHead
from sd_jax.models.caption_words import CaptionWords
from sd_jax.models.clip import CLIP
from sd_jax.models.clip_text import CLIPText
from sd_jax.models.clip_vision import CLIPVision
from sd_jax.models.discriminator import Discriminator
from sd_jax.models.perceptual import LPIPS
from sd_jax.models.presets import IdentityConfig, KUNetConfig, ModelSpec, TinyVAEConfig
from sd_jax.models.remat import policy_of
from sd_jax.models.rrdb import RRDBNet, SRVGGNet, upscaler
from sd_jax.models.unet import UNet
from sd_jax.models.unet_k import KUNet
from sd_jax.models.vae import VAE, Identity
from sd_jax.models.vae_tiny import TinyVAE
from sd_jax.types import Conditioning, Params, TokenIds


class Networks(NamedTuple):
    """The modules of a model, in the dtypes of a run; None where its spec has no such part."""

    spec: ModelSpec
    unet: UNet | KUNet
    vae: VAE | TinyVAE | Identity
    text_encoder: CLIPText | None
    text_encoder_2: CLIPText | None
    clip: CLIP | None = None
    features: CaptionWords | None = None
    perceptual: LPIPS | None = None
    aesthetic: AestheticHead | None = None
    discriminator: Discriminator | None = None
    image_encoder: CLIPVision | None = None
    upscaler: RRDBNet | SRVGGNet | None = None

    @staticmethod
    def of(spec: ModelSpec, dtype: str = "float32", remat: str = "none") -> "Networks":
        """Raises ValueError for a `remat` that models/remat.py does not know."""
        policy_of(remat)
        kwargs = {"dtype": jnp.dtype(dtype), "remat": remat}
        vae = {TinyVAEConfig: TinyVAE, IdentityConfig: Identity}.get(type(spec.vae), VAE)
        text = {part: CLIPText(config, **kwargs) for part, config in spec.text_encoders.items()}
        unet = KUNet if isinstance(spec.unet, KUNetConfig) else UNet
        model = {"unet": unet(spec.unet, **kwargs), "vae": vae(spec.vae, **kwargs)}
        model |= {part: text.get(part) for part in ("text_encoder", "text_encoder_2")}
        beside, plain = {}, {"dtype": jnp.dtype(dtype)}
        if spec.clip is not None:
            beside["clip"] = CLIP.of(spec.clip, dtype, remat)
        if spec.features is not None:
            beside["features"] = CaptionWords(spec.features, **plain)
        if spec.perceptual is not None:
            beside["perceptual"] = LPIPS(spec.perceptual.widths, spec.perceptual.depths, **plain)
        if spec.aesthetic is not None:
            beside["aesthetic"] = AestheticHead(spec.aesthetic, **plain)
        if spec.discriminator is not None:
            beside["discriminator"] = Discriminator(spec.discriminator, **plain)
        if spec.image_encoder is not None:
            beside["image_encoder"] = CLIPVision(spec.image_encoder.vision_config, **plain)
        if spec.upscaler is not None:
            beside["upscaler"] = upscaler(spec.upscaler, **plain)
        return Networks(spec, **model, **beside)

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
        if part == "clip":
            return self.clip.init(key)
        return getattr(self, part).init(key, *self._smallest_inputs(part))["params"]

    def _smallest_inputs(self, part: str) -> tuple:
        unet, vae = self.spec.unet, self.spec.vae
        if part == "vae":
            return (jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)),)
        if part in ("features", "perceptual"):
            side = 2 ** (len(getattr(self.spec, part).widths) - 1)
            return (jnp.zeros((1, side, side, 3)),) * (2 if part == "perceptual" else 1)
        if part == "aesthetic":
            return (jnp.zeros((1, self.spec.aesthetic.width)),)
        if part == "discriminator":
            side = 4 * 2**self.spec.discriminator.layers
            return (jnp.zeros((1, side, side, 3)),)
        if part == "image_encoder":
            side = self.spec.image_encoder.vision_config.image_size
            return (jnp.zeros((1, side, side, 3)),)
        if part == "upscaler":
            side = self.spec.upscaler.unshuffle
            return (jnp.zeros((1, side, side, 3)),)
        if part != "unet":
            return (jnp.zeros((1, 1), jnp.int32),)
        side = 2 ** (len(unet.block_out_channels) - 1)
        conditioning = Conditioning(jnp.zeros((1, 1, unet.cross_attention_dim)))
        if isinstance(unet, KUNetConfig):
            conditioning = conditioning.replace(pooled=jnp.zeros((1, self.spec.text_encoder.hidden_size)))
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
