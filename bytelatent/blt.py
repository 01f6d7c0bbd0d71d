"""The public class: a BLT with its patching settings and its entropy model."""

import logging
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from bytelatent.config import renamed_arguments, renamed_attribute
from bytelatent.data import Patcher, patches_of
from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.evaluation import PackedModel
from bytelatent.inference import Decoder, Engine, Sampling, log_probabilities, prompt_ids
from bytelatent.inference.quantize import check_quantize, quantize_model
from bytelatent.inference.scoring import entropies_of
from bytelatent.inference.settings import LIMITS, Quantization, check_limits
from bytelatent.inference.step import engine_for
from bytelatent.model import BLTModel, BLTSettings, ByteLM, add_patches, lines_as_documents, pack_rows
from bytelatent.model.loss import bits_per_byte
from bytelatent.model.settings import NAMES
from bytelatent.patching import Patch, PatchSettings, next_starts, starts_of_lengths
from bytelatent.text import Document
from bytelatent.vocab import PADDING, VOCAB_SIZE, encode, to_bytes
from bytelatent.weights import Config, ModelChecksums, StoredModel, drop_outdated, open_pretrained, write_model

LOGGER = logging.getLogger(__name__)

# Shapes: B batch size, N ids in a row, P patches, V vocabulary

Text = str | bytes
Texts = Sequence[Text]

MAX_BATCH_SIZE = 64  # sequences that `generate` decodes at once; further ones wait
MAX_CONTINUATIONS = 1_000_000  # of all prompts of a call with `samples`


class BLT:
    """A Byte Latent Transformer with its patching settings and its entropy model.

        model = BLT.from_pretrained("runs/demo")
        model.generate("The history of", max_new_bytes=200)

    All attributes but `quantize` and `device` can be set; every method then uses the new value, and it is saved.

    Attributes:
        config: all of `config.json`; `patching` and `context` are two of its values.
        model: the network.
        patching: the patching settings.
        entropy_model: the byte LM for the entropies; None if the patching mode needs none.
        context: context of the training, in ids; `bits_per_byte` splits longer texts into pieces of this size.
        quantize: `int8` or `fp8` if the network's large matrices are quantized, else `full`.
        draft_length: speculative decoding: bytes per decode step at most; 1: no drafts.
    """

    @renamed_arguments(byte_lm="entropy_model", weights="quantize", ahead="draft_length")
    def __init__(
        self,
        model: BLTModel,
        config: Config,
        entropy_model: ByteLM | None,
        source: str = "",
        quantize: Quantization = "full",
        draft_length: int = 1,
    ):
        self._quantize: Quantization = quantize
        self._model = quantize_model(model, quantize).eval()
        self.entropy_model = entropy_model
        self._config = config
        self._measured = ModelChecksums.of(self.model, config, self.entropy_model)
        self.draft_length = draft_length
        self.source = source
        self._idle_engine: tuple[Any, Engine] | None = None

    @classmethod
    @renamed_arguments(entropy="entropy_model", weights="quantize", ahead="draft_length")
    def from_pretrained(
        cls,
        source: str | Path,
        entropy_model: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        quantize: Quantization = "full",
        draft_length: int = 1,
        patching: PatchSettings | None = None,
    ) -> "BLT":
        """Load a model, and log in one line what was found.

        Args:
            source: a run; a folder, or OWNER/NAME on the Hugging Face hub, in our format, Meta's or transformers'.
            entropy_model: where the byte LM is, if it is neither in `source` nor next to it.
            device: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or a torch.device.
            dtype: precision of the weights: `float32`, `bfloat16`, `auto` (as stored), or a torch.dtype. The entropy
                model keeps float32, for exact patches.
            revision: a branch, a tag or a commit of the repository.
            token: a user's key for the hub; default: HF_TOKEN, or the key of `hf auth login`.
            local_files_only: use earlier downloads, and do not connect to the hub.
            quantize: `int8` or `fp8` quantizes the large matrices: less memory, and faster generation on a GPU.
            draft_length: speculative decoding: bytes per step at most. The text stays the same; 1: no drafts.
            patching: patching settings in place of the model's own, such as another threshold.

        Raises:
            UserError: there is no BLT at `source`, it is incomplete or not supported, or cannot be quantized this way.
        """
        precision, device = precision_of_weights(dtype), choose_device(device)
        check_quantize(quantize, device)
        check_limits(draft_length=draft_length)
        found = open_pretrained(source, entropy_model, revision, token, local_files_only)
        if not isinstance(found.config.model, BLTSettings):
            name = NAMES[found.config.model.kind]
            raise UserError(
                f"model: '{source}' holds a {name}, which has no patches; name a BLT, or load it with "
                "bytelatent.weights.load"
            )
        if found.config.patching is None:
            raise UserError(f"model: '{source}' has no patching settings; its config.json should have them")
        LOGGER.info(found.in_a_line())
        for line in found.warnings:
            LOGGER.warning(line)
        loaded = found.load(device, precision)
        assert isinstance(loaded.model, BLTModel)
        lm = loaded.byte_lm.to(torch.float32) if loaded.byte_lm is not None else None
        blt = cls(loaded.model, loaded.config, lm, loaded.source, quantize, draft_length)
        blt.patching = blt.patching if patching is None else patching
        return blt

    byte_lm = renamed_attribute("byte_lm", "entropy_model")
    ahead = renamed_attribute("ahead", "draft_length")
    weights = renamed_attribute("weights", "quantize")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def quantize(self) -> Quantization:
        return self._quantize

    @property
    def config(self) -> Config:
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        _check_type(Config, "config", config)
        if config.patching is None:
            raise UserError("config: it has no patching settings, which a BLT needs; set config.patching")
        if config.model != self.model.settings:
            raise UserError("config: its `model` has other shapes than the model; change the model with it")
        is_new = (config.origin, config.calibration) != (self._config.origin, self._config.calibration)
        self._config = config
        if is_new:  # new measurements belong to the model as it is now
            self._measured = ModelChecksums.of(self.model, config, self.entropy_model)

    @property
    def model(self) -> BLTModel:
        return self._model

    @model.setter
    def model(self, model: BLTModel) -> None:
        _check_type(BLTModel, "model", model)
        self._model = model.eval()
        self._config = self._config.model_copy(update={"model": model.settings})

    @property
    def entropy_model(self) -> ByteLM | None:
        return self._entropy_model

    @entropy_model.setter
    def entropy_model(self, entropy_model: ByteLM | None) -> None:
        if entropy_model is not None:
            _check_type(ByteLM, "entropy_model", entropy_model)
        self._entropy_model = entropy_model.eval() if entropy_model is not None else None

    @property
    def patching(self) -> PatchSettings:
        assert self._config.patching is not None
        return self._config.patching

    @patching.setter
    def patching(self, patching: PatchSettings) -> None:
        _check_type(PatchSettings, "patching", patching)
        self._config = self._config.model_copy(update={"patching": patching})

    @property
    def context(self) -> int:
        return self._config.context

    @context.setter
    def context(self, context: int) -> None:
        self._config = self._config.model_copy(update={"context": _checked_context(context)})

    @property
    def draft_length(self) -> int:
        return self._draft_length

    @draft_length.setter
    def draft_length(self, draft_length: int) -> None:
        check_limits(draft_length=draft_length)
        self._draft_length = draft_length

    @property
    def patcher(self) -> Patcher:
        byte_lm = self._needed_entropy_model()
        return Patcher(self.patching, byte_lm, entropies_of=partial(entropies_of, byte_lm) if byte_lm else None)

    @renamed_arguments(num_rows="batch_size")
    def engine(self, batch_size: int = 16) -> Engine:
        """Continuous batching: up to `batch_size` sequences are decoded at once, and join and leave at any time."""
        return engine_for(
            self.model, self.patching, self._needed_entropy_model(), batch_size, draft_length=self.draft_length
        )

    @overload
    def generate(self, prompt: Text, max_new_bytes: int = ..., samples: None = ..., **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Text, max_new_bytes: int = ..., samples: int = ..., **sampling: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Texts, max_new_bytes: int = ..., samples: None = ..., **sampling: Any) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Texts, max_new_bytes: int = ..., samples: int = ..., **sampling: Any
    ) -> list[list[str]]: ...
    def generate(
        self, prompt: Text | Texts, max_new_bytes: int = 200, samples: int | None = None, **sampling: Any
    ) -> str | list[str] | list[list[str]]:
        """Continue a text, or several at once; each result is the same as for the text alone.

        Args:
            max_new_bytes: largest number of new bytes; the model may end the text earlier.
            samples: number of continuations of each prompt; the result then is a list for each prompt.
            sampling: fields of `Sampling`, such as `temperature` (0.8; 0 takes the most likely byte), `top_p`, `seed`
                (0) and `stop` (texts that end it).

        Returns:
            The continuation of each prompt, with U+FFFD for bytes that are not UTF-8.

        Raises:
            UserError: a sampling setting is not valid, or a prompt is neither str nor bytes.
        """
        settings = Sampling.parse(sampling, where="generate")
        num_samples = 1 if samples is None else samples
        check_limits(samples=num_samples)
        texts_given = prompt if isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes) else [prompt]
        prompts = [prompt_ids(text) for text in texts_given]
        if num_samples * len(prompts) > MAX_CONTINUATIONS:
            asked = f"{num_samples:,} of each of {len(prompts):,} prompts"
            raise UserError(f"samples: {asked}; a call gives at most {MAX_CONTINUATIONS:,} texts")
        with self._borrowed_engine(max(min(len(prompts) * num_samples, MAX_BATCH_SIZE), 1)) as engine:
            requests = [engine.submit(ids, settings, max_new_bytes, num_samples) for ids in prompts]
            engine.run()
        texts = [[continuation.text for continuation in continuations] for continuations in requests]
        found: list[Any] = texts if samples is not None else [only for [only] in texts]
        return found[0] if isinstance(prompt, str | bytes) else found

    def stream(self, prompt: Text, max_new_bytes: int = 200, **sampling: Any) -> Iterator[str]:
        """Continue a text piece by piece, in whole characters; the arguments are those of `generate`."""
        settings = Sampling.parse(sampling, where="stream")
        check_limits(max_new_bytes=max_new_bytes)
        ids = prompt_ids(prompt)
        self._needed_entropy_model()

        def pieces() -> Iterator[str]:  # a separate function, so that `stream` itself raises errors at once
            with self._borrowed_engine(1) as engine:
                [continuation] = engine.submit(ids, settings, max_new_bytes)
                try:
                    while continuation.ended is None:
                        engine.advance()
                        if new := continuation.new_text():
                            yield new
                finally:  # the caller may stop early
                    engine.cancel(continuation)

        return pieces()

    def score(self, prompt: Text, continuations: Sequence[Text]) -> list[float]:
        """log P(continuation | prompt) of each continuation, in nats; the prompt is read only once."""
        if isinstance(continuations, str | bytes) or not isinstance(continuations, Iterable):
            raise UserError("score takes a list of continuations; write [text] for one")
        decoder = Decoder(self.model, self.patching, self._needed_entropy_model())
        texts = [torch.from_numpy(encode(text, bos=False, eos=False)) for text in continuations]
        return log_probabilities(decoder, prompt_ids(prompt), texts)

    def patch(self, text: Text, context: int | None = None) -> list[Patch]:
        """The patches of a text, as `logits`, `generate` and `score` use them.

        Args:
            context: split the text into pieces of at most this many ids and read each on its own, as training and
                `bits_per_byte` do; None: read it whole.
        """
        return patches_of(to_bytes(text), self.patcher, None if context is None else _checked_context(context))

    def bits_per_byte(self, text: Text, context: int | None = None) -> float:
        """Cross-entropy of the text and its end, in bits per byte.

        Args:
            context: as in `patch`; None: the model's `context`, as in training and `blt eval`.

        Raises:
            UserError: the text is empty.
        """
        data = to_bytes(text)
        if not data:
            raise UserError("bits_per_byte: the text is empty")
        context = self.context if context is None else _checked_context(context)
        reader = PackedModel(self.source, self.model, self.device, context, patcher=self.patcher)
        [cost] = reader.costs([Document(data)])
        return bits_per_byte(cost.nats, cost.num_bytes)

    @torch.no_grad()
    def logits(self, ids: Text | Tensor, patch_lengths: Tensor | None = None, context: int | None = None) -> Tensor:
        """The model's logits, for checks and research.

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
        if ids.dim() != 2 or (patch_lengths is not None and patch_lengths.shape[:-1] != ids.shape[:1]):
            raise UserError(f"logits takes ids [B, N] and patch_lengths [B, P], not {list(ids.shape)}")
        is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if not is_integer or bool(((ids != PADDING) & ((ids < 0) | (ids >= VOCAB_SIZE))).any()):
            raise UserError(f"logits: ids are whole numbers from 0 to {VOCAB_SIZE - 1}, and {PADDING} for padding")
        if bool((ids[:, :-1].eq(PADDING) & ids[:, 1:].ne(PADDING)).any()):
            raise UserError(f"logits: padding ({PADDING}) belongs at the end of a row, not before its ids")
        ids = ids.to(self.device, torch.long)
        out = torch.zeros(*ids.shape, VOCAB_SIZE, device=self.device)
        rows = [row[row != PADDING] for row in ids]
        size = LIMITS["context"] if context is None else _checked_context(context)
        pieces = [piece for row in rows for piece in row.split(size)]
        stream = pack_rows(pieces).to(self.device)
        if len(stream.ids) == 0:
            return out
        if patch_lengths is None:
            byte_lm = self._needed_entropy_model()
            read = lines_as_documents(stream) if self.patching.reset_at_newline else stream
            entropies = None if byte_lm is None else entropies_of(byte_lm, read)
            starts = next_starts(stream.ids, entropies, stream.position, self.patching)
        else:
            pairs = zip(rows, patch_lengths.to(self.device), strict=True)
            starts = torch.cat([starts_of_lengths(lengths, len(row)) for row, lengths in pairs])
        out[ids != PADDING] = self.model(add_patches(stream, starts))
        return out

    def save_pretrained(self, folder: str | Path, format: str = "native", licence: str | None = None) -> None:
        """Write the model, its entropy model, settings and card into a folder, which appears complete or not at all.

        If weights or patches have changed, the card states no results of training and measuring.

        Args:
            format: `native`; `hf` loads in transformers' `BltForCausalLM` and `AutoTokenizer`; `meta` is Meta's hub
                format, with the byte LM in `blt-entropy/`.
            licence: the licence on the card; None: the one that the model came with.

        Raises:
            UserError: the folder holds something else than a saved model, the format cannot express a setting, the
                weights are quantized, or tensors do not fit the settings, as with adapters. The folder stays as it was.
        """
        if self.quantize != "full":
            found = f"weights quantized to {self.quantize}"
            raise UserError(f"save_pretrained: no format holds {found}; load without quantize=")
        now = ModelChecksums.of(self.model, self.config, self.entropy_model)
        config = drop_outdated(self.config, self._measured, now)
        write_model(StoredModel.of(self.model, config, self.entropy_model), Path(folder), format, licence)

    @contextmanager
    def _borrowed_engine(self, batch_size: int) -> Iterator[Engine]:
        """The engine of the last call if it fits and no other thread has it: its captured step can be reused."""
        parts = [self.model, *([self.entropy_model] if self.entropy_model is not None else [])]
        weights = [(weight.data_ptr(), weight._version) for part in parts for weight in part.parameters()]
        key = (batch_size, self.draft_length, self.patching, weights)
        idle, self._idle_engine = self._idle_engine, None
        engine = idle[1] if idle is not None and idle[0] == key else self.engine(batch_size)
        yield engine
        if engine.is_idle:
            self._idle_engine = (key, engine)

    def _needed_entropy_model(self) -> ByteLM | None:
        if not self.patching.needs_entropies:
            return None
        if self.entropy_model is None:
            way_out = "name it: BLT.from_pretrained(..., entropy_model=FOLDER)"
            raise UserError(f"this model's patches need its entropy model; {way_out}")
        return self.entropy_model


def _check_type(kind: type, name: str, value: object) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{name}: it takes a {kind.__name__}, not {type(value).__name__}: {reprlib.repr(value)}")


def _checked_context(context: Any) -> int:
    check_limits(context=context)
    return int(context)
