"""Flat language models: one transformer over bytes or over tokens.

The entropies of a small byte LM say where patches begin. A token LM is the baseline of a BLT: its global transformer on
the ids of a tokenizer.

Source: Pagnoni et al. 2024, section 2.3.
"""

import torch
from torch import Tensor, nn

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
    """A language model over bytes."""

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
