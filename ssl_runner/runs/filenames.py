"""Names of the files in the folder of a run. Evaluators, and loggers, may write others."""

BEGIN = ("run.json", *(f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra")), ".lock")
TABLES = ("metrics.csv", "probe.csv", "spectrum.csv", "embedding.csv")
BACKBONE, PROJECTOR = "backbone.safetensors", "projector.safetensors"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-before.pt"
PICTURES = ("views.png", "embedding.png", "neighbors.png")
PROFILE = ("trace.json", "profile.txt")

REPLACED = (".hydra", *TABLES, BACKBONE, PROJECTOR, CHECKPOINT, PREVIOUS, *PICTURES, *PROFILE)
OUTDATED = (BACKBONE, PROJECTOR, *PICTURES)  # results that an extended run writes again
RESULTS = ("run.json", ".hydra", "*.csv", "*.safetensors", "*.png")  # patterns
