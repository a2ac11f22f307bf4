"""Configuration: compose it with Hydra (`compose`), check it (`check`, `rules`) and describe it (`help`)."""
