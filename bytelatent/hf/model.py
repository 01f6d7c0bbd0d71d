"""A BLT as a model of transformers."""

import copy
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput  # pyright: ignore[reportMissingImports]

from bytelatent.blt import BLT
from bytelatent.blt.forward import checked_labels
from bytelatent.errors import UserError, nearest
from bytelatent.files import MANIFEST, digests
from bytelatent.hf.config import BytelatentConfig, found_by, is_unknown, one_device
from bytelatent.hf.generation import HostDecoding, continue_texts
from bytelatent.hf.packing import PackedTexts
from bytelatent.inference.settings import REMOVED
from bytelatent.model import Block, BLTModel, BLTSettings, ByteLM, ByteLMSettings, CrossAttention
from bytelatent.model.loss import IGNORED
from bytelatent.packaged import packaged_folder
from bytelatent.patching import PatchSettings
from bytelatent.training.distributed.parallelize import checkpointed
from bytelatent.vocab import BOE, BOS, EOS, PADDING
from bytelatent.weights import StoredModel, StoredTensor, write_model

# Shapes: B batch size, N ids in a row, V vocabulary

PREFIX = "model."  # of the network's weights
BLT_ARGUMENTS = ("quantize", "kv_cache")  # of `BLT.from_pretrained`, beside those that find a model

NOT_TAKEN = {  # arguments of other models' forward pass, and why a BLT has them not
    "inputs_embeds": "patches and n-grams are found from ids; give input_ids",
    "past_key_values": "a BLT has KV caches of its own; use generate, or blt.engine",
}


class BytelatentForCausalLM(PreTrainedModel, GenerationMixin):
    """A BLT for everything that takes a causal language model of transformers.

        model = BytelatentForCausalLM.from_pretrained("runs/demo", device_map="auto")

    The network is `model`, whose weights are the model's: what trains, shards or adapts a model finds nothing else. The
    entropy model, which only says where patches start, is `blt.entropy_model`: frozen, in float32, and on the same
    device.

    Attributes:
        blt: the `BLT`, for all that it can do, such as `blt.patch(text)` and `blt.save_pretrained(folder, "hf")`.
    """

    config_class = BytelatentConfig
    base_model_prefix = "byte_states"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Block", "CrossAttention"]  # noqa: RUF012  # as transformers has it
    accepts_loss_kwargs = True

    def __init__(self, config: BytelatentConfig, blt: BLT | None = None):
        super().__init__(config)
        blt = new_blt(config) if blt is None else blt
        self.model = blt.model
        if blt.entropy_model is not None:
            blt.entropy_model.requires_grad_(False)
        # Not `self.blt = ...`: its parts would be parts of this module a second time, and the entropy model one.
        object.__setattr__(self, "_blt", blt)
        self.post_init()
        self.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=BOE)
        self.register_load_state_dict_pre_hook(_from_our_names)

    @property
    def blt(self) -> BLT:
        return cast(BLT, vars(self)["_blt"])

    def init_weights(self) -> None:
        """Nothing: the network draws its weights when it is made."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def from_pretrained(cls, source: str | Path, *_: Any, config: Any = None, **more: Any) -> Any:
        """Load any model that `BLT.from_pretrained` takes.

        Args:
            source: a run; a folder, or OWNER/NAME on the hub, in our format, Meta's or transformers'; or a folder that
                `save_pretrained` wrote.
            config: as `BytelatentConfig.from_pretrained` gives it, perhaps with other `patching` or `context`.
            more: `entropy_model`, `dtype` (float32; `auto`: as stored), `revision`, `token`, `local_files_only`,
                `quantize` and `kv_cache` as there; `device_map`: one device, or `auto`.

        Raises:
            UserError: as `BLT.from_pretrained`, or an argument is not known or cannot be honoured.
        """
        if source is None:
            raise UserError("from_pretrained: None; name a model, or make a new one with from_config")
        finding = found_by(source, more)
        if not isinstance(config, BytelatentConfig):
            named = {name: more.pop(name) for name in ("patching", "context") if name in more}
            config = BytelatentConfig.from_pretrained(source, **copy.copy(finding), **named)
        dtype = more.pop("dtype", None) or more.pop("torch_dtype", None) or "float32"
        more.pop("torch_dtype", None)
        device = one_device(more.pop("device_map", None))
        wants_report = more.pop("output_loading_info", False)
        own = {name: more.pop(name) for name in (*BLT_ARGUMENTS, *REMOVED) if name in more}
        if unknown := [name for name, value in more.items() if is_unknown(name, value)]:
            known = [*BLT_ARGUMENTS, "entropy_model", "dtype", "device_map", "patching", "context"]
            why = f"'{unknown[0]}' is not known here{nearest(unknown[0], known)}"
            raise UserError(f"from_pretrained: {why}; it takes {', '.join(known)}")
        patching = PatchSettings.parse(config.patching, "patching")
        with torch.device("cpu"):  # also where a caller makes tensors on `meta`, as for models of transformers
            blt = BLT.from_pretrained(source, **finding, device=device, dtype=dtype, patching=patching, **own)
        blt.context = config.context
        config.dtype = next(blt.model.parameters()).dtype
        config.name_or_path = str(source)
        model = cls(config, blt)
        hub = {name: value for name, value in finding.items() if name != "entropy_model"}
        with suppress(OSError):  # no file
            model.generation_config = GenerationConfig.from_pretrained(packaged_folder(source) or source, **hub)
        model.eval()
        report = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, report) if wants_report else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **more: Any,
    ) -> None:
        """Write a folder that `AutoModelForCausalLM` and `BLT.from_pretrained` load; other files there stay.

        Args:
            is_main_process: False writes nothing.
            state_dict: the network's weights, where this process holds only a part of them.
            push_to_hub: upload it, as transformers does, with `repo_id` and the rest in `more`.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise UserError(f"save_pretrained: '{folder}' is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{os.getpid()}.part"
        try:
            self._write(aside, state_dict)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == MANIFEST):  # that last
                target = folder / file.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(file, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if push_to_hub:
            name = more.pop("repo_id", folder.name)
            self.push_to_hub(name, **more)

    def _write(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write the model into a new folder, and what only transformers reads."""
        if state_dict is None:
            self.blt.save_pretrained(folder)
        else:
            weights = {name.removeprefix(PREFIX): StoredTensor.of(value) for name, value in state_dict.items()}
            stored = StoredModel.of(self.model, self.blt.config, self.blt.entropy_model, self.blt.chat_template)
            write_model(replace(stored, tensors=weights), folder, "native")
        config = copy.deepcopy(self.config)
        for name, value in json.loads((folder / "config.json").read_text(encoding="utf-8")).items():
            setattr(config, name, value)  # what measurements still hold
        config.architectures = [type(self).__name__]
        config.dtype = self.dtype
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_text(json.dumps({"files": digests(folder)}, indent=1), encoding="utf-8")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        host_decoding: HostDecoding | None = None,
        **more: Any,
    ) -> Any:
        """The logits of the id that follows each id, and the loss.

        Args:
            input_ids: [B, N], each row from the start of a text, BOS first; padded on either side.
            attention_mask: [B, N], 0 at padding.
            labels: [B, N] as `input_ids`, and -100 where nothing is to be learned; they are shifted here. Those
                of padding do not count; where none counts, the loss is 0.
            patch_lengths: [B, P] as `BLT.forward` takes them.
            position_ids: [B, N], where rows hold several texts end to end: 0 begins one. Each is as if it were alone.
            output_hidden_states: also return the states of the decoder's layers; `blt` itself gives those of all parts.
            output_attentions: likewise the decoder's attention weights. None of either: as the configuration says.
            logits_to_keep: return logits of this many ids at the end of rows, or of these columns; 0: all.
            more: `num_items_in_batch` divides the summed loss, as transformers' trainer wants it.

        Raises:
            UserError: `inputs_embeds` were given, or what `BLT.forward` refuses.
        """
        if host_decoding is not None and input_ids is not None:
            return CausalLMOutput(logits=host_decoding.next_logits(input_ids, attention_mask))
        of_config = self.config
        wants_states = of_config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_weights = of_config.output_attentions if output_attentions is None else output_attentions
        asked = {"output_hidden_states": wants_states, "output_attentions": wants_weights}
        given = {name: more.pop(name) for name in NOT_TAKEN if name in more}
        out = self._out(input_ids, attention_mask, position_ids, patch_lengths=patch_lengths, **asked, **given)
        loss = None
        if labels is not None:
            assert input_ids is not None
            is_text = input_ids != PADDING if attention_mask is None else attention_mask != 0
            is_text = is_text.to(out.logits.device)
            labels = checked_labels(labels, is_text)
            # Nothing predicts what follows padding.
            labels = labels.masked_fill(F.pad(~is_text[:, :-1], (1, 0)), IGNORED)
            if position_ids is not None:  # nor what begins a text
                labels = labels.masked_fill(position_ids.to(labels.device) == 0, IGNORED)
            if more.get("num_items_in_batch") is None:  # 1 at least: the loss is 0 where no label counts
                more["num_items_in_batch"] = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
            loss = self.loss_function(out.logits, labels, self.config.vocab_size, **more)
        states = out.hidden_states.decoder if wants_states else None
        weights = out.attentions.decoder if wants_weights else None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = out.logits if isinstance(kept, int) else out.logits[:, kept]
        found = CausalLMOutput(loss=loss, logits=logits, hidden_states=states, attentions=weights)
        return found if (of_config.return_dict if return_dict is None else return_dict) else found.to_tuple()

    def _out(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **more: Any,
    ) -> Any:
        """What `BLT.forward` gives."""
        for name, why in NOT_TAKEN.items():
            if more.get(name) is not None:
                raise UserError(f"{name}: {why}")
        if input_ids is None:
            raise UserError("input_ids: missing; give ids [B, N], BOS first")
        wanted = {"output_hidden_states": bool(output_hidden_states), "output_attentions": bool(output_attentions)}
        if position_ids is None:
            return self.blt(input_ids, attention_mask=attention_mask, patch_lengths=patch_lengths, **wanted)
        if patch_lengths is not None or output_attentions:
            raise UserError("position_ids: not together with patch_lengths or output_attentions; give a text per row")
        packed = PackedTexts.of(position_ids, attention_mask, input_ids.shape)
        out = self.blt(packed.rows(input_ids), **wanted)
        states = None
        if out.hidden_states is not None:
            states = SimpleNamespace(decoder=tuple(packed.packed(h_RLD) for h_RLD in out.hidden_states.decoder))
        return SimpleNamespace(logits=packed.packed(out.logits), hidden_states=states)

    def byte_states(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any
    ) -> BaseModelOutput:
        """The normalized states of the decoder's last layer, [B, N, D], as `last_hidden_state`.

        The arguments are those of `forward`. `get_output_embeddings()` makes logits of them, as trainers do that
        compute a loss from the states; those find this function as `base_model`.
        """
        more.pop("labels", None)
        out = self._out(input_ids, attention_mask, **{**more, "output_hidden_states": True})
        return BaseModelOutput(last_hidden_state=self.model.decoder.norm(out.hidden_states.decoder[-1]))

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
        """Continue texts, each as if it were alone: `BLT.generate` with transformers' arguments.

        Greedy decoding and sampling by `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`, with any
        `eos_token_id`, `num_return_sequences` and a streamer, run on `BLT.engine`. Everything else that changes a step
        (logits processors, stopping criteria, scores, `min_new_tokens`, ...) runs in transformers' own loop on the
        host, with the same KV caches: slower, with the same text. Prompts may be padded on either side.

        A row's random numbers come from a seed that is drawn from torch's generator, so `torch.manual_seed` repeats a
        text. Tokens are bytes: transformers' default of 20 new ones is a short text. Its default `top_k=50` counts,
        too, where `do_sample=True`; 0 leaves it out. Only bytes and EOS are generated.

        Raises:
            UserError: beam search or another way that is not implemented, or a value that is not valid.
        """
        theirs: Any = super()
        return continue_texts(self, inputs, generation_config, theirs.generate, **arguments)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        host_decoding: HostDecoding | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "host_decoding": host_decoding}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.encoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.model.encoder.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.decoder.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.decoder.output = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The embedding of the 260 ids; there cannot be more or fewer.

        Raises:
            UserError: another number was given.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            size = self.config.vocab_size
            raise UserError(f"resize_token_embeddings: {new_num_tokens}; a byte model has {size} ids; leave it out")
        return self.get_input_embeddings()

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = enable
        for part in self.model.modules():
            if isinstance(part, Block | CrossAttention):
                vars(part).pop("forward", None)
                if enable:
                    part.forward = checkpointed(part.forward, "full")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The entropy model moves to the network's device, and stays in float32."""
        super()._apply(fn, recurse)
        device = self.device
        if self.blt.entropy_model is not None and device.type != "meta":
            self.blt.entropy_model.to(device)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise UserError("torch.nn.DataParallel: a BLT cannot be copied by it; use torchrun or accelerate launch")


def new_blt(config: BytelatentConfig) -> BLT:
    """A BLT with fresh weights.

    Raises:
        UserError: a value of the configuration is not valid.
    """
    ours = config.ours()
    entropy_model = None
    if config.entropy_model is not None:
        entropy_model = ByteLM(ByteLMSettings.parse(config.entropy_model, "entropy_model"))
    return BLT(BLTModel(cast(BLTSettings, ours.model)), ours, entropy_model)


def _from_our_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let a network's weights by our names be loaded, as `save_pretrained` writes them and a trainer resumes them."""
    wanted = module.state_dict().keys()
    for name in [name for name in state_dict if name.startswith(prefix)]:
        ours = name.removeprefix(prefix)
        if ours not in wanted and PREFIX + ours in wanted:
            state_dict[prefix + PREFIX + ours] = state_dict.pop(name)
