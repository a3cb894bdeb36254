"""A loaded upscaler of ESRGAN's or Real-ESRGAN's, whole or in tiles.

What `sd_jax.load_upscaler` returns. In tiles the device holds one of them at a time, whatever the size of the picture;
the large picture is put together on the host (`sd_jax/tiles.py`, Eq. 1).
"""

import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sd_jax import hardware, sharding
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.place import place
from sd_jax.checkpoints.upscaler import save_upscaler
from sd_jax.models.presets import SRVGGConfig, UpscalerConfig
from sd_jax.models.rrdb import upscaler
from sd_jax.models.vae import to_image, to_pixels
from sd_jax.tiles import map_tiles
from sd_jax.types import Params


def load_upscaler(
    path: str | os.PathLike,  # .pth or .safetensors of ESRGAN, BSRGAN or Real-ESRGAN; a run of method "esrgan"
    dtype: str = "float32",  # of computation
) -> "Upscaler":
    """Raises FileNotFoundError or CheckpointError, naming the file and what of it does not fit."""
    sharding.keep_compilations()
    opened = open_beside("upscaler", path)
    return Upscaler(opened.config, place(opened.params, jnp.float32, where=path), dtype)


class Upscaler:
    """An upscaler on the device."""

    def __init__(self, config: UpscalerConfig, params: Params, dtype: str = "float32"):
        self.config, self.params, self.network = config, params, upscaler(config, jnp.dtype(dtype))

    @property
    def scale(self) -> int:
        return self.config.scale

    def __call__(
        self,
        images: np.ndarray,  # uint8 [batch, height, width, 3]
        tile: int | None = None,  # side in pixels of the picture that is given; None = the whole batch at once
        overlap: int | None = None,  # of tiles, at least; None = a quarter of the tile
    ) -> UInt8[np.ndarray, "batch new_height new_width 3"]:
        """-> pictures `scale` times as high and as wide. All tiles have one shape: one compilation serves any picture
        that is no smaller than they are.

        Raises ValueError for what is no batch of pictures, for tiles that cannot be, and without `tile` where the
        device has not the memory for all at once.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise ValueError(
                f"images: {images.dtype} of the shape {images.shape}: give uint8 [batch, height, width, 3]; "
                "of one picture images[None]"
            )
        batch, height, width, _ = images.shape
        side = self.config.unshuffle
        padded = np.pad(images, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)), mode="reflect")
        if tile is None:
            self._check_memory(batch, height, width)
            larger = np.asarray(self._enlarge(padded))
        else:
            if tile % side:
                raise ValueError(
                    f"tile={tile}: this upscaler takes multiples of {side}: give {tile // side * side or side}"
                )
            tile, apart = tile // side, tile // side // 4 if overlap is None else -(-overlap // side)
            larger = np.empty((batch, padded.shape[1] * self.scale, padded.shape[2] * self.scale, 3), np.uint8)
            for picture, of_it in zip(padded, larger, strict=True):
                sums = map_tiles(self._enlarge, picture, side, side * self.scale, tile, apart, margin=apart // 4)
                of_it[...] = np.rint(sums, out=sums)
        return larger[:, : height * self.scale, : width * self.scale]

    def save(self, path: str | os.PathLike, layout: str | None = None, dtype: str | None = None) -> None:
        """Writes a .safetensors or .pth file. layout: None = Real-ESRGAN's; or "esrgan", "bsrgan". dtype: None =
        float32. Raises as `checkpoints.upscaler.save_upscaler`."""
        save_upscaler(path, self.config, self.params, layout, dtype)

    def _enlarge(self, pixels: np.ndarray):
        return _run(self.network, self.params, pixels)

    def _check_memory(self, batch: int, height: int, width: int) -> None:
        needed, free = peak_bytes(self.config, batch * height * width), hardware.free_memory()
        if free is not None and needed > free:
            raise ValueError(
                f"{batch} of {width}x{height} pixels at once take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                "are free: give tile=512, or a smaller one"
            )


_run = sharding.jit(
    lambda network, params, pixels: to_pixels(network.apply({"params": params}, to_image(pixels))), static_argnums=0
)


def peak_bytes(config: UpscalerConfig, pixels: int) -> int:
    """About what so many pixels of small pictures take besides parameters and pictures.

    Up to three float32 copies of the widest array: the features of the large picture, or what a dense block has joined.
    XLA's own account on a CPU, of networks of 64 features: 2.0 copies at scales 2, 4 and 8, and 2.7 at scale 1.
    """
    if isinstance(config, SRVGGConfig):
        widest = max(config.features, 3 * config.scale**2)
    else:
        joined = config.features + 4 * config.growth
        widest = max(config.features * config.scale**2, joined // config.unshuffle**2)
    return 3 * 4 * widest * pixels
