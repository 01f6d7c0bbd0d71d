"""`blt info`: the shape of a model and its cost."""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bytelatent.commands.options import DEFAULT_PATCH_BYTES, InfoSettings
from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.model import PRESETS, LanguageModelSettings, ModelSettings, preset
from bytelatent.model.flops import PartCost, costs
from bytelatent.model.settings import NAMES, StackSettings
from bytelatent.packaged import packaged_folder
from bytelatent.patching import PatchSettings
from bytelatent.run_folder import read_metrics
from bytelatent.terminal import print_json
from bytelatent.weights import Config, open_pretrained

CONTEXT = 8192  # ids, of a preset


@dataclass(frozen=True)
class Description:
    source: str
    settings: ModelSettings
    patching: PatchSettings | None
    parts: list[PartCost]
    patch_bytes: float
    context: int
    is_measured: bool = False  # the patches' size, in the run's training or calibration

    def plain(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self.settings.plain(),
            "patching": self.patching.plain() if self.patching else None,
            "parts": [asdict(part) for part in self.parts],
            "num_parameters": sum(part.num_parameters for part in self.parts),
            "flops_per_byte": sum(part.flops_per_byte for part in self.parts),
            "patch_bytes": self.patch_bytes,
            "is_measured": self.is_measured,
            "context": self.context,
        }

    def show(self, console: Console) -> None:
        """Print the architecture, and below it parameters and FLOPs, part by part."""
        lines = [self.source, *architecture(self.settings)]
        if self.patching is not None:
            lines.append(f"patches: {self.patching.in_words()}")
        unit = {"blt": "patches", "token_lm": "tokens"}.get(self.settings.kind)
        where = f"{self.context:,} bytes of context"
        if unit:
            where += f", {self.patch_bytes:.3g}-byte {unit}" + (" as measured in training" if self.is_measured else "")
        below = f"a forward pass, {where}; training costs three times it"
        for line in (*lines, self._table(), below):  # a path with brackets is no markup
            console.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))

    def _table(self) -> Table:
        table = Table()
        table.add_column("part")
        table.add_column("parameters", justify="right")
        table.add_column("MFLOPs per byte", justify="right")
        for part in self.parts:
            table.add_row(part.name, f"{part.num_parameters:,}", f"{part.flops_per_byte / 1e6:,.2f}")
        table.add_section()
        total = self.plain()
        table.add_row("all", f"{total['num_parameters']:,}", f"{total['flops_per_byte'] / 1e6:,.2f}")
        return table


def run(settings: InfoSettings) -> None:
    description = describe(settings)
    if settings.as_json:
        print_json(description.plain())
    else:
        description.show(Console())


def describe(given: InfoSettings) -> Description:
    """A preset, or the model found at a path or on the hub; its weights are not read.

    Raises:
        UserError: there is no such model or preset.
    """
    if not given.model:
        raise UserError(f"info: name a run, a folder, a repository or a preset; presets: {', '.join(PRESETS)}")
    if Path(given.model).exists() or "/" in given.model or packaged_folder(given.model):
        found = open_pretrained(given.model, given.entropy_model, given.revision, weights=False)
        settings, patching, source = found.config.model, found.config.patching, found.in_a_line()
        ids = found.config.context
        byte_lm = found.byte_lm.config.model if found.byte_lm is not None else None
        measured = _measured(Path(given.model), found.config) if given.patch_bytes is None else None
    else:
        measured, ids = None, CONTEXT
        try:
            settings, patching, source, byte_lm = preset(given.model), None, given.model, None
        except UserError as error:
            raise UserError(f"{error}; or name a run, a folder with a model, or OWNER/NAME on the hub") from None
    patch_bytes = given.patch_bytes or measured or DEFAULT_PATCH_BYTES
    context = given.context or round(ids * (patch_bytes if settings.kind == "token_lm" else 1))
    parts = costs(settings, patch_bytes, context)
    if byte_lm is not None:
        inner = costs(byte_lm, patch_bytes, context)
        flops = sum(part.flops_per_byte for part in inner) if patching is None or patching.needs_entropies else 0.0
        parts.append(PartCost("byte LM (patches)", sum(part.num_parameters for part in inner), flops))
    return Description(source, settings, patching, parts, patch_bytes, context, measured is not None)


def _measured(folder: Path, config: Config) -> float | None:
    """Mean bytes of a patch or token: the median over a run's steps, or as calibrated."""
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    sizes = [row["mean_patch_bytes"] for row in rows if row.get("mean_patch_bytes")]
    if sizes:
        return median(sizes)
    return config.calibration.mean_patch_bytes if config.calibration is not None else None


def architecture(settings: ModelSettings) -> list[str]:
    """The shape of each part, a line each."""
    if isinstance(settings, LanguageModelSettings):
        vocabulary = f", {settings.vocab_size:,} ids" if settings.kind == "token_lm" else ""
        return [f"{NAMES[settings.kind]}: {_in_words(settings)}{vocabulary}"]
    cross = settings.cross_attention
    lines = [
        f"local encoder: {_in_words(settings.encoder)}",
        f"global transformer: {_in_words(settings.global_transformer)}",
        f"local decoder: {_in_words(settings.decoder)}",
    ]
    if cross is None:
        count, readers = settings.joined_bytes, settings.added_to == "readers"
        made = f"the states of a patch's last {count} bytes" if count > 1 else "the state of a patch's last byte"
        where = "each byte that may read the patch" if readers else "the byte that closes the patch"
        lines.append(f"no cross-attention: {made}, added to {where}")
    else:
        lines.append(
            f"cross-attention: k {cross.k}, {_heads(cross.num_heads, cross.kv_heads)}, after "
            f"{'each encoder layer' if cross.all_layers_encoder else 'the last encoder layer'}, before "
            f"{'each decoder layer' if cross.all_layers_decoder else 'the first decoder layer'}"
        )
    ngrams = settings.ngram_hash
    if ngrams is None:
        return [*lines, "n-gram hashes: none"]
    sizes = ", ".join(map(str, ngrams.sizes))
    functions = f", {ngrams.num_functions} functions" if ngrams.num_functions > 1 else ""
    return [*lines, f"n-gram hashes: sizes {sizes}{functions}, {ngrams.vocab_size:,} rows each"]


def _in_words(stack: StackSettings) -> str:
    seen = f"window {stack.window}" if stack.window else "whole document"
    shape = f"{stack.num_layers} x {stack.dim}, {_heads(stack.num_heads, stack.kv_heads)}"
    theta = f"theta {stack.rope_theta:g}" + (f" / {stack.rope_scaling.factor:g}" if stack.rope_scaling else "")
    more = [f"heads of {stack.head_size}"] if stack.head_size else []
    more += [words for has, words in ((stack.attention_bias, "biases"), (stack.qk_norm, "q/k norms")) if has]
    return ", ".join([shape, *more, f"feed-forward {stack.hidden_dim}", seen, theta])


def _heads(num_heads: int, kv_heads: int) -> str:
    return f"{num_heads} heads" + (f" ({kv_heads} of keys and values)" if kv_heads != num_heads else "")
