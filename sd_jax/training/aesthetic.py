"""`config.method="aesthetic"`: a head on a frozen CLIP learns how much people like pictures (Schuhmann et al. 2022).

    "ratings"   L = mean (s_i - r_i)^2                                              as LAION's predictors were trained
    "pairs"     L = mean over r_i > r_j of log(1 + exp(s_j - s_i))                  (Burges et al. 2005, RankNet)

s: scores, r: ratings. Pairs are all those of a batch whose ratings differ; they may be likes (1) and dislikes (0).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training.context import Context, Keys
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Params

LOSSES = ("ratings", "pairs")


def _scores(context: Context, params: Params, batch: Batch, keys: Keys | None = None) -> Float[Array, " batch"]:
    """keys: for dropout; None = without."""
    networks = context.networks
    features = jax.lax.stop_gradient(networks.clip.encode_picture(params["clip"], to_image(batch["pixels"])))

    def score(features, key=None):
        rngs = None if key is None else {"dropout": key}
        return networks.aesthetic.apply({"params": params["aesthetic"]}, features, key is None, rngs=rngs)

    if keys is None:
        return score(features)
    # Each picture with its own key, so that how a batch is cut changes no draw
    return jax.vmap(lambda feature, key: score(feature[None], key)[0])(features, keys)


def pair_losses(
    scores: Float[Array, " batch"], ratings: Float[Array, " batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum over all pairs whose ratings differ, how many there are) of the loss of "pairs"."""
    better = ratings[:, None] > ratings[None, :]
    margin = scores[:, None] - scores[None, :]
    return sum_of(jax.nn.softplus(-margin), better.astype(jnp.float32))


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    scores, ratings = _scores(context, params, batch, keys).astype(jnp.float32), batch["rating"]
    if context.config.aesthetic.loss == "ratings":
        return jnp.mean(jnp.square(scores - ratings)), {}
    total, count = pair_losses(scores, ratings)
    return total / jnp.maximum(count, 1.0), {}


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    """Besides the loss how many pairs are in the right order."""
    scores, ratings = _scores(context, params, batch).astype(jnp.float32), batch["rating"]
    better = (ratings[:, None] > ratings[None, :]).astype(jnp.float32)
    order = sum_of((scores[:, None] > scores[None, :]).astype(jnp.float32), better)
    on_ratings = context.config.aesthetic.loss == "ratings"
    loss = sum_of(jnp.square(scores - ratings)) if on_ratings else pair_losses(scores, ratings)
    return {"loss": loss, "order": order}


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    if config.aesthetic.loss not in LOSSES:
        raise ValueError(f"config.aesthetic.loss={config.aesthetic.loss!r} is unknown: use {' or '.join(LOSSES)}")
    if spec.clip is None or spec.aesthetic is None:
        missing = "a CLIP: give its path as config.init_clip" if spec.clip is None else "config.model.aesthetic"
        raise ValueError(f"config.method='aesthetic' needs {missing}")
    if spec.aesthetic.width != spec.clip.projection_dim:
        raise ValueError(
            f"config.model.aesthetic.width={spec.aesthetic.width}, and this CLIP's features have "
            f"{spec.clip.projection_dim} numbers: set it to that"
        )
    if not config.data.rating_key:
        raise ValueError("config.method='aesthetic' needs config.data.rating_key, the column of the ratings")


AESTHETIC = Method(
    trainable=lambda config, spec: ("aesthetic",),
    frozen=lambda config, spec: ("clip",),
    reads=("pixels", "ratings"),
    check=_check,
    loss=_loss,
    held_out=_held_out,
)
