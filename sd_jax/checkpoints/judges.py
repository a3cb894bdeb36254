"""The published weights of the networks that judge -> our parameters. Read, never written.

    pt_inception-2015-12-05-6726825d.pth   FID's InceptionV3 (mseitzer/pytorch-fid; torch-fidelity's file is the same)
        Mixed_5b.branch1x1.conv.weight      ->  Mixed_5b/branch1x1/conv/kernel
        Mixed_5b.branch1x1.bn.running_mean  ->  Mixed_5b/branch1x1/bn/running_mean
    vgg16-397923af.pth                     torchvision's VGG16
        features.0.weight                   ->  features_0/kernel
    vgg.pth                                the weights of LPIPS (richzhang/PerceptualSimilarity, weights/v0.1)
        lin0.model.1.weight                 ->  lin0/model_1/kernel

Either as torch.save or as safetensors has them, told by content. Classifiers and counters of batches are passed over.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util

from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.place import place
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models import inception, perceptual
from sd_jax.types import Params

INCEPTION, VGG16, LPIPS_WEIGHTS = "FID's InceptionV3", "torchvision's VGG16", "LPIPS' weights for VGG16"

_PASSED_OVER = {INCEPTION: ("fc.weight", "fc.bias"), VGG16: ("classifier.",), LPIPS_WEIGHTS: ()}
_MENDS = {
    INCEPTION: "get pt_inception-2015-12-05-6726825d.pth of pytorch-fid (torchvision's inception_v3 is another one)",
    VGG16: "get vgg16-397923af.pth of torchvision",
    LPIPS_WEIGHTS: "get lpips/weights/v0.1/vgg.pth of the lpips package (alex.pth and squeeze.pth are for others)",
}


def load_inception(path: str | os.PathLike) -> Params:
    """-> parameters of `models.inception.InceptionV3`, float32, on the default device.

    Raises FileNotFoundError, and CheckpointError listing what is missing, unexpected, of another shape or not finite.
    """
    return place(from_torch(INCEPTION, open_any(path).tensors, path), "float32", where=path)


def load_lpips(
    vgg16: str | os.PathLike,  # torchvision's file
    weights: str | os.PathLike,  # the lpips package's file
) -> Params:
    """-> parameters of `models.perceptual.LPIPS`, float32, on the default device. Raises as `load_inception` does."""
    trunk = place(from_torch(VGG16, open_any(vgg16).tensors, vgg16), "float32", where=vgg16)
    return trunk | place(from_torch(LPIPS_WEIGHTS, open_any(weights).tensors, weights), "float32", where=weights)


def from_torch(which: str, tensors: Mapping[str, Tensor], where: str | os.PathLike) -> Params:
    """One file's tensors -> our tree of them. `which`: INCEPTION, VGG16 or LPIPS_WEIGHTS; `where` is for messages."""
    wanted, found, problems = _shapes(which), {}, []
    for name, tensor in tensors.items():
        ours = _our_name(name, tensor.ndim)
        if ours in wanted:
            found[ours] = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor  # OIHW -> HWIO
        elif not (name.startswith(_PASSED_OVER[which]) or name.endswith(".num_batches_tracked")):
            problems.append(f"{name} is unexpected")
    for ours, shape in wanted.items():
        if ours not in found:
            problems.append(f"{_their_name(ours)} is missing")
        elif found[ours].shape != shape:
            problems.append(f"{_their_name(ours)} is {_their_shape(found[ours].shape)}, not {_their_shape(shape)}")
    if problems:
        raise CheckpointError(f"{Path(where)}: not {which}: {listing(problems)}: {_MENDS[which]}")
    return traverse_util.unflatten_dict(found, sep="/")


@functools.cache
def _shapes(which: str) -> dict[str, tuple[int, ...]]:
    """{our name: shape} of what the networks initialise."""
    if which == INCEPTION:
        side = inception.SMALLEST
        module, inputs = inception.InceptionV3(), (jnp.zeros((1, side, side, 3)),)
    else:
        module, inputs = perceptual.LPIPS(), (jnp.zeros((1, 16, 16, 3)),) * 2
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    if which == INCEPTION:
        return shapes
    return {name: shape for name, shape in shapes.items() if name.startswith("lin") == (which == LPIPS_WEIGHTS)}


def _our_name(name: str, ndim: int) -> str:
    """Numbers are joined to what they count; `weight` is a norm's scale or a convolution's kernel."""
    *modules, leaf = name.split(".")
    joined: list[str] = []
    for module in modules:
        if module.isdecimal() and joined:
            joined[-1] = f"{joined[-1]}_{module}"
        else:
            joined.append(module)
    return "/".join([*joined, {"weight": "scale" if ndim == 1 else "kernel"}.get(leaf, leaf)])


def _their_name(name: str) -> str:
    *modules, leaf = name.split("/")
    split = []
    for module in modules:
        stem, _, index = module.partition("_")
        split += [stem, index] if stem in ("features", "model") else [module]
    return ".".join([*split, "weight" if leaf in ("kernel", "scale") else leaf])


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else shape
