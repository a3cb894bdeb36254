import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.models.clip_vision import CLIPVision
from sd_jax.models.presets import TINY_CLIP

CONFIG = dataclasses.replace(TINY_CLIP.vision_config, projection_dim=None, num_hidden_layers=1)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(CLIPVision(CONFIG), IMAGES)


@pytest.fixture(scope="module")
def run(params):
    return jax.jit(lambda images: CLIPVision(CONFIG).apply({"params": params}, images))


def test_shapes_and_dtypes(params, run):
    states = run(IMAGES)
    assert states.tokens.shape == (2, 1 + 16, 48) and states.pooled.shape == (2, 48)
    half = jax.eval_shape(lambda: CLIPVision(CONFIG, jnp.bfloat16).apply({"params": params}, IMAGES))
    assert half.tokens.dtype == half.pooled.dtype == jnp.bfloat16


def test_patches_lie_row_by_row_behind_the_class_and_all_see_all(params, run):
    """Without layers a token is a patch and its place; with one, every token knows of every patch."""
    bare = dataclasses.replace(CONFIG, num_hidden_layers=0)
    model = {**params["vision_model"], "encoder": {}}
    tokens = lambda images: CLIPVision(bare).apply({"params": {"vision_model": model}}, images).tokens  # noqa: E731
    changed = IMAGES.at[:, 8:16, 24:32].add(1.0)  # the patch of row 1, column 3
    moved = np.abs(tokens(changed) - tokens(IMAGES)).max((0, 2)) > 1e-4
    assert np.flatnonzero(moved).tolist() == [1 + 4 * 1 + 3]
    assert (np.abs(run(changed).tokens - run(IMAGES).tokens).max((0, 2)) > 1e-4).all()


def test_a_wrong_size_is_named(params):
    with pytest.raises(ValueError, match="pictures of 24x32, but image_size is 32"):
        CLIPVision(CONFIG).apply({"params": params}, IMAGES[:, :24])


@pytest.mark.parity
def test_equals_transformers(relative_error):
    import torch
    import transformers

    from sd_jax.checkpoints.keys_clip import from_transformers
    from sd_jax.checkpoints.tensors import lazy

    torch.manual_seed(0)
    text, vision = (dataclasses.asdict(tower) for tower in (TINY_CLIP.text_config, TINY_CLIP.vision_config))
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**text, "bos_token_id": 0}, vision_config=vision, projection_dim=24)
    ).eval()
    tensors = {name: lazy(tensor.detach().numpy()) for name, tensor in theirs.state_dict().items()}
    ours = from_transformers(tensors, TINY_CLIP, "the reference")
    params = traverse_util.unflatten_dict({name: jnp.asarray(np.asarray(t)) for name, t in ours.items()}, sep="/")
    with torch.no_grad():
        expected = theirs.vision_model(torch.tensor(np.asarray(IMAGES)).permute(0, 3, 1, 2), output_hidden_states=True)
        features = theirs.visual_projection(expected.pooler_output)
    own = {name: params[name] for name in ("vision_model", "visual_projection")}
    states = jax.jit(lambda p: CLIPVision(TINY_CLIP.vision_config).apply({"params": p}, IMAGES))(own)
    assert relative_error(states.tokens, expected.last_hidden_state.numpy()) < 1e-5
    assert relative_error(states.pooled, features.numpy()) < 1e-5
    assert relative_error(states.before_last, expected.hidden_states[-2].numpy()) < 1e-5
