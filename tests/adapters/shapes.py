"""Of a model's parameters, the shapes that `lora.targets_of` asks for."""

from flax.traverse_util import flatten_dict

from sd_jax.adapters.deltas import to_torch


def shapes_of(params):
    return {
        part: {
            name.removesuffix("/kernel"): to_torch(leaf).shape
            for name, leaf in flatten_dict(tree, sep="/").items()
            if name.endswith("/kernel")
        }
        for part, tree in params.items()
    }
