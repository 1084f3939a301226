"""Parallelism: meshes of devices, layouts of a model's parameters on them, and the planner that predicts their cost."""
