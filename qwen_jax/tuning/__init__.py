"""Search for the shapes of steps and the thresholds with which an engine is fastest on a device (``qwen-jax tune``)."""
