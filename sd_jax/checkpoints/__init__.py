"""Foreign files <-> our parameter names: tables, used both ways, strict, no torch."""

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.files import read

__all__ = ["CheckpointError", "read"]
