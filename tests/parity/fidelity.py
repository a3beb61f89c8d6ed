"""torch-fidelity's functions of features, imported with or without a torchvision that loads.

The package imports torchvision for its data sets and for networks that nothing here builds, and
torchvision loads only beside the torch it was built with. Where it does not, its names are empty.
"""

import importlib
import sys
import types

import pytest


def _empty() -> dict[str, types.ModuleType]:
    names = ("", ".datasets", ".models", ".transforms", ".transforms.functional")
    modules = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name in ("CIFAR10", "CIFAR100", "STL10"):  # the package derives from them
        setattr(modules["torchvision.datasets"], name, type(name, (), {}))
    return modules


def _torchvision_loads() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


if "torch_fidelity" in sys.modules or _torchvision_loads():
    import torch_fidelity
else:
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            patch.delitem(sys.modules, name)  # what a failed import left
        for name, module in _empty().items():
            patch.setitem(sys.modules, name, module)
        import torch_fidelity

from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402

__all__ = ["metric_fid", "metric_isc", "metric_kid", "metric_prc", "torch_fidelity"]
