"""Planners behind one signature: ours, and those that others publish."""
