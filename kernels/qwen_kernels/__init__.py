"""Attention kernels on JAX alone.

Each operation has a reference, a portable XLA form and, where it pays, a Pallas form.
"""
