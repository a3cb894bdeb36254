"""Compilations that outlive a process."""

import json
import os
import subprocess
import sys

JOB = """
import collections, json, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))
jax.numpy.ones(3) + 1  # compiled before the cache is there
import sd_jax
sd_jax.load().text_to_image("a red circle", steps=2)
print(json.dumps({"folder": jax.config.jax_compilation_cache_dir, **events}))
"""


def start(tmp_path, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMP", "JAX_PERS"))}
    clean |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd(), **environment}
    done = subprocess.run([sys.executable, "-c", JOB], env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_start_of_a_job_compiles_nothing(tmp_path):
    first = start(tmp_path)
    assert first["folder"] == str(tmp_path / "sd_jax" / "compiled") and first["cache_misses"] > 3
    second = start(tmp_path)
    assert "cache_misses" not in second and second["cache_hits"] == first["cache_misses"]
    elsewhere = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert elsewhere["folder"] == str(tmp_path / "mine")
