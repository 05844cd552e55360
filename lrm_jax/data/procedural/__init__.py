"""Random objects, ray-traced on the device. `source` makes batches with `blueprints`, `assembly` and `raytrace`."""
