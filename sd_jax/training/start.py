"""What a run starts from: a checkpoint, fresh parameters, or some parts of each; and its tokenizer."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from logging import getLogger

import jax
import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.models.networks import Networks
from sd_jax.models.presets import PARTS, ModelSpec
from sd_jax.prompts.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from sd_jax.training.methods import Method
from sd_jax.types import Params

logger = getLogger(__name__)


@dataclasses.dataclass
class Model:
    """A run's networks, what was loaded of them, and its tokenizer (None where no prompt is read)."""

    networks: Networks
    trained: tuple[str, ...]  # parts that the method moves
    frozen: tuple[str, ...]  # parts that it reads besides
    loaded: dict[str, Params]  # not read yet; parts that are not here are made by `init`
    tokenizer: Tokenizer | None
    seed: int

    @property
    def parts(self) -> tuple[str, ...]:
        return self.trained + self.frozen

    @property
    def num_time_ids(self) -> int:
        """Numbers that batches must tell the U-Net of each picture's size and crop."""
        return self.networks.spec.num_time_ids if "unet" in self.parts else 0

    def init(self, part: str) -> Params:
        key = jax.random.fold_in(jax.random.key(self.seed), PARTS.index(part))
        return self.networks.init(part, key)

    def caption_tokenizer(self) -> Callable[[Sequence[str]], np.ndarray] | None:
        """Captions -> int32 [batch, tokens], for the data loader; long ones are counted and logged.

        Padded as the first text encoder was trained: SD 2's with 0, although its words are those of SD 1's tokenizer.
        """
        if self.tokenizer is None:
            return None
        spec = self.networks.spec
        tokenize, end = self.tokenizer.for_captions(_positions(spec)), self.tokenizer.eos_token_id
        pad = next(iter(spec.text_encoders.values())).pad_token_id
        return tokenize if pad == self.tokenizer.pad_token_id else lambda texts: _repad(tokenize(texts), end, pad)

    def meta(self, step: int) -> dict:
        """What a checkpoint says of itself, beside its arrays."""
        tokenizer = None if self.tokenizer is None else "tokenizer"
        return {"spec": self.networks.spec.to_dict(), "step": step, "tokenizer": tokenizer}


def build_model(
    config: ConfigDict, method: Method, workdir: pathlib.Path | None, captions, dry_run: bool = False
) -> Model:
    """Opens `config.init`, checks it against `config.model`, and loads or trains the tokenizer.

    captions: () -> the training captions, asked for only where a tokenizer is made from them.
    Raises ValueError where a part can neither be loaded nor made, CheckpointError for another architecture.
    """
    # In float32 whatever the file has: an average and small updates do not fit into half precision
    said = {"prediction_type": config.prediction_type or None}
    loaded = open_checkpoint(config.init, weights="ema", dtype="float32", **said) if config.init else None
    for note in () if loaded is None else loaded.notes:
        logger.info("%s: %s", config.init, note)
    if loaded is None and not config.model:
        raise ValueError("config.model and config.init are both empty: name a checkpoint or describe a model")
    spec = ModelSpec.from_dict(config.model.to_dict()) if config.model else loaded.spec
    trained, frozen = method.trainable(config, spec), method.frozen(config, spec)
    parts = trained + frozen
    params = {} if loaded is None else {part: loaded.params[part] for part in parts if part in loaded.params}
    for part in params:
        spec = _take_spec(spec, loaded.spec, part, config.init)
    missing = [part for part in frozen if part not in params]
    if missing:
        raise ValueError(
            f"config.method={config.method!r} needs a trained {missing[0]}, and config.init={config.init!r} has none: "
            "give the path of a checkpoint that does"
        )
    if not config.model and set(parts) - set(params):
        raise ValueError(
            f"config.init={config.init!r} has no {sorted(set(parts) - set(params))[0]}, and config.model is empty"
        )
    if "unet" in parts and spec.unet.in_channels != spec.vae.latent_channels:
        raise ValueError(
            f"config.method={config.method!r} trains on latents of {spec.vae.latent_channels} channels, and this U-Net "
            f"reads {spec.unet.in_channels} (for inpainting, depth or upscaling): choose another checkpoint"
        )

    tokenizer = None
    readers = [part for part in spec.text_encoders if part in parts]
    if readers:
        made = not any(part in params for part in readers) and not config.tokenizer
        tokenizer = _tokenizer(config, spec, loaded, made, workdir, captions, dry_run)
        if tokenizer is not None and made:
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            text = {
                p: dataclasses.replace(c, vocab_size=tokenizer.vocab_size, **ids) for p, c in spec.text_encoders.items()
            }
            spec = dataclasses.replace(spec, **text)
        if tokenizer is not None:
            for part in readers:
                tokenizer.check(getattr(spec, part))
    return Model(Networks.of(spec, config.dtype, config.remat), trained, frozen, params, tokenizer, config.seed)


def _positions(spec: ModelSpec) -> int:
    """Tokens of a prompt: what all text encoders take."""
    return min(config.max_position_embeddings for config in spec.text_encoders.values())


def _repad(ids: Int32[np.ndarray, "batch tokens"], end: int, pad: int) -> Int32[np.ndarray, "batch tokens"]:
    """`pad` behind each row's first `end`."""
    ends = ids == end
    return np.where(np.cumsum(ends, axis=1) > ends, np.int32(pad), ids)


def _take_spec(spec: ModelSpec, loaded: ModelSpec, part: str, path: str) -> ModelSpec:
    """`spec` with the loaded part's own description, once its architecture is known to be the same."""
    want, got = getattr(spec, part), getattr(loaded, part)
    if type(want) is not type(got):
        raise CheckpointError(
            f"{path} is of another architecture: its {part} is a {type(got).__name__}, config.model says "
            f"{type(want).__name__}; change config.model or leave it empty"
        )
    # What is measured or is the tokenizer's business is taken from the checkpoint without asking
    measured = {"vae": ("scaling_factor", "sample_size"), "unet": ("sample_size",)}.get(
        part, ("vocab_size", "eos_token_id", "pad_token_id")
    )
    for field in dataclasses.fields(want):
        a, b = getattr(want, field.name), getattr(got, field.name)
        if a != b and field.name not in measured:
            raise CheckpointError(
                f"{path} is of another architecture: its {part}.{field.name} is {b}, config.model says {a}; "
                "change config.model or leave it empty"
            )
    return dataclasses.replace(spec, **{part: got})


def _tokenizer(config, spec, loaded, made, workdir, captions, dry_run) -> Tokenizer | None:
    """The tokenizer of the run, kept in workdir/tokenizer so that samples and exports find it."""
    kept = None if workdir is None else workdir / "tokenizer"
    if kept is not None and kept.exists():
        return load_tokenizer(kept)
    if made and dry_run:
        return None
    if made:
        most = min(text.vocab_size for text in spec.text_encoders.values())
        return train_tokenizer(captions(), kept, most, _positions(spec))
    tokenizer = load_tokenizer(config.tokenizer or (loaded.tokenizer if loaded else None))
    if not dry_run:
        tokenizer.save(kept)
    return tokenizer
