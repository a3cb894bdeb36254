"""configs: every one resolves, runs a step in its runlocal form elsewhere, and has no key that nothing reads."""

import ast
import importlib.util
import pathlib

import pytest

from sd_jax.config import parse_arg, to_json, training_defaults

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py"))


def load(path, arg=None):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(arg)


def test_argument_sets_a_key_of_its_default_type():
    args = parse_arg("text_to_image,steps=3,runlocal,rate=0.5", stage="a", steps=1, runlocal=False, rate=1.0)
    assert args.to_dict() == {"stage": "text_to_image", "steps": 3, "runlocal": True, "rate": 0.5}


@pytest.mark.parametrize("arg", ["unknown=1", "steps=many", "runlocal=perhaps"])
def test_a_wrong_argument_is_named(arg):
    with pytest.raises(ValueError, match=arg.split("=")[0]):
        parse_arg(arg, stage="a", steps=1, runlocal=False)


def test_a_misspelt_key_is_an_error():
    with pytest.raises((AttributeError, KeyError)):
        training_defaults("full").total_stepps = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_its_command_and_resolves(path):
    module, config = load(path)
    assert "train.py --config=configs/" in module.__doc__
    assert f'"method": "{config.method}"' in to_json(config)
    known = set(_leaves(training_defaults(config.method))) - {"model"}
    assert {key for key in _leaves(config) if key.split(".")[0] != "model"} == known


@pytest.mark.parametrize("method", ["full", "autoencoder", "esrgan"])
def test_no_key_is_dead(method):
    """Every key is read somewhere in the package, as `config...key` or `cfg.key`."""
    read = set()
    for path in (ROOT / "sd_jax").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    dead = [
        key for key in _leaves(training_defaults(method)) if key.split(".")[-1] not in read | {"data", "fsdp", "tensor"}
    ]
    assert dead == []


def _leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items") and len(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
