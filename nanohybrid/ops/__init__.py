"""Operations: plain functions over tensors and a Layout, which know nothing of models.

A folder an operation: `reference.py` is the equation, the files beside it are its fast forms, `__init__.py` chooses.
"""
