"""What processes of the tests are started with."""

import importlib.metadata
import os

# Programs are tiny here, and take longer to compile than to run: LLVM does less
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at this flag, which halves the time
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"


def with_devices(count: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices, which computes to the bit as this one does."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
