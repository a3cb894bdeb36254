"""How well pictures fit their captions, by CLIP's features of both.

    CLIP score = 100 max(cos(picture, caption), 0)                                                               (Eq. 1)

Hessel et al. 2021, with the factor in common use (theirs is 2.5). Re-ranking is `sampling.clip.Clip.best_of`.
"""

import numpy as np
from jaxtyping import Float


def clip_score(
    image_features: Float[np.ndarray, "pictures width"],
    text_features: Float[np.ndarray, "pictures width"],
) -> Float[np.ndarray, " pictures"]:
    """(Eq. 1) of each picture and its own caption, float64. The score of a set is the mean.

    Raises ValueError for features that are not of norm 1.
    """
    return 100.0 * np.maximum(np.einsum("pw,pw->p", _unit(image_features), _unit(text_features)), 0.0)


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    norms = np.linalg.norm(features, axis=-1)
    if not (np.abs(norms - 1.0) <= 1e-2).all():
        raise ValueError(f"features have norms from {norms.min():.3g} to {norms.max():.3g}: divide each by its norm")
    return features / norms[..., None]  # those in bfloat16 are of norm 1 to two digits
