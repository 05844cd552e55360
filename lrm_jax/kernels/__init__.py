"""What knows which kind of device it runs on: one function, and beside it its forms for CPU, GPU and TPU."""
