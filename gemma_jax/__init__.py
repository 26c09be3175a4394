"""Gemma 3 for research: change one thing, run it, and get a table that you can trust."""

__version__ = "0.1.0"
