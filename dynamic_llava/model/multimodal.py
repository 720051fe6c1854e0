"""What servers of models ask a processor for; transformers keeps it among its internals."""

from transformers.processing_utils import MultiModalData

__all__ = ["MultiModalData"]
