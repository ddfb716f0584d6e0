"""Benchmarks: cases -> loads -> planners -> measurements -> results (JSON) -> report (tables, plots)."""
