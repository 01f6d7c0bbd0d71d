"""Packed streams of random ids."""

import torch
import torch.nn.functional as F

from bytelatent.model import Stream, pack_rows


def stream_of_sizes(sizes: list[int], padding: int = 0) -> Stream:
    """Documents of these sizes, and padding as in a batch."""
    generator = torch.Generator().manual_seed(sum(sizes))
    stream = pack_rows([torch.randint(4, 260, (size,), generator=generator) for size in sizes])
    return Stream(
        ids=F.pad(stream.ids, (0, padding)),
        document=F.pad(stream.document, (0, padding), value=-1),
        position=torch.cat([stream.position, torch.arange(padding)]),
    )
