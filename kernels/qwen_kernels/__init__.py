"""Attention kernels on jax alone: each op has a reference, a portable XLA form and, where it pays, a Pallas form."""
