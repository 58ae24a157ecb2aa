"""Executors: who runs a model's forward. Each computes what the plain model in `model/` computes, and is tested against it."""
