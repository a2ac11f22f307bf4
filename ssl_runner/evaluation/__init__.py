"""Finished runs: probe them again, and write their features to a file."""
