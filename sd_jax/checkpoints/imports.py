"""What is to be thought of the names that a pickle wants to import. (None of them is: see `pickle_machine`.)"""

from sd_jax.checkpoints import torch_pickle
from sd_jax.checkpoints.pickle_machine import Global

_BUILTINS = (
    *("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "bytes", "bytearray"),
    *("object", "slice", "range", "unicode", "long"),
)
_HARMLESS = frozenset(
    [
        *((module, name) for module in ("builtins", "__builtin__") for name in _BUILTINS),
        ("_codecs", "encode"),
        ("collections", "Counter"),
        ("collections", "defaultdict"),
        ("copyreg", "_reconstructor"),
        ("copy_reg", "_reconstructor"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("torch.nn.modules.container", "ParameterDict"),
    ]
)
_TORCH = frozenset(
    [
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.nn.parameter", "Buffer"),
        ("torch.serialization", "_get_layout"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        *(
            ("torch._utils", f"_rebuild_{name}")
            for name in (
                *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "sparse_tensor", "qtensor"),
                *("meta_tensor_no_storage", "nested_tensor", "device_tensor_from_numpy", "sparse_csr_tensor"),
            )
        ),
        *(("torch", name) for name in torch_pickle.DTYPES),
        *((module, name) for module in torch_pickle.STORAGE_MODULES for name in torch_pickle.STORAGES),
    ]
)


# What runs programs, or code that comes as a text: no checkpoint needs it, and whoever put it there meant harm
_WEAPON_PACKAGES = ("os", "posix", "nt", "sys", "subprocess", "importlib", "ctypes", "socket")
_WEAPON_MODULES = (
    "pty",
    "shutil",
    "runpy",
    "code",
    "codeop",
    "pdb",
    "bdb",
    "timeit",
    "webbrowser",
    "marshal",
    "commands",
)
_WEAPON_BUILTINS = ("eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "breakpoint")


def verdict(wanted: Global) -> str:
    """ "what torch writes" | "harmless" | "TorchScript's own, no import" | "UNKNOWN: ..."."""
    if (wanted.module, wanted.name) in _TORCH:
        return "what torch writes"
    if (wanted.module, wanted.name) in _HARMLESS:
        return "harmless"
    if wanted.module.split(".")[0] == "__torch__":
        return "TorchScript's own, no import"
    return "UNKNOWN: would have run when unpickled by torch.load"


def is_weapon(wanted: Global) -> bool:
    """Known to be of use only for an attack. (What is not known may be as bad: neither is run.)"""
    if wanted.module in ("builtins", "__builtin__"):
        return wanted.name.split(".")[0] in _WEAPON_BUILTINS
    return wanted.module.split(".")[0] in _WEAPON_PACKAGES or wanted.module in _WEAPON_MODULES
