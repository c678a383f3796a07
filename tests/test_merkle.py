"""The Merkle tree, by the test vectors of Certificate Transparency's reference implementation (the eight leaves of RFC 6962's authors)."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd.merkle import Growing, consistency_proof, extends, includes, inclusion_proof, leaf_hash, node_hash, root_of

INPUTS = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
"""By size, from none to all leaves."""
LEAF_0 = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
LEAF_1 = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
LEAF_2 = "0298d122906dcfc10892cb53a73992fc5b9f493ea4c9badb27b791b4127a7fe7"
LEAF_3 = "07506a85fd9dd2f120eb694f86011e5bb4662e5c415a62917033d4a9624487e7"
LEAF_4 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
NODE_23 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
NODE_45 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
NODE_67 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
NODE_0123 = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"
NODE_4567 = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
NODE_01 = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
INCLUSION = (
    (1, 0, ()),
    (2, 0, (LEAF_1,)),
    (2, 1, (LEAF_0,)),
    (3, 2, (NODE_01,)),
    (5, 1, (LEAF_0, NODE_23, LEAF_4)),
    (8, 0, (LEAF_1, NODE_23, NODE_4567)),
    (8, 5, (LEAF_4, NODE_67, NODE_0123)),
)
"""Size, index, audit path."""
CONSISTENCY = (
    (1, 1, ()),
    (1, 8, (LEAF_1, NODE_23, NODE_4567)),
    (2, 5, (NODE_23, LEAF_4)),
    (2, 8, (NODE_23, NODE_4567)),
    (3, 8, (LEAF_2, LEAF_3, NODE_01, NODE_4567)),
    (6, 8, (NODE_45, NODE_67, NODE_0123)),
)
"""Size before, size after, proof."""


def hexed(path: list[bytes]) -> tuple[str, ...]:
    return tuple(node.hex() for node in path)


@pytest.mark.parametrize("size", range(9))
def test_the_roots_are_the_published_ones(size: int) -> None:
    assert root_of(LEAVES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("size", "index", "path"), INCLUSION)
def test_the_inclusion_proofs_are_the_published_ones(size: int, index: int, path: tuple[str, ...]) -> None:
    assert hexed(inclusion_proof(index, LEAVES[:size])) == path
    assert includes(LEAVES[index], index, size, [bytes.fromhex(node) for node in path], bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("old", "new", "path"), CONSISTENCY)
def test_the_consistency_proofs_are_the_published_ones(old: int, new: int, path: tuple[str, ...]) -> None:
    assert hexed(consistency_proof(old, LEAVES[:new])) == path
    assert extends(old, bytes.fromhex(ROOTS[old]), new, bytes.fromhex(ROOTS[new]), [bytes.fromhex(node) for node in path])


def test_a_leaf_is_never_taken_for_a_node() -> None:
    """The second-preimage attack that the prefixes are there for."""
    assert leaf_hash(LEAVES[0] + LEAVES[1]) != node_hash(LEAVES[0], LEAVES[1]) != hashlib.sha256(LEAVES[0] + LEAVES[1]).digest()


def test_every_leaf_of_every_size_is_proven_and_nothing_else() -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(19)]
    for size in range(1, len(leaves) + 1):
        root = root_of(leaves[:size])
        for index in range(size):
            path = inclusion_proof(index, leaves[:size])
            assert includes(leaves[index], index, size, path, root)
            assert not includes(leaves[index], size, size, path, root) and not includes(leaves[index], -1, size, path, root)
            assert not includes(leaves[(index + 1) % 19], index, size, path, root)
            assert not includes(leaves[index], index, size, [*path, root], root)
            assert not any(includes(leaves[index], index, size, path[:cut], root) for cut in range(len(path)))
            assert not any(includes(leaves[index], other, size, path, root) for other in range(size) if other != index)


def test_every_extension_is_proven_and_nothing_else() -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(19)]
    roots = [root_of(leaves[:size]) for size in range(len(leaves) + 1)]
    for old in range(1, len(leaves) + 1):
        for new in range(old, len(leaves) + 1):
            path = consistency_proof(old, leaves[:new])
            assert extends(old, roots[old], new, roots[new], path)
            assert not extends(old, roots[old - 1], new, roots[new], path)
            assert not extends(old, roots[old], new, roots[new - 1], path)
            assert not extends(old, roots[old], new, roots[new], [*path, roots[0]])
            assert not any(extends(old, roots[old], new, roots[new], path[:cut]) for cut in range(len(path)))
            assert not extends(new, roots[new], old, roots[old], path) or old == new


@given(st.integers(0, 200))
def test_a_tree_that_grows_has_the_root_of_the_whole(size: int) -> None:
    tree, leaves = Growing(), [leaf_hash(number.to_bytes(2)) for number in range(size)]
    for leaf in leaves:
        tree.add(leaf)
    if size > 1:
        split = 1 << (size - 1).bit_length() - 1
        assert tree.root() == node_hash(root_of(leaves[:split]), root_of(leaves[split:])), "the definition in section 2.1"
    assert tree.size == size and tree.root() == root_of(leaves)
