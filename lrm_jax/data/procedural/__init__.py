"""Random objects, ray-traced on the device: `source` makes the batches, of `blueprints` by `assembly` and `raytrace`."""
