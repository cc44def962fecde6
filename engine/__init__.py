"""A decoding engine for PyTorch language models: ``Decoder(model).generate(...)``."""

from .async_decoder import AsyncDecoder, RequestStream
from .decoder import Decoder
from .drafters.draft import Draft, Drafter
from .drafters.lookup import PromptLookup, SuffixLookup
from .drafters.model import DraftModel
from .kernels import get_num_threads, set_num_threads
from .outputs import RequestMetrics, RequestOutput, StreamEvent
from .parallel import Parallel
from .params import BeamParams, SamplingParams
from .stats import Stats
from .step_threads import DecoderClosed, QueueFull

__version__ = "0.1.0"

__all__ = [
    "AsyncDecoder",
    "BeamParams",
    "Decoder",
    "DecoderClosed",
    "Draft",
    "DraftModel",
    "Drafter",
    "Parallel",
    "PromptLookup",
    "QueueFull",
    "RequestMetrics",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "Stats",
    "StreamEvent",
    "SuffixLookup",
    "__version__",
    "get_num_threads",
    "set_num_threads",
]
