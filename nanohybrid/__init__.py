"""nanohybrid: a hybrid Mamba-2 / attention language model, from raw text to a compressed, thinking model."""
