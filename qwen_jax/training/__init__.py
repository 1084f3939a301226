"""Training of a model: examples, batches, loss, the training step and loop, and fine-tuning by a recipe."""
