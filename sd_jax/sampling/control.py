"""Pictures that steer a picture: ControlNets and T2I-Adapters, loaded, and how strongly each works at each step.

    control = sd_jax.load_control("control_v11p_sd15_canny.pth")
    pipe.text_to_image("a cat", control=[control.hint("edges.png", strength=0.8, end=0.6)])

Of several, what they add is summed. What does not hang on the step is made once, before the walk: all that a
T2I-Adapter does, and a ControlNet's reading of its hint. A step at which a strength is 0 does without that ControlNet.
"""

import functools
import math
import os
from collections.abc import Sequence
from logging import getLogger
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd_jax import sharding
from sd_jax.adapters.controlnet import EMBEDDING, ControlNet, ControlNetConfig, HintEmbedding
from sd_jax.adapters.t2i_adapter import T2IAdapter
from sd_jax.checkpoints import control as files
from sd_jax.checkpoints.place import gather, place
from sd_jax.models.layers import as_many
from sd_jax.sampling import canvas
from sd_jax.types import AnyArray, Conditioning, Control, Params, Pixels

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline

logger = getLogger(__name__)

GUESS = 10  # how much weaker the first residual of guess mode is than the last


def load_control(
    path: str | os.PathLike,  # a file or folder of a ControlNet or a T2I-Adapter; the workdir of a run that trained one
    dtype: str = "float32",  # of weights and computation
    base: "Pipeline | None" = None,  # the model that a file of differences is to be added to
) -> "ControlModel":
    """Opens either kind in any layout. Raises FileNotFoundError or CheckpointError, naming the file and the mend."""
    sharding.keep_compilations()
    opened = files.open_control(path, None if base is None else base._part("unet"))
    for note in opened.notes:
        logger.info("%s: %s", path, note)
    return ControlModel(opened.config, place(opened.params, dtype, where=path), dtype, str(path))


class Hint(NamedTuple):
    """A picture for a control, and how it works; what `control=` of a job takes."""

    control: "ControlModel"
    pixels: Pixels
    mask: canvas.Mask | None  # what an inpainting ControlNet is to redraw
    strength: float
    start: float
    end: float
    weights: tuple[float, ...]  # of each residual or feature
    guess_mode: bool

    def part(self, box: canvas.Box, height: int, width: int) -> "Hint":
        """Of a part of the picture that it belongs to, whose size is given."""
        mask = None if self.mask is None else box.of(canvas.resize_mask(self.mask, height, width))
        return self._replace(pixels=box.of(canvas.resize(self.pixels, height, width)), mask=mask)


class ControlModel:
    """A ControlNet or T2I-Adapter on the device."""

    def __init__(self, config: files.Config, params: Params, dtype: str = "float32", where: str = "the control"):
        self.config, self.params, self.dtype, self.where = config, params, jnp.dtype(dtype), where
        if self.is_controlnet:
            pools = config.global_pool_conditions
            self.network = ControlNet(config.unet, self.dtype, global_pool_conditions=pools)
            self.reader, self.num_weights = HintEmbedding(config, self.dtype), config.num_residuals
            self.reads = params[EMBEDDING]  # parameters of the reader
            self.works = {name: tree for name, tree in params.items() if name != EMBEDDING}  # of what works in a step
        else:
            self.network = self.reader = T2IAdapter(config, self.dtype)
            self.num_weights, self.reads, self.works = len(config.levels), params, {}

    @property
    def is_controlnet(self) -> bool:
        return isinstance(self.config, ControlNetConfig)

    def hint(
        self,
        image: Any,  # a map, or a picture: a path, a PIL image, or an array: uint8 or floats in [0, 1], or a batch;
        # or what the preprocessor "inpaint" makes, or its .npy, for which there is no mask to be given
        strength: float = 1.0,
        start: float = 0.0,  # at work from this share of the steps on
        end: float = 1.0,  # and until this one
        weights: Sequence[float] | None = None,  # of each residual, the middle's last, or feature; None = 1 each
        guess_mode: bool = False,  # not beside the negative prompt, and the less the earlier in the network
        mask: Any = None,  # for inpainting ControlNets: white is to be redrawn
    ) -> Hint:
        """What a job's `control=` takes. It is resized to the picture's size. Raises ValueError, naming the argument.

        start and end count as diffusers' control_guidance_start and _end.
        """
        if mask is None:
            image, mask = _unmasked(image)
        pixels = canvas.read_pixels(image)
        mask = None if mask is None else canvas.read_mask(mask, *pixels.shape[1:3])
        if not isinstance(strength, Real) or not math.isfinite(strength):
            raise ValueError(f"strength={strength!r}: give a finite number")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start={start!r}, end={end!r}: shares of the steps, 0 <= start < end <= 1, are needed")
        if weights is None:
            count = self.num_weights
            weights = np.logspace(-np.log10(GUESS), 0, count) if guess_mode and self.is_controlnet else np.ones(count)
        weights = tuple(float(weight) for weight in weights)
        if len(weights) != self.num_weights or not all(map(math.isfinite, weights)):
            raise ValueError(f"weights={weights!r}: this control has {self.num_weights}, give a finite number for each")
        if mask is not None and not self.is_controlnet:
            raise ValueError("mask= is for inpainting ControlNets, and this is a T2I-Adapter: leave it out")
        return Hint(self, pixels, mask, float(strength), start, end, weights, guess_mode)

    def check_fits(self, pipe: "Pipeline", size: tuple[int, int], tile: int | None) -> None:
        """Raises ValueError for another family's model, or a size that this does not do. size: of latents."""
        unet, factor = pipe.spec.unet, pipe.spec.vae.downscale
        if not self.is_controlnet:
            if tile is not None:
                raise ValueError(f"{self.where}: a T2I-Adapter sees the picture as a whole: leave tile= out")
            multiple = self.config.downscale_factor
            wide = [width for width, _ in self.config.levels][: len(unet.block_out_channels)]
            if tuple(wide) != unet.block_out_channels or multiple % factor:
                raise ValueError(f"{self.where}: for a U-Net of widths {wide}, not {list(unet.block_out_channels)}")
            for name, side in zip(("height", "width"), size, strict=True):
                if side * factor % multiple:
                    raise ValueError(f"{name}={side * factor}: {self.where} needs a multiple of {multiple}")
            return
        own = self.config.unet
        fields = ("block_out_channels", "attention_blocks", "layers_per_block", "cross_attention_dim")
        fields += ("addition_embed_type", "projection_class_embeddings_input_dim")
        for field in fields:
            if getattr(own, field) != getattr(unet, field):
                found = f"{field} is {getattr(own, field)}, this model's {getattr(unet, field)}"
                raise ValueError(f"{self.where} is for another family of models: its {found}")
        if self.config.downscale != factor or own.in_channels != pipe.spec.vae.latent_channels:
            raise ValueError(f"{self.where} is for latents of another size or number of channels than this model's")

    def save(self, path: str | os.PathLike, format: str = "diffusers") -> None:
        """Writes "diffusers" (a folder) or "single_file" (.safetensors, in the authors' layout)."""
        files.save_control(path, self.config, gather(self.params), format)


def _unmasked(image: Any) -> tuple[Any, Any]:
    """(the picture, its mask) of floats that are -1 where it is to be redrawn; anything else as it is, and None."""
    if isinstance(image, str | os.PathLike) and os.fspath(image).endswith(".npy"):
        image = np.load(image, allow_pickle=False)
    if not isinstance(image, np.ndarray) or not np.issubdtype(image.dtype, np.floating):
        return image, None
    below = image < 0
    if not below.any() or (image[below] != -1).any():
        return image, None
    return np.where(below, image.dtype.type(0), image), below.all(-1)


# -- In a walk -------------------------------------------------------------------------------------------------------


class Steering(NamedTuple):
    """Of one hint, in a walk; traced, so that only shapes compile anew."""

    params: Params  # of a ControlNet; {} of a T2I-Adapter
    strengths: Float[AnyArray, " calls"]
    weights: Float[AnyArray, " residuals"]


class Seen(NamedTuple):
    """What the rows of a batch, prompts or negative prompts, see of one hint."""

    read: Any  # [rows, ...]: the hint as a ControlNet reads it, or a T2I-Adapter's features
    heeded: Float[AnyArray, " rows"]  # 0 = not at all


class Steered(NamedTuple):
    """All that is traced of the hints of a walk."""

    steering: tuple[Steering, ...] = ()
    positive: tuple[Seen, ...] = ()  # by the rows of prompts
    negative: tuple[Seen, ...] = ()  # by those of negative prompts


def steer(
    pipe: "Pipeline",
    hints: Sequence[Hint],
    size: tuple[int, int],  # of latents
    batch: int,
    parts: int,  # of each prompt, whose rows lie next to each other
    steps: int,  # that are walked
    calls: int,  # of the denoiser in a step
) -> tuple[tuple[ControlNet | T2IAdapter, ...], Steered]:
    """(the networks, what they are given). Raises ValueError for a hint of another number of pictures."""
    factor = pipe.spec.vae.downscale
    sides = tuple(side * factor for side in size)
    steering, positive, negative = [], [], []
    for hint in hints:
        if len(hint.pixels) not in (1, batch):
            raise ValueError(f"a hint holds {len(hint.pixels)} pictures, the prompts ask for {batch}")
        whole = hint.part(canvas.Box(0, 0, *sides), *sides)
        mask = None if whole.mask is None else jnp.asarray(whole.mask)
        read = _read(hint.control.reads, jnp.asarray(whole.pixels), mask, reader=hint.control.reader)
        starts = np.arange(steps) / steps
        works = (starts >= hint.start) & (starts + 1 / steps <= hint.end + 1e-6)
        strengths = np.repeat(np.where(works, hint.strength, 0.0), calls).astype(np.float32)
        steering.append(Steering(hint.control.works, strengths, np.asarray(hint.weights, np.float32)))
        of_each = jax.tree.map(lambda array: jnp.broadcast_to(array, (batch, *array.shape[1:])), read)
        of_parts = jax.tree.map(lambda array: jnp.repeat(array, parts, axis=0), of_each)
        positive.append(Seen(of_parts, np.ones(batch * parts, np.float32)))
        negative.append(Seen(of_each, np.full(batch, not hint.guess_mode, np.float32)))
    networks = tuple(hint.control.network for hint in hints)
    return networks, Steered(tuple(steering), tuple(positive), tuple(negative))


def control_of(
    networks: Sequence[ControlNet | T2IAdapter],
    steering: Sequence[Steering],
    shown: Sequence[Seen],
    call: Int[Array, ""],
    latents: Float[Array, "batch h w channels"],
    timesteps: Float[Array, " batch"],
    conditioning: Conditioning,  # of as many rows as see the hints: the batch, or all of it once more
) -> Control | None:
    """What all of them add at a call; None = there are none."""
    total = None
    for network, worked, each in zip(networks, steering, shown, strict=True):
        strengths = jnp.asarray(worked.strengths)
        strength = strengths[jnp.minimum(call, strengths.shape[0] - 1)]
        if isinstance(network, T2IAdapter):
            added = each.read
        else:

            def at_work(network=network, worked=worked, each=each):
                read = each.read[: latents.shape[0]]
                return network.apply({"params": worked.params}, latents, timesteps, conditioning, read)

            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(at_work))
            added = jax.lax.cond(strength != 0, at_work, lambda nothing=nothing: nothing)
        added = _weighed(added, strength * jnp.asarray(each.heeded), jnp.asarray(worked.weights))
        total = added if total is None else _sum(total, added)
    return total


def _weighed(control: Control, rows: Float[Array, " rows"], weights: Float[Array, " residuals"]) -> Control:
    leaves, tree = jax.tree.flatten(control)
    factors = [(rows * weights[i]).astype(leaf.dtype)[:, None, None, None] for i, leaf in enumerate(leaves)]
    scaled = [as_many(leaf, factor) * factor for leaf, factor in zip(leaves, factors, strict=True)]
    return jax.tree.unflatten(tree, scaled)


def _sum(a: Control, b: Control) -> Control:
    """Of a ControlNet's and a T2I-Adapter's, either has what the other lacks."""

    def add(x, y):
        if not x or not y:
            return x or y
        return tuple(p + q for p, q in zip(x, y, strict=True))

    middle = a.middle if b.middle is None else b.middle if a.middle is None else a.middle + b.middle
    return Control(add(a.skips, b.skips), middle, add(a.features, b.features))


@functools.partial(sharding.jit, static_argnames="reader")
def _read(params, pixels, mask, *, reader):
    image = pixels.astype(jnp.float32) / 255
    image = image if mask is None else jnp.where(mask >= 0.5, -1.0, image)
    return reader.apply({"params": params}, image)
