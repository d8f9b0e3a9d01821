"""What a run learns: its data, split, batches and validation, and what a model is to take."""

from ..data import DataError, Vocabulary
from .base import Dataset, Task
from .images import ImageDataset, Images, Mnist
from .signals import Patches, Signal, Tokens
from .text import Text, TextDataset

__all__ = ["DataError", "Dataset", "ImageDataset", "Images", "Mnist", "Patches", "Signal", "Task", "Text", "TextDataset",
           "Tokens", "Vocabulary"]
