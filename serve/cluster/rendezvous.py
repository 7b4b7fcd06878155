"""Weighted rendezvous hashing: every (key, node) draws a number, and the smallest is the key's first node.

Whoever knows the same nodes finds the same order, without speaking to anybody; a node that leaves or joins moves only
the keys it is first for, in proportion to its weight.  A key's numbers are drawn at once in NumPy, so cheaply for a
thousand nodes that nothing has to be kept for a key, however many there are.

Source: Thaler and Ravishankar, "A name-based mapping scheme for rendezvous", 1996; weights as in Schindelhauer and
Schomaker, "Weighted distributed hash tables", 2005.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ONE, HALF, ODD_1, ODD_2 = np.uint64(1), np.uint64(32), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

type Places = npt.NDArray[np.int64]  # numbers of nodes in the arrays
type Drawn = npt.NDArray[np.float64]  # a number for each node


def stable_hash(*parts: str) -> int:
    """Returns 64 bits, the same in every process.  Only the last part may hold a NUL."""
    text = "\0".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def draw(key: int, hashes: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]) -> Drawn:
    """Returns a number for each node, distributed exponentially with the node's weight as its rate.

    Key and hashes are uniform already; two products make the upper bits, which count, depend on all of both.
    """
    mixed = hashes ^ np.uint64(key)
    mixed *= ODD_1
    mixed ^= mixed >> HALF
    mixed *= ODD_2
    mixed |= ONE  # zero has no logarithm
    return -np.log(mixed * 2.0**-64) / weights


def smallest(drawn: Drawn, count: int) -> Places:
    """Returns the places of the smallest numbers, in order; all of them if there are fewer."""
    if count == 1 and drawn.size:
        return drawn.argmin(keepdims=True)
    if count >= drawn.size:
        return np.argsort(drawn, kind="stable")
    first = np.argpartition(drawn, count - 1)[:count]
    return first[np.argsort(drawn[first])]
