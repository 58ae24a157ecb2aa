"""Operations: plain functions over tensors and a Layout. They know nothing of models.

Each op has a folder: `reference.py` is the equation, the files beside it are its fast forms, and
`__init__.py` selects one.
"""
