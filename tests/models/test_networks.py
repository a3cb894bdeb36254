import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.families import FAMILIES, SD15, SDXL
from sd_jax.models.networks import Networks
from sd_jax.models.presets import PARTS, TINY, ModelSpec, TinyVAEConfig
from sd_jax.models.vae import VAE
from sd_jax.models.vae_tiny import TinyVAE


def test_same_spec_and_dtype_give_equal_hashable_networks():
    """Else every new pipeline would compile anew."""
    assert hash(Networks.of(TINY)) == hash(Networks.of(TINY)) and Networks.of(TINY) == Networks.of(TINY)
    assert Networks.of(TINY) != Networks.of(TINY, "bfloat16")


def test_scaling_factor_reaches_spec_and_module():
    for spec in (TINY, TWO):
        networks = Networks.of(spec).with_scaling_factor(0.5)
        assert networks.spec.vae.scaling_factor == networks.vae.config.scaling_factor == 0.5


TWO = dataclasses.replace(
    TINY,
    vae=TinyVAEConfig(),
    text_encoder_2=dataclasses.replace(
        TINY.text_encoder, hidden_size=48, num_attention_heads=3, pad_token_id=0, projection_dim=24, clip_skip=2
    ),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_are_those_of_the_spec(name):
    networks = Networks.of(FAMILIES[name])
    assert {part for part in PARTS if getattr(networks, part) is not None} == set(FAMILIES[name].parts)
    assert isinstance(networks.vae, VAE) and isinstance(Networks.of(TWO).vae, TinyVAE)


@pytest.fixture(scope="module")
def params(initialise):
    networks, ids = Networks.of(TWO), jnp.zeros((1, 1), jnp.int32)
    return {part: initialise(getattr(networks, part), ids) for part in TWO.text_encoders}


def test_states_of_two_text_encoders_are_joined_and_the_last_is_pooled(params):
    networks = Networks.of(TWO)
    ids = jnp.asarray([[7, 5, 999, 999, 999], [7, 5, 6, 4, 999]], jnp.int32)
    padded = jnp.asarray([[7, 5, 999, 0, 0], [7, 5, 6, 4, 999]], jnp.int32)  # as the second one's tokenizer does
    first = networks.text_encoder.apply({"params": params["text_encoder"]}, ids, 1)
    second = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, padded, 2)
    both = networks.encode_text(params, ids)
    assert both.context.shape == (2, 5, 32 + 48) and both.pooled.shape == (2, 24)
    np.testing.assert_array_equal(both.context, jnp.concatenate([first.context, second.context], axis=-1))
    np.testing.assert_array_equal(both.pooled, second.pooled)
    skipped = networks.encode_text(params, ids, 2).context
    np.testing.assert_array_equal(skipped[..., 32:], second.context)
    assert np.abs(skipped[..., :32] - first.context).max() > 1e-3


def test_chunks_are_read_one_by_one(params):
    """The end of one does not pad the next, no token sees another chunk, and the first chunk's state is pooled."""
    short = dataclasses.replace(TINY.text_encoder, max_position_embeddings=6)
    networks = Networks.of(dataclasses.replace(TWO, text_encoder=short))
    assert networks.spec.positions == 6  # of the encoder that reads fewest
    model = params["text_encoder"]["text_model"]
    places = {"embedding": model["embeddings"]["position_embedding"]["embedding"][:6]}
    model = {**model, "embeddings": {**model["embeddings"], "position_embedding": places}}
    params = {**params, "text_encoder": {"text_model": model}}
    ids = np.random.default_rng(0).integers(1, 900, (2, 3, 6)).astype(np.int32)
    ids[:, :, 4:] = 999
    encode = jax.jit(networks.encode_text)
    whole, alone = encode(params, ids.reshape(2, 18)), encode(params, ids.reshape(6, 6))
    assert whole.context.shape == (2, 18, 32 + 48) and whole.pooled.shape == (2, 24)
    np.testing.assert_allclose(whole.context.reshape(6, 6, -1), alone.context, atol=1e-6)
    np.testing.assert_allclose(whole.pooled, alone.pooled[::3], atol=1e-6)
    with pytest.raises(ValueError, match="13 token ids a text are no whole chunks of 6"):
        networks.encode_text(params, jnp.zeros((1, 13), jnp.int32))


def test_a_single_text_encoder_gives_its_own_state(params):
    ids = jnp.asarray([[7, 5, 999, 999]], jnp.int32)
    alone = Networks.of(TINY).encode_text({"text_encoder": params["text_encoder"]}, ids)
    expected = Networks.of(TINY).text_encoder.apply({"params": params["text_encoder"]}, ids)
    np.testing.assert_array_equal(alone.context, expected.context)
    refiner = Networks.of(dataclasses.replace(TWO, text_encoder=None))
    expected = refiner.text_encoder_2.apply({"params": params["text_encoder_2"]}, ids)  # padded as they are given
    np.testing.assert_array_equal(refiner.encode_text(params, ids).pooled, expected.pooled)


def test_spec_survives_json():
    for spec in (SD15, SDXL, TWO):
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(TypeError, match="colour"):
        ModelSpec.from_dict(SD15.to_dict() | {"vae": {"colour": 1}})
