"""Filters of the sources: quality, duplicates, decontamination; dropped documents are counted by reason."""

from nanohybrid.data.curate.curator import Curator
from nanohybrid.data.curate.decontaminate import Decontaminator
from nanohybrid.data.curate.quality import QualityLimits

__all__ = ["Curator", "Decontaminator", "QualityLimits"]
