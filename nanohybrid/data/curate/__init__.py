"""What is kept of the sources, and by name and number what is not."""

from nanohybrid.data.curate.curator import Curator
from nanohybrid.data.curate.decontaminate import Decontaminator
from nanohybrid.data.curate.quality import QualityLimits

__all__ = ["Curator", "Decontaminator", "QualityLimits"]
