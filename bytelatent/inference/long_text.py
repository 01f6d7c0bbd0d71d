"""The byte LM's entropies over a text of any length, read as one document."""

import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.model import ByteLM, Stream, entropies

AT_ONCE = 8192  # ids of a document that are read in one pass
PIECE = 2048  # ids that a longer one is read by


@torch.no_grad()
def entropies_of(byte_lm: ByteLM, stream: Stream) -> Tensor:
    """Uncertainty about the id that follows each id, in nats, float32 [T].

    A single long document is read piece by piece with a KV cache: the same entropies, without a mask of all pairs.
    """
    if len(stream.ids) <= AT_ONCE or stream.num_documents != 1:
        return byte_lm.entropies(stream)
    decoder = Decoder(byte_lm, None, None)
    first, *others = stream.ids.split(PIECE)
    state, logits = decoder.prefill([first])
    found = [entropies(logits)]
    for piece in others:
        found.append(entropies(decoder.extend(state, torch.zeros_like(piece), piece)))
    return torch.cat(found)
