"""The forward pass of a `BLT` over rows of ids: logits, loss, states, attention weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.blt.core import Core, checked_context
from bytelatent.errors import UserError
from bytelatent.inference import prompt_ids
from bytelatent.inference.scoring import entropies_of
from bytelatent.inference.settings import LIMITS
from bytelatent.model import Layout, PatchedStream, Rows, Stream, add_patches, lines_as_documents, pack_rows, recording
from bytelatent.model.loss import IGNORED
from bytelatent.model.recording import PARTS, Recording, attention_weights, own_byte_weights, read_patch_weights
from bytelatent.patching import next_starts, starts_of_lengths
from bytelatent.vocab import PADDING, VOCAB_SIZE, decode, encode

# Shapes: B rows, N ids in a row, T ids in the stream, P patches of a row, K queries or keys per patch, D local width,
# G global width, H heads, V vocabulary

Text = str | bytes
Texts = Sequence[Text]


@dataclass(frozen=True)
class ByPart:
    """A value for each layer of each part of the model; in `hidden_states`, what the first layer reads comes first."""

    encoder: tuple[Tensor, ...]
    global_transformer: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]


@dataclass(frozen=True)
class Attentions(ByPart):
    """Attention weights, float32; zero at padding.

    Attributes:
        encoder, decoder: [B, H, N, N] of each layer: of each byte to bytes.
        global_transformer: [B, H, P, P] of each layer: of each patch to patches.
        encoder_cross: [B, H, K, N] of each cross-attention: of the K queries of a byte's own patch to the byte. Those
            of a patch's bytes sum to 1.
        decoder_cross: [B, H, K, N]: of a byte to the K keys of the patch it reads, which sum to 1; 0 where it reads
            none.
    """

    encoder_cross: tuple[Tensor, ...]
    decoder_cross: tuple[Tensor, ...]


@dataclass(frozen=True)
class BLTOutput:
    """What a forward pass gives. Value i of a row is about id i, but logits i are about the id after it.

    `output.logits`, `output["logits"]` and, of what is not None in this order, `output[0]` give the same, as those of
    transformers do.

    Attributes:
        loss: mean cross-entropy of the labels in nats, a scalar; None without labels.
        logits: [B, N, V] float32, of the id that follows each id; zero at padding.
        starts: [B, N] bool, whether an id starts a patch; a row's first id always does.
        patch_of_byte: [B, N] int64, the number of the patch that an id is in, from 0 in each row; -1 at padding.
        entropies: [B, N] float32 nats: how uncertain the entropy model was about an id before it read it; 0 for a row's
            first. None where patches need none, or are given.
        byte_states: [B, N, D], the encoder's last.
        patch_inputs: [B, P, K, D], what the encoder makes of each patch.
        patch_states: [B, P, G], the global transformer's last.
        hidden_states: of all layers: [B, N, D] of bytes, [B, P, G] of patches.
        attentions: of all layers.
    """

    loss: Tensor | None
    logits: Tensor
    starts: Tensor
    patch_of_byte: Tensor
    entropies: Tensor | None = None
    byte_states: Tensor | None = None
    patch_inputs: Tensor | None = None
    patch_states: Tensor | None = None
    hidden_states: ByPart | None = None
    attentions: Attentions | None = None

    def keys(self) -> list[str]:
        """Names of what is not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


class Forward(Core):
    def encode(self, texts: Text | Texts, end: bool = False) -> Tensor:
        """Texts as rows of ids [B, N] on the model's device, padded at the end with -1.

        A row is BOS (1) and an id for each byte (the byte + 4).

        Args:
            end: whether EOS (2) follows, as in training.
        """
        rows = [torch.from_numpy(encode(text, eos=end)) for text in as_list(texts)]
        if not rows:
            return torch.zeros(0, 0, dtype=torch.long, device=self.device)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING).to(self.device)

    def decode(self, ids: Tensor | list[int]) -> str | list[str]:
        """The text of ids [N], or the texts of rows [B, N]; special ids and padding are dropped."""
        ids = torch.as_tensor(ids)
        rows = [decode(row.tolist()).decode("utf-8", "replace") for row in torch.atleast_2d(ids)]
        return rows if ids.dim() > 1 else rows[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BLTOutput:
        """Read rows of ids, each from its start and as if it were alone.

        Args:
            input_ids: [B, N], each row a document: BOS first. Padded at either end. A row without BOS is read as if its
                first id began a document, which no model has seen in training; cut texts after BOS, not before.
            attention_mask: [B, N], 0 at padding and 1 elsewhere; None: ids of -1 are padding.
            labels: [B, N], what each id should have been, so usually `input_ids` themselves: the loss compares those of
                id i+1 with the logits of id i. Those of -100, of padding and of a row's first id do not count;
                where none counts, the loss is 0.
            patch_lengths: [B, P], zero-padded, in ids, BOS and EOS included. A row sums to its number of ids N, or to
                N + 1 with the id that follows, which says whether the next id starts a patch. None: the model's own.
            output_hidden_states: also give the states of bytes and patches, and those of all layers.
            output_attentions: also give attention weights, whose memory is that of all pairs.

        Raises:
            UserError: types, shapes, ids, mask or sums do not fit.
        """
        rows = _checked_rows("forward", input_ids, attention_mask, self.device)
        lengths = None if patch_lengths is None else tensor("forward", "patch_lengths", patch_lengths)
        if lengths is not None and lengths.shape[:-1] != rows.ids.shape[:1]:
            raise UserError(f"forward: patch_lengths [B, P], not {list(lengths.shape)}, for {len(rows.ids)} rows")
        if labels is not None:
            labels = checked_labels(labels, rows.is_real)
        stream = rows.stream
        starts, entropies = self.next_starts(stream) if patch_lengths is None else (_given(rows, patch_lengths), None)
        batch = add_patches(stream, starts)
        layouts = _layouts(rows, batch) if output_hidden_states else None
        with recording(self.model, output_hidden_states, output_attentions, layouts) as found:
            logits_TV = self.model(batch) if len(stream.ids) else self._no_logits()
        with torch.autocast(self.device.type, enabled=False):
            attentions = self._attentions(found, rows, batch) if output_attentions else None
        return BLTOutput(
            loss=None if labels is None else _loss(logits_TV, rows, labels),
            logits=rows.layout.put(logits_TV),
            starts=rows.layout.put(is_start(batch), False),
            patch_of_byte=rows.layout.put(batch.patch - _first_patch(batch), -1),
            entropies=None if entropies is None else rows.layout.put(predicted(entropies, stream)),
            **_states(found) if output_hidden_states and len(stream.ids) else {},
            attentions=attentions,
        )

    @torch.no_grad()
    def logits(self, ids: Text | Tensor, patch_lengths: Tensor | None = None, context: int | None = None) -> Tensor:
        """The model's logits, without a graph.

        Args:
            ids: a text, to which BOS is added; or [B, N], rows of documents from their start, padded with -1.
            patch_lengths: [B, P], zero-padded; a row sums to its number of ids or one more. None: patches of the model.
            context: as in `patch`.

        Returns:
            float32 [B, N, V]; zero at padding.

        Raises:
            UserError: shapes or sums do not fit, or `ids` is neither text nor ids.
        """
        if not isinstance(ids, Tensor):
            ids = prompt_ids(ids)[None]
        lengths = None if patch_lengths is None else tensor("logits", "patch_lengths", patch_lengths)
        if ids.dim() != 2 or (lengths is not None and lengths.shape[:-1] != ids.shape[:1]):
            raise UserError(f"logits takes ids [B, N] and patch_lengths [B, P], not {list(ids.shape)}")
        rows = _checked_rows("logits", ids, None, self.device)
        size = LIMITS["context"] if context is None else checked_context(context)
        pieces = [
            piece for row, is_real in zip(rows.ids, rows.is_real, strict=True) for piece in row[is_real].split(size)
        ]
        stream = pack_rows(pieces).to(self.device)
        if len(stream.ids) == 0:
            return rows.layout.put(self._no_logits())
        starts = self.next_starts(stream)[0] if patch_lengths is None else _given(rows, patch_lengths)
        return rows.layout.put(self.model(add_patches(stream, starts)))

    @torch.no_grad()
    def next_starts(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Whether the id after each id of a stream starts a patch, [T], and the entropies [T] if they decide it."""
        byte_lm = self.needed_entropy_model()
        read = lines_as_documents(stream) if self.patching.reset_at_newline else stream
        with torch.autocast(self.device.type, enabled=False):  # another precision moves patches
            entropies = None if byte_lm is None else entropies_of(byte_lm, read)
        return next_starts(stream.ids, entropies, stream.position, self.patching), entropies

    def _no_logits(self) -> Tensor:
        return torch.zeros(0, VOCAB_SIZE, device=self.device)

    def _attentions(self, found: Recording, rows: Rows, batch: PatchedStream) -> Attentions:
        bytes_, patches = rows.layout, rows.layout_of_patches(batch)
        weights = {}
        for name in PARTS:
            part: Any = getattr(self.model, name)
            layout, window = patches if name == "global_transformer" else bytes_, part.stack.settings.window
            weights[name] = tuple(attention_weights(q, k, layout, window) for q, k in found.queries_keys[name])
        own = (own_byte_weights(q, k, batch.patch) for q, k in found.cross_queries_keys["encoder"])
        read = (read_patch_weights(q, k, batch.read) for q, k in found.cross_queries_keys["decoder"])
        for name, each in (("encoder_cross", own), ("decoder_cross", read)):
            weights[name] = tuple(bytes_.put(weight_TKH).permute(0, 3, 2, 1) for weight_TKH in each)
        return Attentions(**weights)


def as_list(texts: Text | Texts) -> list[Text]:
    """The texts, or the one text that is given; what is no text is named where it is read."""
    return list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str | bytes) else [texts]


def predicted(entropies_T: Tensor, stream: Stream) -> Tensor:
    """From the entropies of what follows each id to those of each id itself, [T]; 0 for a document's first."""
    return torch.where(stream.position == 0, 0.0, entropies_T.roll(1))


def is_start(batch: PatchedStream) -> Tensor:
    return batch.patch.diff(prepend=batch.patch[:1] - 1) > 0


def _first_patch(batch: PatchedStream) -> Tensor:
    """[T] the first patch of each id's document."""
    return batch.patch - batch.patch_position[batch.patch]


def tensor(name: str, argument: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise UserError(f"{name}: {argument} is a tensor, not {type(value).__name__}; write torch.tensor(...)")
    return value


def checked_mask(name: str, mask: Any, shape: torch.Size) -> Tensor:
    """An attention mask as bool.

    Raises:
        UserError: it has another shape than the ids, or holds other values than 0 and 1.
    """
    if tensor(name, "attention_mask", mask).shape != shape:
        raise UserError(f"{name}: attention_mask {list(mask.shape)} and ids {list(shape)} differ in shape")
    is_real = mask != 0
    if bool((is_real & (mask != 1)).any()):
        found = mask[is_real & (mask != 1)][0].item()
        raise UserError(f"{name}: attention_mask holds {found}; it is 1 at ids and 0 at padding")
    if mask.is_floating_point() and mask.numel() and not bool(is_real.any()):
        why = "all padding; a mask that is added to scores is not taken"
        raise UserError(f"{name}: attention_mask is 0.0 everywhere, {why}: write 1 at ids")
    return is_real


def checked_labels(labels: Any, is_real_BN: Tensor) -> Tensor:
    """Labels as int64, those of padding ignored.

    Raises:
        UserError: they are no ids, or have another shape than the ids.
    """
    labels = tensor("forward", "labels", labels)
    if labels.shape != is_real_BN.shape:
        raise UserError(f"forward: labels {list(labels.shape)} and input_ids {list(is_real_BN.shape)} differ in shape")
    found_BN = labels.to(is_real_BN.device).masked_fill(~is_real_BN, IGNORED) if is_integer(labels) else None
    if found_BN is None or bool(((found_BN != IGNORED) & ((found_BN < 0) | (found_BN >= VOCAB_SIZE))).any()):
        raise UserError(f"labels: ids are whole numbers from 0 to {VOCAB_SIZE - 1}, and {IGNORED} where none counts")
    return found_BN.long()


def is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _checked_rows(name: str, ids: Tensor, mask: Tensor | None, device: torch.device) -> Rows:
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"{name}: it takes ids [B, N], not {found}; blt.encode makes them of texts")
    is_real = None if mask is None else checked_mask(name, mask, ids.shape).to(device)
    ids = ids.to(device)
    is_real = ids != PADDING if is_real is None else is_real
    if not is_integer(ids) or bool((is_real & ((ids < 0) | (ids >= VOCAB_SIZE))).any()):
        if mask is not None and bool((is_real & (ids == PADDING)).any()):
            raise UserError(f"{name}: attention_mask is 1 where ids are {PADDING}, which is padding; write 0 there")
        raise UserError(f"{name}: ids are whole numbers from 0 to {VOCAB_SIZE - 1}, and {PADDING} for padding")
    begins = is_real.long().diff(dim=1, prepend=torch.zeros_like(ids[:, :1], dtype=torch.long)) > 0
    if bool((begins.sum(1) > 1).any()):
        raise UserError(f"{name}: padding ({PADDING}) belongs at the end of a row or before it, not between its ids")
    return Rows(ids.long(), is_real)


def _given(rows: Rows, patch_lengths: Tensor) -> Tensor:
    """Patch starts of given lengths."""
    sizes = rows.is_real.sum(1).tolist()
    pairs = zip(patch_lengths.to(rows.ids.device), sizes, strict=True)
    return torch.cat([starts_of_lengths(lengths, size) for lengths, size in pairs])


def _loss(logits_TV: Tensor, rows: Rows, labels_BN: Tensor) -> Tensor:
    targets_T = F.pad(labels_BN[:, 1:], (0, 1), value=IGNORED)[rows.is_real]
    nats = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    return nats / (targets_T != IGNORED).sum().clamp(min=1)


def _layouts(rows: Rows, batch: PatchedStream) -> dict[str, Layout]:
    return {
        name: rows.layout_of_patches(batch) if name == "global_transformer" else rows.layout
        for name in ("encoder", "global_transformer", "decoder")
    }


def _states(found: Recording) -> dict[str, Any]:
    by_part = ByPart(**{name: tuple(found.states[name]) for name in PARTS})
    return {
        "byte_states": by_part.encoder[-1],
        "patch_inputs": found.patches,
        "patch_states": by_part.global_transformer[-1],
        "hidden_states": by_part,
    }
