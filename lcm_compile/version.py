"""The version of this package, which keys and pictures hold."""

__version__ = "0.1.0"
