"""Keyed hashes of document ids: which split a document belongs to, and which documents a cut keeps.

A hash needs no shuffled list: the answer for one document never depends on the others, on their order or on
the number of processes.
"""

import hashlib
import math
from collections.abc import Mapping

SPLITS = ("av_sft", "ar_sft", "rl", "held_out")
"""The disjoint uses of documents, in the order in which their fractions fill the unit interval."""


def hash_fraction(key: str, *, seed: int, purpose: str) -> float:
    """Map `key` to a uniform number in [0, 1), independent for every (seed, purpose).

    Args:
      key: any text, such as a document id.
      seed: any 64-bit signed integer.
      purpose: at most 16 bytes; two uses of the same key must not share one, or their choices are correlated.
    """
    digest = hashlib.blake2b(
        key.encode(errors="surrogatepass"),
        digest_size=8,
        key=seed.to_bytes(8, "little", signed=True),
        person=purpose.encode(),
    ).digest()
    # 53 bits are all a float holds; more could round up to 1.0.
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_of(doc_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """Name the split of a document.

    Args:
      doc_id: the document's id; every row of a document lands in the same split.
      fractions: split name -> share of the documents; names from `SPLITS`, shares summing to 1.
      seed: another seed gives another, independent division.

    Raises:
      ValueError: an unknown split name, a negative share, or shares that do not sum to 1.
    """
    if unknown := sorted(set(fractions) - set(SPLITS)):
        raise ValueError(f"unknown splits {unknown}; the splits are {', '.join(SPLITS)}")
    if negative := {name: share for name, share in fractions.items() if share < 0}:
        raise ValueError(f"negative split fractions {negative}; give shares between 0 and 1")
    if not math.isclose(total := sum(fractions.values()), 1.0, abs_tol=1e-9):
        raise ValueError(f"split fractions {dict(fractions)} sum to {total:g}, expected 1")
    position = hash_fraction(doc_id, seed=seed, purpose="split")
    used = [name for name in SPLITS if fractions.get(name, 0) > 0]
    edge = 0.0
    for name in used:
        edge += fractions[name]
        if position < edge:
            return name
    return used[-1]  # the shares may sum to a hair less than 1
