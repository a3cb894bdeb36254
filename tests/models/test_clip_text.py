import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.clip_text import CLIPText
from sd_jax.models.families import SD15
from sd_jax.models.presets import TINY, CLIPTextConfig

CONFIG = TINY.text_encoder


def tokens(config=CONFIG, batch=2, length=None):
    """Random words, then the end token and padding."""
    length = length or config.max_position_embeddings
    ids = np.random.default_rng(0).integers(1, config.eos_token_id, (batch, length))
    for row, end in enumerate(np.linspace(2, length - 1, batch).astype(int)):
        ids[row, end], ids[row, end + 1 :] = config.eos_token_id, config.pad_token_id
    return jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(CLIPText(CONFIG), tokens())


def run(params, ids, clip_skip=None, **types):
    return jax.jit(lambda p: CLIPText(CONFIG, **types).apply({"params": p}, ids, clip_skip))(params)


def test_shapes_and_dtypes(params):
    out = run(params, tokens())
    assert out.context.shape == (2, 77, 32) and out.pooled.shape == (2, 32)
    assert run(params, tokens(length=5)).context.shape == (2, 5, 32)
    half = run(params, tokens(), dtype=jnp.bfloat16)
    assert half.context.dtype == half.pooled.dtype == jnp.bfloat16
    assert np.linalg.norm(half.context.astype(jnp.float32) - out.context) < 0.05 * np.linalg.norm(out.context)


def test_sd15_has_its_123_million_parameters():
    shapes = jax.eval_shape(CLIPText(SD15.text_encoder).init, jax.random.key(0), tokens(SD15.text_encoder))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 123_060_480


def test_words_do_not_see_those_that_follow(params):
    ids = tokens()
    changed = run(params, ids.at[:, 40:].set(3)).context
    np.testing.assert_allclose(changed[:, :40], run(params, ids).context[:, :40], atol=1e-5)


def test_pooled_is_the_state_at_the_first_end_token(params):
    """Even where a token with a larger id, as textual inversion adds them, comes later."""
    ids = tokens(length=10).at[:, 4].set(CONFIG.eos_token_id)
    config = dataclasses.replace(CONFIG, eos_token_id=500)
    ids = jnp.where(ids == 999, 500, ids).at[:, 7].set(900)
    out = CLIPText(config).apply({"params": params}, ids)
    first = [int(np.flatnonzero(row == 500)[0]) for row in np.asarray(ids)]
    np.testing.assert_array_equal(out.pooled, out.context[jnp.arange(2), jnp.asarray(first)])


def test_context_is_the_layer_that_the_config_says(params):
    """SDXL: the last but one, without the final norm; the pooled state is the last one's all the same."""
    config = dataclasses.replace(CONFIG, clip_skip=2, context_norm=False)
    own, last = (CLIPText(config).apply({"params": params}, tokens(), skip) for skip in (None, 1))
    norm = params["text_model"]["final_layer_norm"]
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)  # noqa: E731
    for ours, skip in ((own, 2), (last, 1)):
        expected = run(params, tokens(), skip)
        scaled = normed(ours.context) * norm["scale"][None, None] + norm["bias"][None, None]
        np.testing.assert_allclose(scaled, expected.context, atol=1e-5)
        np.testing.assert_allclose(ours.pooled, expected.pooled, atol=1e-6)


def test_remat_changes_neither_output_nor_gradient(params, assert_trees_close):
    def value_and_gradient(remat):
        loss = lambda p: jnp.square(run(p, tokens(length=8), remat=remat).context).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_trees_close(value_and_gradient("blocks"), value_and_gradient("none"))


def test_too_many_tokens_and_a_wrong_clip_skip_are_named(params):
    with pytest.raises(ValueError, match="78 tokens, but max_position_embeddings is 77"):
        run(params, jnp.ones((1, 78), jnp.int32))
    for clip_skip in (0, 3):
        with pytest.raises(ValueError, match=f"clip_skip={clip_skip} is not within 1..2"):
            run(params, tokens(), clip_skip)


# Parity with transformers


def reference(config: CLIPTextConfig):
    import torch
    import transformers

    torch.manual_seed(0)
    fields = dataclasses.asdict(config) | {"bos_token_id": 0}
    kind = "CLIPTextModel" if config.projection_dim is None else "CLIPTextModelWithProjection"
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**fields)).eval()


def parity_errors(config, ids, from_torch, relative_error):
    """Errors of the context with clip_skip None, 1 and 2, and of the pooled state."""
    import torch

    model = reference(config)
    params = from_torch("text_encoder", model, config)
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(ids), dtype=torch.long), output_hidden_states=True)
        norm = getattr(model, "text_model", model).final_layer_norm if config.context_norm else lambda x: x
        contexts = [norm(expected.hidden_states[-skip]).numpy() for skip in (config.clip_skip, 1, 2)]
    pooled = expected.pooler_output if config.projection_dim is None else expected.text_embeds
    encoder = CLIPText(config)
    ours = jax.jit(lambda p: [encoder.apply({"params": p}, ids, skip) for skip in (None, 1, 2)])(params)
    return (
        *(relative_error(a.context, b) for a, b in zip(ours, contexts, strict=True)),
        *(relative_error(state.pooled, pooled.numpy()) for state in ours),
    )


# The ends of prompts are padded with another token in all but CLIP-L
LINES = {
    "clip_l": CONFIG,
    "clip_l_of_sdxl": dataclasses.replace(CONFIG, clip_skip=2, context_norm=False),
    "openclip_h": dataclasses.replace(CONFIG, hidden_act="gelu", pad_token_id=0),
    "openclip_bigg": dataclasses.replace(
        CONFIG, hidden_act="gelu", pad_token_id=0, projection_dim=24, clip_skip=2, context_norm=False
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("config", LINES.values(), ids=LINES)
def test_equals_transformers(config, from_torch, relative_error):
    assert max(parity_errors(config, tokens(config), from_torch, relative_error)) < 1e-5


@pytest.mark.parity
@pytest.mark.slow
def test_equals_transformers_at_full_size(from_torch, relative_error):
    config = SD15.text_encoder
    assert max(parity_errors(config, tokens(config), from_torch, relative_error)) < 1e-5
