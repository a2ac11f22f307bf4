"""Nearest neighbours by cosine similarity, searched in blocks of rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**26  # similarities in memory at once, 256 MB


def nearest_of_other_images(
    queries: Tensor, keys: Tensor, k: int, of_queries: Tensor, of_keys: Tensor
) -> Tensor:
    """Indices (n, k) of the keys (m, K) with the highest cosine similarity to each of the queries (n, K).

    of_queries (n,) and of_keys (m,) number their images; keys of the image of a query are excluded.
    """
    unit, block = F.normalize(keys).T, max(1, BLOCK_ELEMENTS // len(keys))
    nearest = []
    for rows, images in zip(F.normalize(queries).split(block), of_queries.split(block), strict=True):
        similarities = (rows @ unit).masked_fill_(images[:, None] == of_keys, -torch.inf)
        nearest.append(similarities.topk(k).indices)
    return torch.cat(nearest)
