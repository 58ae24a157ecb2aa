"""What every stage shares: recipe in, atomic output directory, lineage, resume, progress, report."""

from nanohybrid.stages.output import Stage, open_stage
from nanohybrid.stages.progress import Progress, progress
from nanohybrid.stages.report import Report

__all__ = ["Progress", "Report", "Stage", "open_stage", "progress"]
