"""What is made once for all tests of this room."""

import pytest

from tests.checkpoints.tiny import random_params
from tests.reference_pipeline import tiny_diffusers_pipeline, tiny_tokenizer


@pytest.fixture(scope="session")
def params():
    return random_params()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """(folder, pipeline) of a tiny diffusers pipeline."""
    folder = tmp_path_factory.mktemp("reference") / "pipeline"
    return folder, tiny_diffusers_pipeline(folder)
