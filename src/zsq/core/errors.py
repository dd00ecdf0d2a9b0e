"""What can go wrong, as exceptions whose text says what was found and what to do.

ZsqError
├── RecipeError         a path, type, range or name that a recipe does not have
├── UnsupportedModel    a network that a method, a capture or a format cannot take
├── CheckpointError     weights that do not fit, or are no tensors
├── DataError           images that cannot be read, or do not match the network
├── RunError            a run folder that holds something else, or cannot be written
├── MissingExtra        an optional dependency that is not installed, or cannot be reached
└── MissingView         a loss reads what its ``needs`` did not ask for
"""

__all__ = [
    "CheckpointError",
    "DataError",
    "MissingExtra",
    "MissingView",
    "RecipeError",
    "RunError",
    "UnsupportedModel",
    "ZsqError",
]


class ZsqError(Exception):
    """Base of every error that zsq raises on purpose."""


class RecipeError(ZsqError, ValueError):
    """A path, type, range or name that a recipe does not have."""


class UnsupportedModel(ZsqError):
    """A network that a method, a capture or a format cannot take."""


class CheckpointError(ZsqError):
    """Weights that do not fit the network, or a file that holds anything but tensors."""


class DataError(ZsqError):
    """Images that cannot be read, or that do not match the network."""


class RunError(ZsqError):
    """A run folder that holds something else, or cannot be written."""


class MissingExtra(ZsqError):
    """An optional dependency that is not installed, or a download that cannot be reached."""


class MissingView(ZsqError):
    """A loss reads what its ``needs`` did not ask for."""
