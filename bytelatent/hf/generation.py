"""`generate` with transformers' arguments: on our engine, or in transformers' loop with our KV caches."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList  # pyright: ignore[reportMissingImports]
from transformers.generation.utils import GenerateDecoderOnlyOutput  # pyright: ignore[reportMissingImports]

from bytelatent.blt import BLT, MAX_BATCH_SIZE
from bytelatent.blt.forward import checked_mask
from bytelatent.errors import UserError
from bytelatent.inference import Decoder, Sampling
from bytelatent.inference.engine import Continuation
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET, VOCAB_SIZE

# Shapes: B rows, N ids of the longest prompt, V vocabulary

SEEDS = 2**62  # of rows
DEFAULT_NEW, DEFAULT_TOP_K = 20, 50  # transformers' own
NO_TEXT = [BOE, BOS, BPE_DELIMITER]  # never generated
BY_ENGINE = {
    *("max_new_tokens", "max_length", "num_return_sequences", "num_beams", "num_beam_groups", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "return_dict_in_generate", "transformers_version"),
}
REFUSED = (
    *("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "constraints"),
    "guidance_scale",  # reads prompts of its own with a second cache
)
REFUSED_ARGUMENTS = ("assistant_model", "custom_generate", "negative_prompt_ids", "inputs_embeds", "past_key_values")


def continue_texts(
    model: Any, inputs: Tensor | None, given: GenerationConfig | None, theirs: Callable[..., Any], **arguments: Any
) -> Any:
    """See `BytelatentForCausalLM.generate`; `theirs` is that of transformers."""
    input_ids = arguments.pop("input_ids", None) if inputs is None else inputs
    input_ids = torch.tensor([[BOS]], device=model.device) if input_ids is None else input_ids
    mask = arguments.pop("attention_mask", None)
    on_host = {name: arguments.pop(name) for name in ("logits_processor", "stopping_criteria") if name in arguments}
    streamer = arguments.pop("streamer", None)
    arguments.pop("position_ids", None)  # padding says where rows begin
    for name in ("tokenizer", "synced_gpus", "prefix_allowed_tokens_fn", *REFUSED_ARGUMENTS):
        if arguments.get(name, "") is None or (name == "synced_gpus" and not arguments.get(name)):
            arguments.pop(name, None)
        elif name in arguments and name in REFUSED_ARGUMENTS:
            raise UserError(f"generate: {name} is not implemented for a BLT; leave it out")
    settings = _settings(model, given, arguments)
    _check(settings, input_ids)
    mask = _mask(input_ids, mask, settings)
    if not bool(mask.any(1).all()):
        raise UserError("input_ids: a row is padding alone; begin it with BOS")
    ends = _as_list(settings.eos_token_id)
    neutral = all(not steps for steps in on_host.values())
    unknown = {name for name in arguments if not hasattr(settings, name)}
    if not neutral or unknown or EOS not in ends or _asks_for_more(settings):
        found = _in_their_loop(model, input_ids, mask, given, streamer, theirs, on_host, arguments)
        return _with_states(model, found, mask, settings, ends)
    if settings.max_new_tokens is None:
        most = settings.max_length
        if most is None or (most == DEFAULT_NEW and "max_length" not in arguments):  # version 4 writes its default out
            most = input_ids.shape[1] + DEFAULT_NEW
        settings.max_new_tokens = most - input_ids.shape[1]
        if settings.max_new_tokens < 1:
            found = f"max_length: {most} leaves no room after {input_ids.shape[1]} ids"
            raise UserError(f"{found}; set max_new_tokens")
    return _on_engine(model.blt, input_ids, mask, settings, ends, streamer)


def _settings(model: Any, given: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
    """The settings of a call: its arguments, then `given`, then the model's own."""
    settings = copy.deepcopy(model.generation_config if given is None else given)
    if given is not None:
        for name, value in model.generation_config.to_dict().items():
            if getattr(settings, name, None) is None and value is not None:
                setattr(settings, name, value)
    settings.update(**arguments)
    return settings


def _check(settings: GenerationConfig, input_ids: Tensor) -> None:
    if (settings.num_beams or 1) > 1:
        way_out = "sample with do_sample=True and num_return_sequences, or leave it out"
        raise UserError(f"num_beams: {settings.num_beams}; beam search is not implemented for a BLT; {way_out}")
    for name in REFUSED:
        if getattr(settings, name, None) is not None:
            raise UserError(f"{name}: it is not implemented for a BLT; leave it out")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise UserError(f"input_ids: ids [B, N], not {input_ids.dtype} {list(input_ids.shape)}")
    if bool(((input_ids < 0) | (input_ids >= VOCAB_SIZE)).any()):
        raise UserError(f"input_ids: ids are whole numbers from 0 to {VOCAB_SIZE - 1}; mask padding")


def _mask(input_ids: Tensor, mask: Tensor | None, settings: GenerationConfig) -> Tensor:
    """Which ids of the prompts count, bool [B, N]. Without a mask, PAD at either end of a row does not."""
    if mask is None:
        is_text = input_ids != settings.pad_token_id if settings.pad_token_id == BOE else input_ids >= 0
        return is_text.long().cummax(1).values.bool() & is_text.long().flip(1).cummax(1).values.flip(1).bool()
    return checked_mask("generate", mask, input_ids.shape)


def _asks_for_more(settings: GenerationConfig) -> bool:
    """Whether a setting asks for something that the engine does not do."""
    plain = GenerationConfig()
    defaults = plain.to_dict()
    if hasattr(plain, "_get_default_generation_params"):  # version 5 writes None for what is not set
        defaults |= plain._get_default_generation_params()
    others = {name: value for name, value in settings.to_dict().items() if name not in BY_ENGINE and name[0] != "_"}
    return any(
        value is not None and value != defaults.get(name) and (value is True or value not in (0, [], {}))
        for name, value in others.items()
    )


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _sampling(settings: GenerationConfig, ends: list[int]) -> Sampling:
    values: dict[str, Any] = {"temperature": 0.0}
    if settings.do_sample:
        temperature = 1.0 if settings.temperature is None else settings.temperature
        values = {
            "temperature": temperature,
            "top_k": (DEFAULT_TOP_K if settings.top_k is None else settings.top_k) or None,
        }
        values |= {"top_p": settings.top_p, "min_p": settings.min_p}
    penalty = settings.repetition_penalty
    values["repetition_penalty"] = 1.0 if penalty is None else penalty
    values["stop"] = [bytes([id_ - OFFSET]) for id_ in ends if id_ >= OFFSET]
    return Sampling.parse(values, where="generate")


def _on_engine(
    blt: BLT, input_ids: Tensor, mask: Tensor, settings: GenerationConfig, ends: list[int], streamer: Any
) -> Any:
    sampling, samples = _sampling(settings, ends), settings.num_return_sequences or 1
    seeds = torch.randint(SEEDS, (len(input_ids),)).tolist() if settings.do_sample else [0] * len(input_ids)
    rows = [row[counts] for row, counts in zip(input_ids, mask, strict=True)]
    shown = input_ids.repeat_interleave(samples, 0)
    if streamer is not None:
        streamer.put(shown.cpu())
    with blt._borrowed_engine(min(len(rows) * samples, MAX_BATCH_SIZE)) as engine:
        continuations: list[Continuation] = []
        for row, seed in zip(rows, seeds, strict=True):
            drawing = sampling.model_copy(update={"seed": seed})
            continuations += engine.submit(row, drawing, settings.max_new_tokens, samples)
        num_shown = 0
        while not engine.is_idle:
            engine.advance()
            if streamer is not None:
                num_shown = _stream(continuations, streamer, num_shown, settings)
    if streamer is not None:
        streamer.end()
    longest = max(len(found.ids) for found in continuations)
    pad = _padding(settings)
    new = torch.tensor([found.ids + [pad] * (longest - len(found.ids)) for found in continuations])
    sequences: Any = torch.cat([shown, new.to(shown.device)], 1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if settings.return_dict_in_generate else sequences


def _padding(settings: GenerationConfig) -> int:
    return BOE if settings.pad_token_id is None else int(settings.pad_token_id)


def _stream(found: list[Continuation], streamer: Any, num_shown: int, settings: GenerationConfig) -> int:
    """Give a streamer the ids [B] of each place that all rows have reached; how many places these are in all."""
    longest = max(len(one.ids) for one in found)
    while num_shown < longest and all(len(one.ids) > num_shown or one.ended for one in found):
        ids = [one.ids[num_shown] if len(one.ids) > num_shown else _padding(settings) for one in found]
        streamer.put(torch.tensor(ids))
        num_shown += 1
    return num_shown


class HostDecoding:
    """The KV caches of rows that transformers' loop continues.

    Args:
        decoder: reads their prompts and what follows.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._state: Any = None
        self._num_read = 0  # columns

    def next_logits(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The logits of what follows each row, [B, 1, V]; only new columns are read.

        Args:
            input_ids: [B, N], those before included.
            mask: [B, N] or less, 0 at padding; None: no padding.
        """
        ids = input_ids.to(self.decoder.device)
        if self._state is None:
            counts = torch.ones_like(ids) if mask is None else mask.to(ids.device)
            rows = [row[is_text.bool()] for row, is_text in zip(ids, counts, strict=True)]
            self._state, logits = self.decoder.prefill(rows, last_only=True)
        else:
            new = ids[:, self._num_read :]
            slots = torch.arange(len(ids), device=ids.device).repeat_interleave(new.shape[1])
            logits = self.decoder.extend(self._state, slots, new.flatten(), last_only=True)
        self._num_read = ids.shape[1]
        return logits[:, None]


class OnlyText(LogitsProcessor):
    """Rules out the special ids that are no end, as the engine does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor(NO_TEXT, device=scores.device), -torch.inf)


def _in_their_loop(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    given: GenerationConfig | None,
    streamer: Any,
    theirs: Callable[..., Any],
    on_host: dict[str, Any],
    arguments: dict[str, Any],
) -> Any:
    blt = model.blt
    decoding = HostDecoding(Decoder(blt.model, blt.patching, blt.entropy_model, blt.kv_cache))
    processors = LogitsProcessorList([OnlyText(), *(on_host.get("logits_processor") or [])])
    return theirs(
        input_ids,
        generation_config=given,
        attention_mask=mask.long(),
        logits_processor=processors,
        stopping_criteria=on_host.get("stopping_criteria"),
        streamer=streamer,
        host_decoding=decoding,
        **arguments,
    )


@torch.no_grad()
def _with_states(model: Any, found: Any, mask: Tensor, settings: GenerationConfig, ends: list[int]) -> Any:
    """What transformers' loop gives, with the decoder's states and weights of each step where they are asked for.

    KV caches hold no states, so the texts are read once more. First come those of the prompt, then those of each new
    id that was read.
    """
    asked = {name: bool(getattr(settings, name, None)) for name in ("output_hidden_states", "output_attentions")}
    if not settings.return_dict_in_generate or not any(asked.values()):
        return found
    size, ids = mask.shape[1], found.sequences[:, :-1]
    new = found.sequences[:, size:]
    is_end = torch.isin(new, torch.tensor(ends, dtype=torch.long, device=new.device)).long()
    is_text = (is_end.cumsum(1) == is_end) & (new != BOE)  # an end itself is text
    is_text = torch.cat([mask.repeat_interleave(len(ids) // len(mask), 0), is_text[:, :-1]], 1)
    # Padding goes to the left, also that between a prompt and what follows.
    order = torch.argsort(is_text.long(), dim=1, stable=True)
    out = model._out(ids.gather(1, order), is_text.gather(1, order), **asked)
    place, row = order.argsort(1), torch.arange(len(ids), device=ids.device)[:, None]
    steps = [slice(0, size), *(slice(at, at + 1) for at in range(size, ids.shape[1]))]
    if asked["output_hidden_states"]:
        states = [h_BND[row, place] for h_BND in out.hidden_states.decoder]
        found.hidden_states = tuple(tuple(h_BND[:, step] for h_BND in states) for step in steps)
    if asked["output_attentions"]:
        pair = row[..., None], place[:, :, None], place[:, None, :]
        weights = [w_BHNN.permute(0, 2, 3, 1)[pair].permute(0, 3, 1, 2) for w_BHNN in out.attentions.decoder]
        found.attentions = tuple(tuple(w_BHNN[:, :, step, : step.stop] for w_BHNN in weights) for step in steps)
    return found
