"""The public face: a BLT with all it needs to be used."""

import logging
import reprlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from bytelatent.data import Patcher, cut, pack, patch_in_groups, patches_of, take
from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.evaluation import evaluate
from bytelatent.inference import Decoder, Engine, Sampling, log_probabilities, prompt_ids
from bytelatent.inference.engine import check_max_new_bytes, check_samples
from bytelatent.inference.long_text import entropies_of
from bytelatent.inference.quantize import Weights, check_weights, rounded
from bytelatent.inference.step import check_ahead, engine_for
from bytelatent.model import BLTModel, BLTSettings, ByteLM, add_patches, pack_rows
from bytelatent.patching import Patch, PatchSettings, next_starts
from bytelatent.terminal import say
from bytelatent.text import Document
from bytelatent.vocab import PADDING, VOCAB_SIZE, encode, to_bytes
from bytelatent.weights import Config, StoredModel, open_pretrained, write_model
from bytelatent.weights.claims import Measured, true_of

# Shapes: B rows, N ids in a row, P patches, V vocabulary

MAX_ROWS = 64  # sequences that `generate` continues at once; more of them wait
LONGEST_CONTEXT = 2**31
MAX_CONTINUATIONS = 1_000_000  # of all prompts of a call that asks for samples


class BLT:
    """A Byte Latent Transformer, its patching rule, and the byte LM that the rule asks.

        model = BLT.from_pretrained("runs/demo")
        model.generate("The history of", max_new_bytes=200)

    All but `weights` and `device` may be set; what is set is used by every method, and saved.

    Attributes:
        config: all of `config.json`; `patching` and `context` are two of its values.
        model: the network.
        patching: the rule.
        byte_lm: gives the entropies; None where the rule needs none.
        context: ids the model saw at once in training. A text is used whole, whatever its length; `bits_per_byte` reads
            a longer one in pieces of this many ids, as training does.
        weights: `full`, or what the network's large matrices are rounded to.
        ahead: bytes of a text that a step of generation comes on by at most.
    """

    def __init__(
        self,
        model: BLTModel,
        config: Config,
        byte_lm: ByteLM | None,
        source: str = "",
        weights: Weights = "full",
        ahead: int = 1,
    ):
        self._weights: Weights = weights
        self._model = rounded(model, weights).eval()
        self.byte_lm = byte_lm
        self._config = config
        self._measured = Measured.of(self.model, config, self.byte_lm)
        self.ahead = ahead
        self.source = source
        self._kept_engine: tuple[Any, Engine] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        entropy: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        weights: Weights = "full",
        ahead: int = 1,
    ) -> "BLT":
        """Load a model, and say in one line what was found (through the logger `bytelatent`).

        Args:
            source: a run of ours; a folder in our format, in one of Meta's, or in that of transformers; or OWNER/NAME,
                a repository of the Hugging Face hub that holds one of these.
            entropy: where the byte LM (entropy model) is, if it stands neither inside `source` nor beside it.
            device: where the model computes: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`; torch's own are taken, too.
            dtype: precision of the weights, `float32`, `bfloat16`, or `auto` as they are stored; torch's own are taken,
                too. The byte LM keeps float32, for exact patches.
            revision: a branch, a tag or a commit of the repository.
            token: the key of a user of the hub; HF_TOKEN, or the key of `hf auth login`, if left out.
            local_files_only: take what was downloaded earlier, and do not ask the hub.
            weights: `int8` or `fp8` rounds the large matrices to a byte a number once they are read, for all that is
                done with the model; on a GPU they take less memory then, and less time to generate with.
            ahead: generate up to so many bytes of each text a step: the local models draft all but the first, the whole
                model verifies them, and the text is the same; 1 drafts none.

        Raises:
            UserError: there is no BLT at `source`, it is not whole, or it computes something that is not known here;
                or its weights cannot be rounded so.
        """
        precision, place = precision_of_weights(dtype), choose_device(device)
        check_weights(weights, place)
        check_ahead(ahead)
        found = open_pretrained(source, entropy, revision, token, local_files_only)
        if not isinstance(found.config.model, BLTSettings):
            raise UserError(f"model: '{source}' holds a byte LM, which has no patches; name a BLT")
        if found.config.patching is None:
            raise UserError(f"model: '{source}' names no patching rule; its config.json should have one")
        _tell(found.in_a_line(), *found.warnings)
        loaded = found.load(place, precision)
        assert isinstance(loaded.model, BLTModel)
        lm = loaded.byte_lm.to(torch.float32) if loaded.byte_lm is not None else None
        return cls(loaded.model, loaded.config, lm, loaded.source, weights, ahead)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def weights(self) -> Weights:
        return self._weights

    @property
    def config(self) -> Config:
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        _must_be(Config, "config", config)
        if config.patching is None:
            raise UserError("config: it names no patching rule, which a BLT needs; set config.patching")
        if config.model != self.model.settings:
            raise UserError("config: its `model` says other shapes than the model has; change the model with it")
        is_told = (config.origin, config.calibration) != (self._config.origin, self._config.calibration)
        self._config = config
        if is_told:  # of the model as it is now
            self._measured = Measured.of(self.model, config, self.byte_lm)

    @property
    def model(self) -> BLTModel:
        return self._model

    @model.setter
    def model(self, model: BLTModel) -> None:
        _must_be(BLTModel, "model", model)
        self._model = model.eval()
        self._config = self._config.model_copy(update={"model": model.settings})

    @property
    def byte_lm(self) -> ByteLM | None:
        return self._own_byte_lm

    @byte_lm.setter
    def byte_lm(self, byte_lm: ByteLM | None) -> None:
        if byte_lm is not None:
            _must_be(ByteLM, "byte_lm", byte_lm)
        self._own_byte_lm = byte_lm.eval() if byte_lm is not None else None

    @property
    def patching(self) -> PatchSettings:
        assert self._config.patching is not None
        return self._config.patching

    @patching.setter
    def patching(self, rule: PatchSettings) -> None:
        _must_be(PatchSettings, "patching", rule)
        self._config = self._config.model_copy(update={"patching": rule})

    @property
    def context(self) -> int:
        return self._config.context

    @context.setter
    def context(self, context: int) -> None:
        self._config = self._config.model_copy(update={"context": _checked_context(context)})

    @property
    def ahead(self) -> int:
        return self._ahead

    @ahead.setter
    def ahead(self, ahead: int) -> None:
        check_ahead(ahead)
        self._ahead = ahead

    @property
    def patcher(self) -> Patcher:
        byte_lm = self._byte_lm()
        return Patcher(self.patching, byte_lm, entropies_of=partial(entropies_of, byte_lm) if byte_lm else None)

    def engine(self, num_rows: int = 16) -> Engine:
        """Continuous batching: sequences that join and leave while others go on.

        Args:
            num_rows: sequences on their way at once, 1 or more; others wait.

        Raises:
            UserError: there are no rows.
        """
        return engine_for(self.model, self.patching, self._byte_lm(), num_rows, ahead=self.ahead)

    @overload
    def generate(self, prompt: str | bytes, max_new_bytes: int = ..., samples: None = ..., **sampling: Any) -> str: ...
    @overload
    def generate(
        self, prompt: str | bytes, max_new_bytes: int = ..., samples: int = ..., **sampling: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Sequence[str | bytes], max_new_bytes: int = ..., samples: None = ..., **sampling: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Sequence[str | bytes], max_new_bytes: int = ..., samples: int = ..., **sampling: Any
    ) -> list[list[str]]: ...
    def generate(
        self,
        prompt: str | bytes | Sequence[str | bytes],
        max_new_bytes: int = 200,
        samples: int | None = None,
        **sampling: Any,
    ) -> str | list[str] | list[list[str]]:
        """Continue a text, or several at once; each comes out as if it were alone.

        Args:
            max_new_bytes: where to stop, unless the model ends the text before.
            samples: how many continuations of each prompt, which is read once for them; a list comes back then.
            sampling: `temperature` (0.8; 0 takes the likeliest byte), `top_k`, `top_p`, `min_p`, `repetition_penalty`,
                `seed` (0), `stop` (texts that end it), `valid_utf8`; see `Sampling`.

        Returns:
            What comes after each prompt. Bytes that are no UTF-8 show as U+FFFD.

        Raises:
            UserError: a setting of the sampling will not do, or a prompt is neither str nor bytes.
        """
        rule = Sampling.parse(sampling, where="generate")
        if samples is not None:
            check_samples(samples)
        texts_given = prompt if isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes) else [prompt]
        prompts = [prompt_ids(text) for text in texts_given]
        if samples is not None and samples * len(prompts) > MAX_CONTINUATIONS:
            raise UserError(
                f"samples: {samples:,} of each of {len(prompts):,} prompts; "
                f"a call gives {MAX_CONTINUATIONS:,} texts at most"
            )
        with self._lent_engine(max(min(len(prompts) * (samples or 1), MAX_ROWS), 1)) as engine:
            asked = [engine.submit(ids, rule, max_new_bytes, samples or 1) for ids in prompts]
            engine.run()
        texts = [[continuation.text for continuation in of_prompt] for of_prompt in asked]
        found: list[Any] = texts if samples is not None else [only for [only] in texts]
        return found[0] if isinstance(prompt, str | bytes) else found

    def stream(self, prompt: str | bytes, max_new_bytes: int = 200, **sampling: Any) -> Iterator[str]:
        """Continue a text, piece by piece as it comes, in whole characters; the arguments are those of `generate`."""
        rule = Sampling.parse(sampling, where="stream")
        check_max_new_bytes(max_new_bytes)
        ids = prompt_ids(prompt)
        self._byte_lm()

        def pieces() -> Iterator[str]:  # a function of its own, so that wrong settings are told at once
            with self._lent_engine(1) as engine:
                [asked] = engine.submit(ids, rule, max_new_bytes)
                try:
                    while asked.ended is None:
                        engine.advance()
                        if new := asked.new_text():
                            yield new
                finally:  # nobody may want the rest
                    engine.cancel(asked)

        return pieces()

    def score(self, prompt: str | bytes, continuations: Sequence[str | bytes]) -> list[float]:
        """log P(continuation | prompt) of each, in nats; the prompt is read once for all."""
        if isinstance(continuations, str | bytes) or not isinstance(continuations, Iterable):
            raise UserError("score takes a list of continuations; write [text] for one")
        decoder = Decoder(self.model, self.patching, self._byte_lm())
        texts = [torch.from_numpy(encode(text, bos=False, eos=False)) for text in continuations]
        return log_probabilities(decoder, prompt_ids(prompt), texts)

    def patch(self, text: str | bytes, context: int | None = None) -> list[Patch]:
        """The patches of a text, as `logits`, `generate` and `score` use them.

        Args:
            context: read it in pieces of at most this many ids, each without what precedes it, as training and
                `bits_per_byte` do; None: whole.
        """
        context = None if context is None else _checked_context(context)
        return patches_of(to_bytes(text), self.patcher, context)

    def bits_per_byte(self, text: str | bytes, context: int | None = None) -> float:
        """How many bits a byte of this text costs the model, the document's end included.

        Args:
            context: as of `patch`; None: the model's `context`, which makes it what training and `blt eval` measure.

        Raises:
            UserError: the text is empty.
        """
        data = to_bytes(text)
        if not data:
            raise UserError("bits_per_byte: the text is empty")
        context = self.context if context is None else _checked_context(context)
        ready = deque(patch_in_groups(self.patcher, list(cut(Document(data), context))))
        batches = iter(lambda: take(ready, context, None, lambda: False), [])
        return evaluate(self.model, map(pack, batches)).bits_per_byte

    @torch.no_grad()
    def logits(
        self, ids: str | bytes | Tensor, patch_lengths: Tensor | None = None, context: int | None = None
    ) -> Tensor:
        """The model's logits, for checks and research.

        Args:
            ids: a text, read after BOS; or [B, N], each row a document from its start, padded at its end with -1.
            patch_lengths: [B, P] zero-padded, a row summing to its ids or to one more; None to apply the rule.
            context: as of `patch`.

        Returns:
            float32 [B, N, V]; zero where there is padding.

        Raises:
            UserError: shapes or sums do not fit, or it is neither text nor ids.
        """
        if not isinstance(ids, Tensor):
            ids = prompt_ids(ids)[None]
        if ids.dim() != 2 or (patch_lengths is not None and patch_lengths.shape[:-1] != ids.shape[:1]):
            raise UserError(f"logits takes ids [B, N] and patch_lengths [B, P], not {list(ids.shape)}")
        if not _are_whole(ids) or bool(((ids != PADDING) & ((ids < 0) | (ids >= VOCAB_SIZE))).any()):
            raise UserError(f"logits: ids are whole numbers from 0 to {VOCAB_SIZE - 1}, and {PADDING} for padding")
        if bool((ids[:, :-1].eq(PADDING) & ids[:, 1:].ne(PADDING)).any()):
            raise UserError(f"logits: padding ({PADDING}) stands at the end of a row, not before its ids")
        ids = ids.to(self.device, torch.long)
        out = torch.zeros(*ids.shape, VOCAB_SIZE, device=self.device)
        rows = [row[row != PADDING] for row in ids]
        pieces = rows
        if context is not None:
            pieces = [piece for row in rows for piece in row.split(_checked_context(context))]
        stream = pack_rows(pieces).to(self.device)
        if len(stream.ids) == 0:
            return out
        if patch_lengths is None:
            entropies = None
            if self.patching.needs_entropies and (byte_lm := self._byte_lm()) is not None:
                entropies = entropies_of(byte_lm, stream)
            starts = next_starts(stream.ids, entropies, stream.position, self.patching)
        else:
            if not _are_whole(patch_lengths):
                raise UserError(f"logits: patch_lengths are whole numbers, not {patch_lengths.dtype}")
            pairs = zip(rows, patch_lengths.to(self.device), strict=True)
            starts = torch.cat([_starts_of(lengths, len(row)) for row, lengths in pairs])
        out[ids != PADDING] = self.model(add_patches(stream, starts))
        return out

    def save_pretrained(self, folder: str | Path, format: str = "native", licence: str | None = None) -> None:
        """Write the model, its rule, its byte LM and a card into a folder, which appears whole or not at all.

        Args:
            format: `native`; `hf` loads in transformers' `BltForCausalLM` and `AutoTokenizer`; `meta` is Meta's hub
                format, with the byte LM in `blt-entropy/`.
            licence: to state on the card; None: the one that the model came with.

        What is known of training and measuring is written only of weights and patches that it is known of: after a
        training step the card says no bits per byte any more.

        Raises:
            UserError: the folder holds something else than a saved model, or the format has no room for one of the
                model's settings; its weights are rounded; or they are not those of its settings, such as adapters. The
                folder stays as it was.
        """
        if self.weights != "full":
            raise UserError(
                f"save_pretrained: no format holds weights rounded to {self.weights}; load with weights=full"
            )
        now = Measured.of(self.model, self.config, self.byte_lm)
        config = true_of(self.config, self._measured, now)
        write_model(StoredModel.of(self.model, config, self.byte_lm), Path(folder), format, licence)

    @contextmanager
    def _lent_engine(self, num_rows: int) -> Iterator[Engine]:
        """The engine of the last call, if it will do: on a GPU its step need not be captured anew.

        One caller has it at a time; others, in other threads, have one of their own.
        """
        weights = [*self.model.parameters(), *(self.byte_lm.parameters() if self.byte_lm is not None else [])]
        key = (num_rows, self.ahead, self.patching, [(weight.data_ptr(), weight._version) for weight in weights])
        kept, self._kept_engine = self._kept_engine, None
        engine = kept[1] if kept is not None and kept[0] == key else self.engine(num_rows)
        yield engine
        if engine.is_idle:
            self._kept_engine = (key, engine)

    def _byte_lm(self) -> ByteLM | None:
        if self.patching.needs_entropies and self.byte_lm is None:
            raise UserError("this model's patches need its byte LM; name it: BLT.from_pretrained(..., entropy=FOLDER)")
        return self.byte_lm


def _must_be(kind: type, name: str, value: object) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{name}: it takes a {kind.__name__}, not {type(value).__name__}: {reprlib.repr(value)}")


def _checked_context(context: Any) -> int:
    is_number = isinstance(context, Integral) and not isinstance(context, bool)
    if not is_number or not 1 <= int(context) <= LONGEST_CONTEXT:
        raise UserError(f"context: {reprlib.repr(context)} will not do; ids read at once, 1 to {LONGEST_CONTEXT:,}")
    return int(context)


def _are_whole(values: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _starts_of(lengths: Tensor, num_ids: int) -> Tensor:
    """For each of a row's ids, whether the one after it starts a patch."""
    total = int(lengths.sum())
    if total not in (num_ids, num_ids + 1) or bool((lengths < 0).any()):
        raise UserError(f"patch_lengths sum to {total}; a row of {num_ids} ids needs {num_ids} or {num_ids + 1}")
    ends = lengths[lengths > 0].cumsum(0)
    starts = torch.zeros(num_ids + 2, dtype=torch.bool, device=lengths.device)
    starts[ends] = True
    if total == num_ids:  # nothing is said about the id to come: it does not start a patch yet
        starts[num_ids] = False
    return starts[1 : num_ids + 1]


def _tell(*lines: str) -> None:
    """Say something through the logger `bytelatent`, or on standard error where nobody has set up logging."""
    log = logging.getLogger("bytelatent")
    for line in lines:
        if log.hasHandlers():
            log.info(line)
        elif log.level <= logging.INFO:
            say(line, sys.stderr)
