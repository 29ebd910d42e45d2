"""Runs any nn.Module once and hands a proxy its activations and output gradients, layer by layer.

A shape-only run of the forward pass at two batch sizes (`trace`) finds every Parameter that is the matrix or kernel of
a linear map or convolution, where it is used, and which axis of each captured tensor holds the samples. One real
forward and backward pass (`run`) then follows that plan. Nothing of the model is changed: it runs on copies of its
parameters and buffers.
"""

from __future__ import annotations

from .plan import Activation, Layer, Plan
from .run import Consumer, run
from .samples import SampleAxis
from .sandbox import Sandbox
from .trace import trace

__all__ = ["Activation", "Consumer", "Layer", "Plan", "SampleAxis", "Sandbox", "run", "trace"]
