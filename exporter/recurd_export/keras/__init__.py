"""The front end for Keras 3: models and files, Sequential and functional."""

from recurd_export.keras.front import front

__all__ = ["front"]
