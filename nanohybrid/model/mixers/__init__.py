"""The mixers: one file a kind of layer, which owns every fact about its kind."""
