"""Data sets: readers, splits, and the loader of multi-view batches."""
