"""What a run starts from: a checkpoint, fresh parameters, or some parts of each; and its tokenizer."""

import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.prompts.tokenize import CaptionTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from sd_jax.training.methods import Method
from sd_jax.types import Params

PARTS = ("unet", "vae", "text_encoder")


@dataclasses.dataclass
class Model:
    """A run's networks, what was loaded of them, and its tokenizer (None where no prompt is read)."""

    networks: Networks
    parts: tuple[str, ...]  # what the method reads
    loaded: dict[str, Params]  # on the host; parts that are not here are made by `init`
    tokenizer: Tokenizer | None
    seed: int

    def init(self, part: str) -> Params:
        key = jax.random.fold_in(jax.random.key(self.seed), PARTS.index(part))
        return self.networks.init(part, key)

    def caption_tokenizer(self) -> CaptionTokenizer | None:
        """Captions -> int32 [batch, tokens], for the data loader; long ones are counted and logged."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.for_captions(self.networks.spec.text_encoder.max_position_embeddings)

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
    loaded = load_checkpoint(config.init, weights="ema") if config.init else None
    if loaded is None and not config.model:
        raise ValueError("config.model and config.init are both empty: name a checkpoint or describe a model")
    spec = ModelSpec.from_dict(config.model.to_dict()) if config.model else loaded.spec
    parts = method.trainable(config) + method.frozen(config)
    params = {} if loaded is None else {part: loaded.params[part] for part in parts if part in loaded.params}
    for part in params:
        spec = _take_spec(spec, loaded.spec, part, config.init)
    missing = [part for part in method.frozen(config) if part not in params]
    if missing:
        raise ValueError(
            f"config.method={config.method!r} needs a trained {missing[0]}, and config.init={config.init!r} has none: "
            "give the path of a checkpoint that does"
        )
    if not config.model and set(parts) - set(params):
        raise ValueError(
            f"config.init={config.init!r} has no {sorted(set(parts) - set(params))[0]}, and config.model is empty"
        )

    tokenizer = None
    if "text_encoder" in parts:
        made = "text_encoder" not in params and not config.tokenizer
        tokenizer = _tokenizer(config, spec, loaded, made, workdir, captions, dry_run)
        if tokenizer is not None and made:
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            text = dataclasses.replace(spec.text_encoder, vocab_size=tokenizer.vocab_size, **ids)
            spec = dataclasses.replace(spec, text_encoder=text)
        if tokenizer is not None:
            tokenizer.check(spec.text_encoder)
    return Model(Networks.of(spec, config.dtype, config.remat), parts, params, tokenizer, config.seed)


def _take_spec(spec: ModelSpec, loaded: ModelSpec, part: str, path: str) -> ModelSpec:
    """`spec` with the loaded part's own description, once its architecture is known to be the same."""
    want, got = getattr(spec, part), getattr(loaded, part)
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
        return train_tokenizer(
            captions(), kept, spec.text_encoder.vocab_size, spec.text_encoder.max_position_embeddings
        )
    tokenizer = load_tokenizer(config.tokenizer or (loaded.tokenizer if loaded else None))
    if not dry_run:
        tokenizer.save(kept)
    return tokenizer
