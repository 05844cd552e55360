"""Pure array functions: any batch shape, no parameters, no config."""
