"""Images that look alike: perceptual hashes that differ in at most 3 of 64 bits, found by an index, not by comparing all pairs."""

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 3
"""At most so many bits apart: of four parts of a hash one is then the same, which is what the index looks up."""
PARTS, PART_BITS = 4, 16
MIN_ENTROPY = 2.0
"""Bits; a nearly flat image has hardly any hash, and looks like every other flat one."""

Hashes = NDArray[np.uint64]
Counts = NDArray[np.int64]


def lookalikes(hashes: Hashes, labels: NDArray[np.int64], queries: Hashes | None = None) -> Counts:
    """int64 [M, K]: how many images of each class look like each of the queries.

    Args:
        hashes: uint64 [N], of the images that are searched.
        labels: int64 [N], their classes.
        queries: uint64 [M]; by default the images themselves, each of which finds itself, too.
    """
    import faiss
    from scipy import sparse

    num_classes = int(labels.max(initial=-1)) + 1
    asked = hashes if queries is None else queries
    if not len(hashes) or not len(asked):
        return np.zeros((len(asked), num_classes), np.int64)
    known, place = np.unique(hashes, return_inverse=True)
    wanted, back = np.unique(asked, return_inverse=True)
    index = faiss.IndexBinaryMultiHash(64, PARTS, PART_BITS)
    index.add(_bytes(known))
    limits, _, found = index.range_search(_bytes(wanted), MAX_BITS + 1)
    near = sparse.csr_array((np.ones(len(found), np.int64), found, limits.astype(np.int64)), shape=(len(wanted), len(known)))
    per_class = sparse.csr_array((np.ones(len(labels), np.int64), (place, labels)), shape=(len(known), num_classes))
    counts: Counts = (near @ per_class).toarray()[back]
    return counts


def _bytes(hashes: Hashes) -> NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
