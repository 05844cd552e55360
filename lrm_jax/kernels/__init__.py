"""Device-specific code: one function for all devices, and its implementations for CPU, GPU and TPU."""
