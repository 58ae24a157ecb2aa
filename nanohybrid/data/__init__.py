"""Data: from raw text and generated problems to token stores and batches."""

from nanohybrid.data.documents import Document, TextSpan
from nanohybrid.data.loader import Batch, Loader
from nanohybrid.data.mixture import Mixture, Phase
from nanohybrid.data.store import TokenStore

__all__ = ["Batch", "Document", "Loader", "Mixture", "Phase", "TextSpan", "TokenStore"]
