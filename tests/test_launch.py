"""The templates of configs/launch: they parse, and what they start is there."""

import ast
import re
import shlex
import subprocess

import pytest
import yaml

from tests.training.doors import ROOT

TEMPLATES = sorted(path.name for path in (ROOT / "configs" / "launch").iterdir())


def read(name):
    return (ROOT / "configs" / "launch" / name).read_text(encoding="utf-8")


def strings(node):
    """Every string of a YAML document; a list of strings as the command that it is."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list):
        if all(isinstance(value, str) for value in node):
            yield " ".join(node)
        for value in node:
            yield from strings(value) if not isinstance(value, str) else ()


def flags_of(name):
    """What train.py is given: {flag: value}."""
    text = read(name)
    if name.endswith(".yaml"):
        text = "\n".join(strings(list(yaml.safe_load_all(text))))
    else:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    text = text.replace("\\\n", " ")
    [given] = re.findall(r"python train\.py((?:[ ]+--[^\s\"]+)+)", text)
    return dict(flag.removeprefix("--").partition("=")[::2] for flag in shlex.split(given))


def flags_of_train():
    calls = [node for node in ast.walk(ast.parse((ROOT / "train.py").read_text())) if isinstance(node, ast.Call)]
    defined = [call for call in calls if getattr(call.func, "attr", "").startswith("DEFINE_")]
    return {call.args[0].value for call in defined}


def config_of(path):
    scope = {"__file__": str(ROOT / path), "__name__": "config"}
    exec(compile((ROOT / path).read_text(encoding="utf-8"), path, "exec"), scope)
    return scope["get_config"]()


def test_the_templates_are_all_there():
    assert TEMPLATES == ["kubernetes.yaml", "skypilot.yaml", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_starts_what_there_is(name):
    if not name.endswith(".yaml"):
        checked = subprocess.run(["bash", "-n"], input=read(name), capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    given = flags_of(name)
    assert {"config", "workdir"} <= set(given)
    config, known = config_of(given["config"]), flags_of_train()
    for flag in given:
        if flag.startswith("config."):
            assert _has(config, flag.split(".")[1:]), flag
        else:
            assert flag in known, flag


def _has(config, keys):
    for key in keys:
        if key not in config:
            return False
        config = config[key]
    return True


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "tpu_vm.sh"])
def test_a_preempted_run_is_started_again(name):
    from sd_jax.training.preemption import EXIT_CODE

    told = "\n".join(line for line in read(name).splitlines() if not line.lstrip().startswith("#"))
    if name == "kubernetes.yaml":  # whatever the status is
        assert list(yaml.safe_load_all(read(name)))[-1]["spec"]["failurePolicy"]["maxRestarts"] > 0
    else:
        assert re.search(rf"\b{EXIT_CODE}\b", told)
