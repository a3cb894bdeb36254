"""A loaded model and the jobs that it does: what `sd_jax.load` returns."""

import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sd_jax import sharding
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.prompts.tokenize import Tokenizer, load_tokenizer
from sd_jax.sampling import text_to_image as job
from sd_jax.types import AnyArray, Conditioning, Image, Latents, Params, Pixels, Recipe, TokenIds

BUNDLED = pathlib.Path(__file__).parents[1] / "assets" / "shapes_64"


def load(
    path: str | pathlib.Path | None = None,  # a workdir, a diffusers folder or a single file; None = the bundled model
    dtype: str = "float32",  # of weights and computation
    tokenizer: str | None = None,  # a folder or hub name; None = the checkpoint's own, else CLIP's from the hub
    vae: str | pathlib.Path | None = None,  # another checkpoint to take the autoencoder from
    weights: str = "ema",  # "ema" (raw where there is none) or "raw"
) -> "Pipeline":
    """Opens a checkpoint of any kind. Raises FileNotFoundError or CheckpointError, naming the file and the mend."""
    checkpoint = open_checkpoint(BUNDLED if path is None else path, weights=weights, vae=vae, dtype=dtype)
    return Pipeline(checkpoint.spec, checkpoint.params, tokenizer or checkpoint.tokenizer, dtype)


class Pipeline:
    """A model on the device. Every method is a pure function of its arguments and the weights."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,  # {"unet", "vae", "text_encoder"}; a part may be missing until a job needs it
        tokenizer: Tokenizer | str | pathlib.Path | None = None,  # None = CLIP's, from the hub or its cache
        dtype: str = "float32",
    ):
        self.spec, self.dtype = spec, dtype
        self.params = jax.tree.map(functools.partial(_on_device, dtype=jnp.dtype(dtype)), params)
        self.networks = Networks.of(spec, dtype)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use: a file without one is good for everything but prompts."""
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = load_tokenizer(self._tokenizer)
            self._tokenizer.check(self.spec.text_encoder)
        return self._tokenizer

    # --- The parts ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """Prompts -> the text encoder's states; words beyond its positions are dropped with a warning."""
        return self.encode_tokens(self.tokenizer(prompts, self.spec.text_encoder.max_position_embeddings), clip_skip)

    def encode_tokens(self, ids: TokenIds, clip_skip: int | None = None) -> Conditioning:
        """`clip_skip` as A1111 counts: 1 = last layer; None = the family's own (SD 1.x: 1)."""
        return _encode_tokens(self._part("text_encoder"), self.networks, jnp.asarray(ids, jnp.int32), clip_skip or 1)

    def predict(self, latents: Latents, timesteps: Float[AnyArray, " batch"], conditioning: Conditioning) -> Latents:
        """The raw output of the U-Net, NHWC, for latents as it sees them (scaled by 1 / sqrt(1 + sigma^2))."""
        return _predict(self._part("unet"), self.networks, jnp.asarray(latents), jnp.asarray(timesteps), conditioning)

    def encode_image(self, image: Image | Pixels) -> Latents:
        """uint8 pixels, or floats in [-1, 1], NHWC -> scaled latents, the mean of the posterior."""
        return _encode_image(self._part("vae"), self.networks, jnp.asarray(image))

    def decode_latents(self, latents: Latents) -> Image:
        """Scaled latents -> image, about [-1, 1], float32, not clipped."""
        return _decode_latents(self._part("vae"), self.networks, jnp.asarray(latents))

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def text_to_image(
        self,
        prompt: str | Sequence[str] = "",  # several prompts make one batch, `batch_size` pictures of each
        *,
        latents: Latents | None = None,  # the starting noise, unit variance; None = drawn from the seed
        conditioning: Conditioning | None = None,  # in place of prompts
        negative_conditioning: Conditioning | None = None,
        output: str = "images",  # "images": uint8 [batch, height, width, 3]; "latents": scaled, float32
        callback: Callable | None = None,  # on the host: (step, x, denoised); the same object never recompiles
        **recipe,  # fields of sd_jax.Recipe
    ) -> np.ndarray:
        """Pictures of a prompt. Raises ValueError, naming the field, for a recipe that cannot be made.

        Raises FloatingPointError, naming the stage, where numbers are not finite (half precision is the usual cause).
        """
        return job.text_to_image(
            self, prompt, Recipe(**recipe), latents, conditioning, negative_conditioning, output, callback
        )

    def save(self, path: str | pathlib.Path, format: str = "diffusers") -> None:
        """Writes "diffusers" (a folder), "single_file" (.safetensors, CompVis layout) or "native" (a workdir)."""
        save_checkpoint(path, self.spec, self.params, self._tokenizer_for_saving(format), format=format)

    def _tokenizer_for_saving(self, format: str) -> Tokenizer | None:
        return None if format == "single_file" else self.tokenizer

    def _part(self, name: str) -> Params:
        if name not in self.params:
            raise ValueError(
                f"this checkpoint has no {name}: load a whole one" + (" or give vae=" if name == "vae" else "")
            )
        return self.params[name]


def _on_device(leaf, dtype) -> jax.Array:
    """One leaf at a time, read only now where it is still in its file: never two copies of a model."""
    return jnp.asarray(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), dtype)


# Module-level functions: pipelines of the same networks share their compilations


@functools.partial(sharding.jit, static_argnums=(1, 3))
def _encode_tokens(params, networks, ids, clip_skip):
    return networks.text_encoder.apply({"params": params}, ids, clip_skip)


@functools.partial(sharding.jit, static_argnums=1)
def _predict(params, networks, latents, timesteps, conditioning):
    return networks.unet.apply({"params": params}, latents, timesteps, conditioning.context)


@functools.partial(sharding.jit, static_argnums=1)
def _encode_image(params, networks, image):
    image = to_image(image) if image.dtype == jnp.uint8 else image
    posterior = networks.vae.apply({"params": params}, image, method="encode")
    return posterior.mean * networks.spec.vae.scaling_factor


@functools.partial(sharding.jit, static_argnums=1)
def _decode_latents(params, networks, latents):
    z = latents / networks.spec.vae.scaling_factor
    return networks.vae.apply({"params": params}, z, method="decode").astype(jnp.float32)
