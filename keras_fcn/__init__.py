"""Fully convolutional networks for semantic segmentation, in Keras 3."""

__version__ = "0.1.0"

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    backend = str(error.name).partition(".")[0]
    if backend not in ("tensorflow", "jax", "torch"):
        raise
    raise ModuleNotFoundError(
        f"Keras wants the backend {backend}, which is not installed; install it with "
        f'pip install ".[{backend}]" in the checkout, or set KERAS_BACKEND to one that '
        "is: tensorflow, jax or torch.",
        name=backend,
    ) from None

from keras_fcn.evaluation import evaluate, segment
from keras_fcn.exporting import export
from keras_fcn.images import colorize, decode_segmentation, overlay
from keras_fcn.manifest import checkpoint_info, list_checkpoints
from keras_fcn.metrics import SegmentationScores
from keras_fcn.models import (
    FCN8s,
    FCN16s,
    FCN32s,
    classifier,
    fcn,
    late_fusion,
    load_checkpoint,
)
from keras_fcn.saving import save_checkpoint
from keras_fcn.training import compile_modern, compile_reference
from keras_fcn.weights import transplant

__all__ = [
    "FCN8s",
    "FCN16s",
    "FCN32s",
    "SegmentationScores",
    "checkpoint_info",
    "classifier",
    "colorize",
    "compile_modern",
    "compile_reference",
    "decode_segmentation",
    "evaluate",
    "export",
    "fcn",
    "late_fusion",
    "list_checkpoints",
    "load_checkpoint",
    "overlay",
    "save_checkpoint",
    "segment",
    "transplant",
]
