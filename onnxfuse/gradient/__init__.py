"""Gradients of a loss with respect to values inside a network, through ONNX Runtime alone.

`stream_gradients` gives them for samples, batch by batch; `onnxfuse.gradient.loss` has the losses.
"""

from onnxfuse.gradient.loss import Loss, choose_loss
from onnxfuse.gradient.stream import Batch, GradientNetwork, stream_gradients

__all__ = ["Batch", "GradientNetwork", "Loss", "choose_loss", "stream_gradients"]
