"""Names that settings accept. Imports nothing, so that the command line can check them before it imports
torch."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
FORWARD = ("joint", "per_view")
STORAGE = ("auto", "device", "host")
VARIANCES = ("hinge", "squared")
REDUCTIONS = ("mean", "sum")
MAPS = ("pca", "tsne", "umap", "none")
FEATURES = ("backbone", "projector", "random_init", "pixels", "pca", "lda")
