"""Documents for hypothesis, and how they stand in a packed stream."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.vocab import encode

words = st.sampled_from(
    ["the ", "harbour", " boats, ", '"You ', "1972", "  ", ".\n", "naïve ", "漢字", "🙂", "-", "\t"]
)
texts = st.lists(words, max_size=12).map(lambda parts: "".join(parts).encode())
data = texts | st.binary(max_size=40) | st.tuples(texts, st.binary(max_size=3), texts).map(b"".join)
bytes_ids = st.builds(lambda text, bos, eos: encode(text, bos, eos).tolist(), data, st.booleans(), st.booleans())
any_ids = st.lists(st.integers(0, 7) | st.integers(0, 259), max_size=40)
ids_of_documents = (bytes_ids | any_ids).filter(lambda ids: len(ids) > 0)

# Quarters often fall on a threshold exactly; the rest are any float32 that an entropy over 260 ids can be.
entropy = st.integers(0, 22).map(lambda quarters: quarters / 4) | st.floats(0.0, 5.5625, width=32)
Document = tuple[list[int], list[float]]
documents = ids_of_documents.flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(entropy, min_size=len(ids), max_size=len(ids)))
)


def tensors(document: Document) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, entropies and positions of one document."""
    ids, entropies = document
    return torch.tensor(ids), torch.tensor(entropies, dtype=torch.float32), torch.arange(len(ids))


def packed(stream: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, entropies and positions of documents one after another."""
    ids, entropies, position = zip(*(tensors(document) for document in stream), strict=True)
    return torch.cat(ids), torch.cat(entropies), torch.cat(position)


def synthetic_stream(seed: int, num_documents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of BOS, bytes, EOS. Entropies are in 32nds of a nat: many are equal and none is ever rounded."""
    random = np.random.default_rng(seed)
    stream = []
    for _ in range(num_documents):
        ids = encode(random.integers(0, 256, random.integers(1, 60), dtype=np.uint8).tobytes()).tolist()
        stream.append((ids, (random.gamma(1.5, 26.0, len(ids)).round().clip(0, 170) / 32).tolist()))
    return packed(stream)
