"""Configuration: composing it with Hydra (`compose`) and checking its values (`rules`)."""
