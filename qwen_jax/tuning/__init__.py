"""Which shapes and thresholds are fastest on this device, for a model's shape."""
