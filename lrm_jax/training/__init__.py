"""Training: what a config makes, the step, the losses, the optimiser, the loop, its checkpoints and reports."""
