"""Perceptual hashes of clips, and which clips are copies of others by them.

A frame's hash has 64 bits, each saying whether of two neighbours in a grid of 9x8 the
left one is brighter (dHash): other sizes, codecs and qualities change few of them.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

WORDS = 3  # frames of a clip that have a hash: first, middle, last


def clip_hash(hashes: list[str]) -> str:
  """Hash of a clip from those of its frames, in order; "" if there is none."""
  kept = [value for value in hashes if value]
  if not kept:
    return ""
  return "".join((kept[0], kept[len(kept) // 2], kept[-1]))


def groups(hashes: list[str], bits: float) -> np.ndarray:
  """Groups of clips whose hashes differ by at most `bits` of 64, mean of their frames.

  Args:
    hashes: of `clip_hash`; one that is "" is in a group of its own.
    bits: 0 to 4: more would compare very many pairs, and find strangers.

  Returns:
    [n] for each clip the index of the first clip of its group.
  """
  first = np.arange(len(hashes))
  known = np.array([i for i, value in enumerate(hashes) if value], np.int64)
  if not len(known):
    return first
  packed = np.frombuffer(bytes.fromhex("".join(hashes[i] for i in known)), np.uint8)
  # Equal ones are one node, so that a thousand copies are not a million pairs.
  unique, node = np.unique(packed.reshape(-1, 8 * WORDS), axis=0, return_inverse=True)
  left, right = _near(unique, int(WORDS * bits))
  graph = sparse.coo_matrix((np.ones(len(left)), (left, right)), [len(unique)] * 2)
  group = csgraph.connected_components(graph, directed=False)[1][node.reshape(-1)]
  leaders = np.full(group.max() + 1, len(hashes))
  np.minimum.at(leaders, group, known)
  first[known] = leaders[group]
  return first


def _near(codes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of codes (uint8 [n, 24]) that differ in at most `most` bits.

  Of most + 1 bands of bits, two such codes agree in one: only codes that are equal in
  a band are compared.
  """
  words = np.ascontiguousarray(codes).view(np.uint64)
  bits = np.unpackbits(codes, axis=1)
  found: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
  for columns in np.array_split(np.arange(bits.shape[1]), most + 1):
    band = np.packbits(bits[:, columns], axis=1)
    key = np.unique(band, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(key, kind="stable")
    key = key[order]
    places = np.arange(len(key))
    for step in range(1, len(key)):
      places = places[places + step < len(key)]
      places = places[key[places] == key[places + step]]
      if not len(places):
        break
      pairs = np.stack([order[places], order[places + step]], 1)
      differ = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(1)
      found.append(pairs[differ <= most])
  pairs = np.concatenate(found)
  return pairs[:, 0], pairs[:, 1]
