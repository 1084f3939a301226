"""Tasks and scores."""
