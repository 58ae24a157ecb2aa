"""The parts that all stages share: recipes, atomic output directories, lineage, resuming, progress and
reports."""

from nanohybrid.stages.output import Stage, open_stage
from nanohybrid.stages.progress import Progress, progress
from nanohybrid.stages.report import Report

__all__ = ["Progress", "Report", "Stage", "open_stage", "progress"]
