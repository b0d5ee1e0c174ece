"""Memory of several GPUs that each other's kernels read, and the hand-shake that says when.

Every rank has a buffer of the same size at the same place in a table of addresses, and a pad of signals. A program of rank i tells the same
program of every rank j that what rank i wrote before is there (`signal`), and waits until all have told it so (`await_signals`). A signal is a
word that the sender sets from 0 to 1 and the receiver sets back, so a captured graph can be replayed without counting.

What a rank wrote may be read until the ranks' next hand-shake but one, if buffers alternate: whoever signals has ended all kernels before, reads
included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signal(pads, program, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell the same program of every other rank that all that this rank's stream wrote before is there.

    pads: uint64 [RANKS], the addresses of the ranks' signal pads, each int32 [programs, RANKS].
    """
    for ahead in tl.static_range(1, RANKS):
        peer = (RANK + ahead) % RANKS
        pad = tl.load(pads + peer).to(tl.pointer_type(tl.int32))
        word = pad + program * RANKS + RANK
        while tl.atomic_cas(word, 0, 1, sem="release", scope="sys") != 0:
            pass


@triton.jit
def await_signals(pads, program, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Wait until the same program of every other rank has signalled."""
    pad = tl.load(pads + RANK).to(tl.pointer_type(tl.int32))
    for ahead in tl.static_range(1, RANKS):
        word = pad + program * RANKS + (RANK + ahead) % RANKS
        while tl.atomic_cas(word, 1, 0, sem="acquire", scope="sys") != 1:
            pass


@triton.jit
def buffer_of(buffers, peer, offset, like):
    """Return the address of element `offset` of a rank's buffer, as a pointer of the type of `like`."""
    return tl.load(buffers + peer).to(like.dtype) + offset
