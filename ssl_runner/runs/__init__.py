"""Run folders: their files, checkpoints, records and how a run is resumed."""
