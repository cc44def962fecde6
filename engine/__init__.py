"""A decoding engine for PyTorch language models: ``Decoder(model).generate(...)``."""

from .decoder import Decoder
from .outputs import RequestMetrics, RequestOutput, StreamEvent
from .params import BeamParams, SamplingParams

__version__ = "0.1.0"

__all__ = ["BeamParams", "Decoder", "RequestMetrics", "RequestOutput", "SamplingParams", "StreamEvent", "__version__"]
