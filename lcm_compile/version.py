"""The version of this package. Build keys and the metadata of pictures contain it."""

__version__ = "0.1.0"
