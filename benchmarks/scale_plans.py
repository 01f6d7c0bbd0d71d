"""The shapes that `scale.py` trains beside the presets, and how ranks share one: a configuration."""

from dataclasses import dataclass

import torch

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, preset
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.training import TrainSettings
from bytelatent.training.profiling.measure import DOCUMENT

PLANS = ("alone", "shard", "hybrid", "replicate", "tensor")
OTHERS = ("rows", "dense", "float8", "selective", "full", "muon", "keep", "halves")
CONTRARY = {"rows", "dense"}
TINY_STACK = StackSettings(dim=32, num_layers=1, num_heads=2, window=64, multiple_of=16)
TINY = BLTSettings(
    encoder=TINY_STACK,
    global_transformer=StackSettings(dim=64, num_layers=2, num_heads=4, multiple_of=16),
    decoder=TINY_STACK,
    cross_attention=CrossAttentionSettings(k=2, num_heads=2),
    ngram_hash=NgramHashSettings(sizes=[3, 4], vocab_size=1009),
)
RELEASED = preset("blt-1b")
assert isinstance(RELEASED, BLTSettings)
# As many layers and hash tables as the 1B shape: the host starts as many operations.
NARROW = TINY.model_copy(
    update={
        **{
            part: getattr(TINY, part).model_copy(update={"num_layers": getattr(RELEASED, part).num_layers})
            for part in ("encoder", "global_transformer", "decoder")
        },
        "ngram_hash": NgramHashSettings(vocab_size=1009),
    }
)
# About 100 million parameters.
MIDDLE_STACK = StackSettings(dim=512, num_layers=1, num_heads=8, window=512)
MIDDLE = BLTSettings(
    encoder=MIDDLE_STACK,
    global_transformer=StackSettings(dim=768, num_layers=8, num_heads=12),
    decoder=MIDDLE_STACK.model_copy(update={"num_layers": 4}),
    cross_attention=CrossAttentionSettings(k=2, num_heads=8),
    ngram_hash=NgramHashSettings(vocab_size=8191),
)


@dataclass(frozen=True)
class Configuration:
    """What is trained, and how the ranks share it.

    Attributes:
        plan: `alone` is without FSDP, for one rank; any other one of one rank is FSDP on it.
        keeps: whether gathered weights stay until the backward pass.
        halves: whether gradients are summed in bfloat16.
        tables: `rows` are the hash tables divided by rows, or, alone, their gradients by rows; `rows, gradients too`
            both.
    """

    name: str
    model: BLTSettings
    plan: str
    tables: str
    float8: bool
    checkpointing: str
    optimizer: str
    keeps: bool
    halves: bool
    size: int  # bytes a rank and step

    @classmethod
    def parse(cls, text: str, size: int) -> "Configuration":
        """From MODEL[/ROWS]:WORD+WORD...[@BYTES].

        ROWS are of each hash table, BYTES of a rank and step; one of the words is a plan.

        Args:
            size: BYTES, where the text has none.

        Raises:
            UserError: there is no such model or word.
        """
        what, _, own_size = text.partition("@")
        shape, _, rest = what.partition(":")
        name, _, rows = shape.partition("/")
        words = rest.split("+")
        plans = [word for word in words if word in PLANS]
        numbers = all(part == "" or part.isdecimal() for part in (own_size, rows))
        if len(plans) != 1 or not numbers or any(word not in PLANS + OTHERS for word in words) or {*words} >= CONTRARY:
            raise UserError(
                f"'{text}': write MODEL[/ROWS]:PLAN+WORD...[@BYTES], PLAN of {', '.join(PLANS)}, "
                f"WORD of {', '.join(OTHERS)}"
            )
        model = {"tiny": TINY, "narrow": NARROW}.get(name) or preset(name)
        if not isinstance(model, BLTSettings) or model.ngram_hash is None:
            raise UserError(f"'{text}': '{name}' is no BLT with hash tables")
        if rows:
            hashed = model.ngram_hash.model_copy(update={"vocab_size": int(rows)})
            model = model.model_copy(update={"ngram_hash": hashed})
        tables = "dense" if "dense" in words or (plans == ["alone"] and "rows" not in words) else "rows"
        if "rows" in words and plans != ["alone"]:
            tables = "rows, gradients too"
        how = next((word for word in words if word in ("selective", "full")), "none")
        optimizer = "muon" if "muon" in words else "adamw"
        flags = ("keep" in words, "halves" in words)
        return cls(name, model, plans[0], tables, "float8" in words, how, optimizer, *flags, int(own_size or size))

    @property
    def settings(self) -> TrainSettings:
        """Those of a run."""
        by_rows = self.tables == "rows, gradients too" or (self.plan, self.tables) == ("alone", "rows")
        kind = {"alone": "shard", "tensor": "shard"}.get(self.plan, self.plan)
        tensor = 2 if self.plan == "tensor" else 1
        parallel = {
            "data": kind,
            "replicas": 2 if kind == "hybrid" else None,
            "tensor": tensor,
            "tables": "gather" if self.tables == "dense" else "rows",
            "activation_checkpointing": self.checkpointing,
            "reshard_after_forward": not self.keeps,
            "reduce_dtype": "bfloat16" if self.halves else "float32",
        }
        return TrainSettings.parse(
            {
                "steps": 10**6,
                "model": self.model.plain(),
                "patching": {"mode": "space"},
                "data": {"train": "random", "batch_bytes": self.size * tensor, "context": DOCUMENT},
                "optimizer": {"name": self.optimizer, "hash_gradients": "rows" if by_rows else "dense"},
                "parallel": parallel,
                "float8": "rowwise" if self.float8 else None,
            }
        )

    @property
    def words(self) -> str:
        words = {"alone": "no FSDP", "shard": "FSDP", "tensor": "FSDP, tensor 2"}.get(self.plan, self.plan)
        words += "" if self.checkpointing == "none" else f", recomputing {self.checkpointing}"
        words += ", weights kept" if self.keeps else ""
        words += ", gradients summed in bfloat16" if self.halves else ""
        return f"{words}, Muon" if self.optimizer == "muon" else words

    def products(self, dtype: torch.dtype) -> str:
        """In which precision."""
        return "float8" if self.float8 else str(dtype).removeprefix("torch.")
