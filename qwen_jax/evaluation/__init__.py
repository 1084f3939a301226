"""Evaluation of models: tasks and their scores, calibration, and measurements inside the model."""
