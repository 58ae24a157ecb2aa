"""The paper in miniature, in one command: raw text -> a compressed, thinking model, and a page of pictures.

pipeline.py  the table of contents as an executable: six calls, one a stage      recipes.py  what each call is given
summary.py   the results as one object                                           report.py   the same as a page
"""

from nanohybrid.quickstart.pipeline import quickstart

__all__ = ["quickstart"]
