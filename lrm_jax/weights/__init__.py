"""Files of weights: of ours, of the PyTorch references, of runs, from Hugging Face."""
