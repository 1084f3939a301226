"""Meshes of devices and what is split over them."""
