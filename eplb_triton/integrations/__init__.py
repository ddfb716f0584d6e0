"""Adapters for serving frameworks. Each is off until its environment variable asks for it; see docs/frameworks.md."""
