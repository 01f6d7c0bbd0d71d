"""What a `BLT` finds in texts: patches, log-probabilities, entropies, states, bits per byte."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from bytelatent.blt.core import checked_context
from bytelatent.blt.forward import Forward, Text, Texts, as_list, is_start
from bytelatent.blt.patches import Patches
from bytelatent.data import patches_of
from bytelatent.errors import UserError
from bytelatent.evaluation import PackedModel, bootstrap
from bytelatent.evaluation.text import FEWEST
from bytelatent.inference import Decoder, log_probabilities, prompt_ids
from bytelatent.inference.settings import LIMITS
from bytelatent.model import PatchedStream, add_patches, pack_rows, recording
from bytelatent.model.loss import bits_per_byte
from bytelatent.text import Document
from bytelatent.vocab import encode, to_bytes

# Shapes: N bytes of a text, P patches of it, T ids in the stream, D local width, G global width, V vocabulary

READ_IDS = 8192  # ids that are read at once, unless a single text has more
RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class TextReading:
    """What a model predicts of each byte of a text, before it reads the byte. Value i is about byte i.

    Attributes:
        data: the text.
        log_probabilities: [N] float32 nats, of byte i given those before it; with `end=True` [N + 1], the last one of
            the end of the text.
        entropies: [N] float32 nats, of the entropy model's prediction of byte i; None where patches need none.
        starts: [N] bool, whether byte i starts a patch. The first always does, as in `patch`.
    """

    data: bytes
    log_probabilities: Tensor
    entropies: Tensor | None
    starts: Tensor


@dataclass(frozen=True)
class TextStates:
    """A model's states once it has read a text. Value i of bytes is about byte i, value j of patches about patch j.

    Attributes:
        data: the text.
        byte_states: [N, D] of the local encoder.
        decoder_states: [N, D] of the local decoder, from which the next byte is predicted.
        patch_states: [P, G] of the global transformer.
        patch_of_byte: [N] int64, the patch that each byte is in.
    """

    data: bytes
    byte_states: Tensor
    decoder_states: Tensor
    patch_states: Tensor
    patch_of_byte: Tensor


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of several texts.

    Attributes:
        mean: of all their bytes.
        interval: of the mean, by a bootstrap over texts; None for fewer than 10, whose spread says too little.
        per_text: of each text.
    """

    mean: float
    interval: tuple[float, float] | None
    per_text: list[float]


class Reading(Forward):
    def patch(self, text: Text, context: int | None = None) -> Patches:
        """The patches of a text, as `logits`, `generate` and `score` use them; a notebook shows them in colours.

        Args:
            context: split the text into pieces of at most this many ids and read each on its own, as training and
                `bits_per_byte` do; None: read it whole.
        """
        patches = patches_of(to_bytes(text), self.patcher, None if context is None else checked_context(context))
        threshold = None if self.patching.monotonicity else self.patching.threshold
        return Patches(patches, self.patching.name, threshold)

    @overload
    def read(self, texts: Text, context: int | None = ..., end: bool = ...) -> TextReading: ...
    @overload
    def read(self, texts: Texts, context: int | None = ..., end: bool = ...) -> list[TextReading]: ...
    @torch.no_grad()
    def read(self, texts: Any, context: int | None = None, end: bool = False) -> Any:
        """The log-probability and the entropy of each byte of a text, or of each of several, and where patches start.

        Args:
            context: as in `patch`.
            end: whether the end of the text is predicted, too.
        """
        found = []
        for group in self._groups(texts, context):
            log_p_TV = self.model(group.batch).log_softmax(-1)
            for data, ids, at in group.texts():
                targets = ids[1:] if end else ids[1:-1]
                size = len(data)
                starts = group.is_start[at][1:].clone()
                starts[:1] = True
                found.append(
                    TextReading(
                        data,
                        log_p_TV[at][: len(targets)].gather(1, targets[:, None])[:, 0],
                        None if group.entropies is None else group.entropies[at][:size],
                        starts,
                    )
                )
        return found[0] if isinstance(texts, str | bytes) else found

    @overload
    def states(self, texts: Text, layer: int = ..., context: int | None = ...) -> TextStates: ...
    @overload
    def states(self, texts: Texts, layer: int = ..., context: int | None = ...) -> list[TextStates]: ...
    @torch.no_grad()
    def states(self, texts: Any, layer: int = -1, context: int | None = None) -> Any:
        """The states of the bytes and patches of a text, or of each of several, for probes; without BOS.

        Args:
            layer: of the global transformer, after which `patch_states` are taken; 0: what its first layer reads.
            context: as in `patch`.
        """
        depth = self.model.global_transformer.stack.settings.num_layers
        if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
            raise UserError(f"layer: {layer} is not one of the global transformer, which has {depth}; 0 is its input")
        found = []
        for group in self._groups(texts, context):
            with recording(self.model, states=True, attentions=False) as recorded:
                self.model(group.batch)
            byte_TD, decoder_TD = recorded.states["encoder"][-1], recorded.states["decoder"][-1]
            patch_PG = recorded.states["global_transformer"][layer]
            for data, _, at in group.texts():
                patch = group.batch.patch[at]
                begin, end = (int(patch[1]), int(patch[-1]) + 1) if data else (0, 0)  # BOS may have a patch of its own
                own = byte_TD[at][1:], decoder_TD[at][1:], patch_PG[begin:end], patch[1:] - begin
                found.append(TextStates(data, *own))
        return found[0] if isinstance(texts, str | bytes) else found

    def score(self, prompt: Text, continuations: Texts, end: bool = False) -> list[float]:
        """log P(continuation | prompt) of each continuation, in nats; the prompt is read only once.

        Args:
            end: whether the text ends after the continuation, which then pays for that, too.
        """
        if isinstance(continuations, str | bytes) or not isinstance(continuations, Iterable):
            raise UserError("score takes a list of continuations; write [text] for one")
        decoder = Decoder(self.model, self.patching, self.needed_entropy_model())
        texts = [torch.from_numpy(encode(text, bos=False, eos=end)) for text in continuations]
        return log_probabilities(decoder, prompt_ids(prompt), texts)

    @overload
    def bits_per_byte(
        self, texts: Text, context: int | None = ..., confidence: float = ..., end: bool = ...
    ) -> float: ...
    @overload
    def bits_per_byte(
        self, texts: Texts, context: int | None = ..., confidence: float = ..., end: bool = ...
    ) -> BitsPerByte: ...
    def bits_per_byte(
        self, texts: Any, context: int | None = None, confidence: float = 0.95, end: bool = True
    ) -> float | BitsPerByte:
        """Cross-entropy of a text and its end, in bits per byte; or that of several, with an interval.

        Args:
            context: as in `patch`; None: the model's `context`, as in training and `blt eval`.
            confidence: of the interval.
            end: whether the end of each text is paid for.

        Raises:
            UserError: there is no text, or an empty one.
        """
        data = [to_bytes(text) for text in as_list(texts)]
        if not data:
            raise UserError("bits_per_byte: there is no text")
        if empty := [number for number, text in enumerate(data) if not text]:
            which = "the text" if len(data) == 1 else f"text {empty[0]} of {len(data):,} (from 0)"
            raise UserError(f"bits_per_byte: {which} is empty")
        if not 0 < confidence < 1:
            raise UserError(f"confidence: {confidence} is not between 0 and 1; 0.95 is usual")
        context = self.context if context is None else checked_context(context)
        reader = PackedModel(self.source, self.model, self.device, context, patcher=self.patcher, end=end)
        with torch.no_grad():
            costs = list(reader.costs(Document(text) for text in data))
        per_text = [bits_per_byte(cost.nats, cost.num_bytes) for cost in costs]
        if isinstance(texts, str | bytes):
            return per_text[0]
        nats, num_bytes = [cost.nats for cost in costs], [cost.num_bytes for cost in costs]
        interval = None
        if len(data) >= FEWEST:
            [interval], _ = bootstrap(np.array([nats]), np.array(num_bytes), RESAMPLES, seed=0, level=100 * confidence)
        return BitsPerByte(bits_per_byte(math.fsum(nats), sum(num_bytes)), interval, per_text)

    def _groups(self, texts: Text | Texts, context: int | None) -> Iterator["_Group"]:
        """The texts in groups that are read at once."""
        size = LIMITS["context"] if context is None else checked_context(context)
        group: list[bytes] = []
        for data in [to_bytes(text) for text in as_list(texts)]:
            if group and sum(map(len, group)) + len(data) > READ_IDS:
                yield self._group(group, size)
                group = []
            group.append(data)
        if group:
            yield self._group(group, size)

    def _group(self, texts: list[bytes], context: int) -> "_Group":
        ids = [torch.from_numpy(encode(data)).to(self.device) for data in texts]
        stream = pack_rows([piece for row in ids for piece in row[:-1].split(context)])
        starts, entropies = self.next_starts(stream)
        return _Group(texts, ids, add_patches(stream, starts), entropies)


@dataclass(frozen=True)
class _Group:
    """Texts that are read at once.

    Attributes:
        ids: of each text, BOS and EOS included.
        batch: all of them but EOS, end to end.
        entropies: [T] of what follows each id of the batch.
    """

    data: list[bytes]
    ids: list[Tensor]
    batch: PatchedStream
    entropies: Tensor | None

    @property
    def is_start(self) -> Tensor:
        """[T] whether an id starts a patch."""
        return is_start(self.batch)

    def texts(self) -> Iterator[tuple[bytes, Tensor, slice]]:
        """Each text, its ids, and where it lies in the batch."""
        at = 0
        for data, ids in zip(self.data, self.ids, strict=True):
            yield data, ids, slice(at, at + len(data) + 1)
            at += len(data) + 1
