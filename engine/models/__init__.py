"""Models: one configurable transformer, a table of the families it covers, and loading from a live model, a folder, a file or the hub."""

from .batch import StepBatch
from .config import ModelConfig
from .load import LoadedModel, load
from .transformer import Transformer
from .weights import LayerWeights, ModelWeights

__all__ = ["LayerWeights", "LoadedModel", "ModelConfig", "ModelWeights", "StepBatch", "Transformer", "load"]
