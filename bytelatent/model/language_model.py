"""Flat language models: one transformer over bytes or over tokens.

The entropies of a small byte LM say where patches begin. A token LM is the baseline of a BLT: its global transformer on
the ids of a tokenizer.

Source: Pagnoni et al. 2024, section 2.3.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bytelatent.errors import UserError
from bytelatent.model.attention import Mask
from bytelatent.model.block import Stack, init_weights
from bytelatent.model.settings import LanguageModelSettings
from bytelatent.model.stream import Stream

# Shapes: T ids in the stream, D width, V vocabulary


class LanguageModel(nn.Module):
    """A transformer over ids: embedding, blocks, norm, output."""

    def __init__(self, settings: LanguageModelSettings):
        super().__init__()
        self.settings = settings
        # Without values: `init_weights` draws them.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(settings.vocab_size, settings.dim), freeze=False)
        self.stack = Stack(settings)
        self.norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.output = nn.Linear(settings.dim, settings.vocab_size, bias=False)
        init_weights(self)

    def forward(self, stream: Stream, cache: Mask | None = None, at: Tensor | None = None) -> Tensor:
        """Logits of the id that follows each id, float32 [T, V].

        Args:
            cache: the KV cache, where the stream holds new ids only: a prompt or what follows it.
            at: [N] the ids whose logits are wanted; None for all.
        """
        mask = self.stack.mask(stream.document, stream.num_documents) if cache is None else cache
        x_TD = self.stack(self.embedding(stream.ids), stream.position, mask)
        return self.output(self.norm(x_TD if at is None else x_TD[at])).float()


class ByteLM(LanguageModel):
    """A language model over bytes.

    Attributes:
        loader: what `from_pretrained` calls; `bytelatent.weights` sets it, which this package does not know.
    """

    loader: ClassVar[Callable[..., "ByteLM"] | None] = None

    @classmethod
    def from_pretrained(cls, source: Any, device: Any = "auto", dtype: Any = "float32") -> "ByteLM":
        """Load a byte LM, or the byte LM of a BLT; its weights can be trained.

        Args:
            source: a run; a folder, or OWNER/NAME on the Hugging Face hub, in any format that a BLT is loaded from.
            device: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or a torch.device.
            dtype: precision of the weights: `float32`, `bfloat16`, `auto` (as stored), or a torch.dtype.

        Raises:
            UserError: there is no byte LM at `source`.
        """
        if cls.loader is None:
            raise UserError("ByteLM: import it from the package to load one: from bytelatent import ByteLM")
        return cls.loader(source, device, dtype)

    @torch.no_grad()
    def entropies(self, stream: Stream) -> Tensor:
        """Uncertainty about the id that follows each id, in nats, float32 [T]."""
        return entropies(self(stream))


class TokenLM(LanguageModel):
    """A language model over the ids of a tokenizer, which `bytelatent.text.tokenizer` reads."""


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions that `logits` [..., V] give, [...]."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
