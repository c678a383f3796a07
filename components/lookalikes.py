"""Images that look alike: perceptual hashes that differ in at most 3 of 64 bits, found by an index, not by comparing all pairs."""

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 3
"""At most so many bits apart: of four parts of a hash one is then the same, which is what the index looks up."""
PARTS, PART_BITS = 4, 16
MAX_PAIRS = 10**9
"""Pairs of hashes with an equal part that are looked at, at most: a supplier could make all of his images share one."""
MIN_ENTROPY = 2.0
"""Bits; a nearly flat image has hardly any hash, and looks like every other flat one."""

Hashes = NDArray[np.uint64]
Counts = NDArray[np.int64]


def lookalikes(hashes: Hashes, labels: NDArray[np.int64], queries: Hashes, asked: NDArray[np.int64]) -> tuple[Counts, Counts] | None:
    """How many images of their own class look like each of the queries, and how many of all classes: int64 [M] twice.

    None if the hashes are so much alike that it would take too long.

    Args:
        hashes: uint64 [N], of the images that are searched; an image among the queries finds itself, too.
        labels: int64 [N] >= 0, their classes.
        queries: uint64 [M].
        asked: int64 [M] >= 0, the classes of the queries.
    """
    import faiss
    from scipy import sparse

    if not len(hashes) or not len(queries):
        return np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    known, place = np.unique(hashes, return_inverse=True)
    wanted, back = np.unique(queries, return_inverse=True)
    if _num_pairs(known, wanted) > MAX_PAIRS:
        return None
    index = faiss.IndexBinaryMultiHash(64, PARTS, PART_BITS)
    index.add(_bytes(known))
    limits, _, found = index.range_search(_bytes(wanted), MAX_BITS + 1)
    near = sparse.csr_array(
        (np.ones(len(found), np.int64), found.astype(np.int64), limits.astype(np.int64)), shape=(len(wanted), len(known))
    )
    num_classes = int(max(labels.max(), asked.max())) + 1
    per_class = sparse.csr_array((np.ones(len(labels), np.int64), (place, labels)), shape=(len(known), num_classes))
    found_of = sparse.csr_matrix(near @ per_class)
    own: Counts = np.asarray(found_of[back, asked]).ravel()
    return own, np.asarray(found_of.sum(1)).ravel()[back]


def _num_pairs(known: Hashes, wanted: Hashes) -> int:
    """How many pairs of a known and a wanted hash have one of the parts in common, counted once for each part."""
    pairs = 0
    for part in range(PARTS):
        here, there = (_part(of, part) for of in (known, wanted))
        pairs += int((np.bincount(here, minlength=2**PART_BITS) * np.bincount(there, minlength=2**PART_BITS)).sum())
    return pairs


def _part(hashes: Hashes, part: int) -> NDArray[np.int64]:
    return (hashes >> np.uint64(part * PART_BITS) & np.uint64(2**PART_BITS - 1)).astype(np.int64)


def _bytes(hashes: Hashes) -> NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
