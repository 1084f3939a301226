"""Training: batches, loss, the step, the loop."""
