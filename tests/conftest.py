"""Strict modes, for the tests only: every annotation is checked, no silent promotion of dtypes or ranks, no network."""

import atexit
import functools
import os
import shutil
import tempfile

from tests.environment import COMPILE_FAST

_TEMPORARY = tempfile.mkdtemp(prefix="sd_jax_tests_")
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)

# Before the first import of jax and transformers; subprocesses that tests start inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda,cpu runs the same tests on a GPU
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_TEMPORARY, "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HOME"] = os.path.join(_TEMPORARY, "huggingface")  # what this machine has cached must not matter
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns in every process forked later

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import optax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if not os.environ["JAX_PLATFORMS"].startswith("cpu"):
    jax.config.update("jax_default_matmul_precision", "highest")  # tolerances are those of float32, not of TF32


def _leave_pytrees_unchecked() -> None:
    """JAX rebuilds a registered dataclass around things that are not arrays (shapes, shardings, axis numbers), which is
    no mistake; so their constructors are not checked. Functions that take and return them are."""
    register = jax.tree_util.register_dataclass  # flax.struct.dataclass ends here too

    def register_unchecked(nodetype, *args, **kwargs):
        nodetype.__no_type_check__ = True
        return register(nodetype, *args, **kwargs)

    jax.tree_util.register_dataclass = register_unchecked


def _let_optax_promote() -> None:
    """optax's own arithmetic promotes (`decay**count` in Adam); strictness is asked of our code, not of it."""

    def lenient(update):
        @functools.wraps(update)
        def lenient_update(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return update(*args, **kwargs)

        return lenient_update

    make = optax.GradientTransformation.__new__
    optax.GradientTransformation.__new__ = lambda cls, init, update: make(cls, init, lenient(update))
    optax.MultiSteps.update = lenient(optax.MultiSteps.update)


_leave_pytrees_unchecked()
_let_optax_promote()
jaxtyping.install_import_hook(["sd_jax"], "beartype.beartype")  # before the first import of sd_jax


def pytest_collection_modifyitems(items: list) -> None:
    """Whole runs first: the last of them would keep one worker busy while the other has nothing left."""
    items.sort(key=lambda item: item.path.parent.name != "training")
