"""The plan as one Triton kernel: a file per stage, and fused.py, which calls them in order and launches."""
