"""What a model is and costs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bytelatent.errors import UserError
from bytelatent.interop import load
from bytelatent.model import PRESETS, ModelSettings
from bytelatent.model.flops import PartCost, costs
from bytelatent.model.presets import preset
from bytelatent.patching import PatchSettings


@dataclass(frozen=True)
class Description:
    source: str
    settings: ModelSettings
    patching: PatchSettings | None
    parts: list[PartCost]
    patch_bytes: float
    context: int

    def plain(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self.settings.plain(),
            "patching": self.patching.plain() if self.patching else None,
            "parts": [asdict(part) for part in self.parts],
            "num_parameters": sum(part.num_parameters for part in self.parts),
            "flops_per_byte": sum(part.flops_per_byte for part in self.parts),
            "patch_bytes": self.patch_bytes,
            "context": self.context,
        }

    def table(self) -> Table:
        """Parameters and FLOPs, part by part."""
        is_blt = self.settings.kind == "blt"
        where = f"{self.context:,} bytes of context" + (f", {self.patch_bytes:g}-byte patches" if is_blt else "")
        rule = f"\npatches: {_in_words(self.patching.plain())}" if self.patching else ""
        table = Table(title=f"{self.source}{rule}", caption=f"a forward pass, {where}; training costs three times it")
        table.add_column("part")
        table.add_column("parameters", justify="right")
        table.add_column("MFLOPs per byte", justify="right")
        for part in self.parts:
            table.add_row(part.name, f"{part.num_parameters:,}", f"{part.flops_per_byte / 1e6:,.2f}")
        table.add_section()
        total = self.plain()
        table.add_row("all", f"{total['num_parameters']:,}", f"{total['flops_per_byte'] / 1e6:,.2f}")
        return table


def describe(model: str, patch_bytes: float, context: int) -> Description:
    """A preset, or the model found at a path.

    Raises:
        UserError: it is neither.
    """
    if not model:
        raise UserError(f"info: name a run, a folder or a preset; presets: {', '.join(PRESETS)}")
    if Path(model).exists():
        found = load(model)
        settings, patching, source = found.config.model, found.config.patching, found.source
    else:
        settings, patching, source = preset(model), None, model
    return Description(source, settings, patching, costs(settings, patch_bytes, context), patch_bytes, context)


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None and value is not False)
