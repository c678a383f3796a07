"""The Merkle tree of RFC 6962, section 2.1, over SHA-256: roots, and proofs that a leaf is in a tree and that a tree extends another.

No library: pymerkle is GPL-licensed, all others that were found are young or tied to a service.
"""

import hashlib
from collections.abc import Iterable, Sequence

Hash = bytes
"""SHA-256, 32 bytes."""
EMPTY = hashlib.sha256().digest()
"""Root of the tree without leaves."""


def leaf_hash(data: bytes) -> Hash:
    """The hash of a leaf: SHA-256(0x00 || data)."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: Hash, right: Hash) -> Hash:
    """The hash of an inner node: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Growing:
    """A tree that leaves are added to one by one; holds only the roots of its full subtrees, one for every bit of its size."""

    def __init__(self) -> None:
        self.size = 0
        self._full: list[Hash] = []

    def add(self, leaf: Hash) -> None:
        """Adds the hash of the next leaf."""
        left = self.size
        while left & 1:
            leaf = node_hash(self._full.pop(), leaf)
            left >>= 1
        self._full.append(leaf)
        self.size += 1

    def root(self) -> Hash:
        """The root of all leaves so far."""
        return _joined(self._full) if self._full else EMPTY


def root_of(leaves: Iterable[Hash]) -> Hash:
    """The root over the hashes of all leaves: MTH(D[n])."""
    tree = Growing()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root()


def inclusion_proof(index: int, leaves: Sequence[Hash]) -> list[Hash]:
    """The audit path of leaf `index`, from 0 on: PATH(m, D[n]), section 2.1.1."""
    if len(leaves) < 2:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*inclusion_proof(index, leaves[:split]), root_of(leaves[split:])]
    return [*inclusion_proof(index - split, leaves[split:]), root_of(leaves[:split])]


def includes(leaf: Hash, index: int, size: int, path: Sequence[Hash], root: Hash) -> bool:
    """Whether the path proves that the tree with this size and root has this leaf at `index` (RFC 9162, section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    at, last, found = index, size - 1, leaf
    for other in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node_hash(other, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, other)
        at, last = at >> 1, last >> 1
    return last == 0 and found == root


def consistency_proof(size: int, leaves: Sequence[Hash]) -> list[Hash]:
    """The proof that the tree of all leaves extends that of the first `size`: PROOF(m, D[n]), section 2.1.2."""
    return _subproof(size, leaves, known=True) if 0 < size < len(leaves) else []


def extends(old_size: int, old_root: Hash, size: int, root: Hash, path: Sequence[Hash]) -> bool:
    """Whether the path proves that the second tree begins with all leaves of the first (RFC 9162, section 2.1.4.2)."""
    if old_size == size:
        return not path and old_root == root
    if old_size == 0:
        return not path and old_root == EMPTY
    if not 0 < old_size < size or not path:
        return False
    nodes = [old_root, *path] if old_size & (old_size - 1) == 0 else list(path)
    at, last = old_size - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    old = new = nodes[0]
    for other in nodes[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            old, new = node_hash(other, old), node_hash(other, new)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, other)
        at, last = at >> 1, last >> 1
    return last == 0 and old == old_root and new == root


def _subproof(size: int, leaves: Sequence[Hash], *, known: bool) -> list[Hash]:
    if size == len(leaves):
        return [] if known else [root_of(leaves)]
    split = _split(len(leaves))
    if size <= split:
        return [*_subproof(size, leaves[:split], known=known), root_of(leaves[split:])]
    return [*_subproof(size - split, leaves[split:], known=False), root_of(leaves[:split])]


def _split(size: int) -> int:
    """The largest power of two smaller than `size`."""
    return 1 << (size - 1).bit_length() - 1


def _joined(full: Sequence[Hash]) -> Hash:
    found = full[-1]
    for left in reversed(full[:-1]):
        found = node_hash(left, found)
    return found
