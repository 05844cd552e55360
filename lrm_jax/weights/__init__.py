"""Weights: our model files, checkpoints of the PyTorch references, training runs, downloads from Hugging Face."""
