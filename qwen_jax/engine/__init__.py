"""Requests to buckets to executables to tokens."""
