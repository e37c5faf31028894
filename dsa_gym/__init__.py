"""Gymnasium environments and agents for gating Dynamic Sparse Adapters."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dsa-gym")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
