"""The quickstart: the whole pipeline at a small scale, from raw text to a compressed, thinking model and a
report.

pipeline.py  the stages in order
recipes.py   the recipes of the stages
summary.py   the results as one JSON object
report.py    the results as an HTML page
"""

from nanohybrid.quickstart.pipeline import quickstart

__all__ = ["quickstart"]
