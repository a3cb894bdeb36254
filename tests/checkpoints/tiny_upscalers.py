"""Small random upscalers as files have them, by names that are written out here."""

import numpy as np

from sd_jax.models.presets import RRDBConfig, SRVGGConfig

RRDB = RRDBConfig(features=8, blocks=2, growth=4)
COMPACT = SRVGGConfig(scale=3, features=8, convolutions=2)


def names(layout: str, blocks: int, stages: int) -> dict[str, str]:
    """{part: module} of an RRDBNet's file."""
    dense = [(n, i, k) for n in range(blocks) for i in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    if layout == "esrgan":
        ends = {"first": "model.0", "trunk": f"model.1.sub.{blocks}"}
        ends |= {f"up{s}": f"model.{3 * s}" for s in range(1, stages + 1)}
        ends |= {"hr": f"model.{3 * stages + 2}", "last": f"model.{3 * stages + 4}"}
        return ends | {f"dense{n}{i}{k}": f"model.1.sub.{n}.RDB{i}.conv{k}.0" for n, i, k in dense}
    if layout == "bsrgan":
        ends = {"first": "conv_first", "trunk": "trunk_conv", "hr": "HRconv", "last": "conv_last"}
        ends |= {f"up{s}": f"upconv{s}" for s in range(1, stages + 1)}
        return ends | {f"dense{n}{i}{k}": f"RRDB_trunk.{n}.RDB{i}.conv{k}" for n, i, k in dense}
    ends = {"first": "conv_first", "trunk": "conv_body", "hr": "conv_hr", "last": "conv_last"}
    ends |= {f"up{s}": f"conv_up{s}" for s in range(1, stages + 1)}
    return ends | {f"dense{n}{i}{k}": f"body.{n}.rdb{i}.conv{k}" for n, i, k in dense}


def rrdb(layout: str, config: RRDBConfig = RRDB, stages: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of an RRDBNet of so many doublings."""
    width, growth, widths = config.features, config.growth, {}
    for part in names(layout, config.blocks, stages):
        k = int(part[-1]) if part.startswith("dense") else 1
        widths[part] = (growth if part.startswith("dense") and k < 5 else width, width + (k - 1) * growth)
    widths |= {"first": (width, 3 * config.unshuffle**2), "last": (3, width)}
    rng, tensors = np.random.default_rng(seed), {}
    for part, module in names(layout, config.blocks, stages).items():
        out, inner = widths[part]
        tensors[f"{module}.weight"] = rng.normal(0, (2 / (9 * inner)) ** 0.5, (out, inner, 3, 3)).astype(np.float32)
        tensors[f"{module}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)
    return tensors


def compact(config: SRVGGConfig = COMPACT, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of an SRVGGNetCompact."""
    rng, width, last, tensors = np.random.default_rng(seed), config.features, 2 * config.convolutions + 2, {}
    for i in range(0, last + 1, 2):
        out, inner = 3 * config.scale**2 if i == last else width, width if i else 3
        tensors[f"body.{i}.weight"] = rng.normal(0, (2 / (9 * inner)) ** 0.5, (out, inner, 3, 3)).astype(np.float32)
        tensors[f"body.{i}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)
        if i < last:
            tensors[f"body.{i + 1}.weight"] = rng.uniform(-0.3, 0.5, width).astype(np.float32)
    return tensors
