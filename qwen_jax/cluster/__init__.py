"""Replicas of the engine behind one router: where requests go, and how queues are evened out."""
