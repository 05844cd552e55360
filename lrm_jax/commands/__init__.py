"""The commands: their arguments, messages and exit codes. `lrm_jax/__main__.py` calls them."""
