"""How several processes share a training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bytelatent.config import Settings


class ParallelSettings(Settings):
    """How several processes share the work; with one process only `activation_checkpointing` says something.

    Attributes:
        data: `shard` divides weights and the optimizer's state among the processes and gathers them block by block;
            `replicate` holds them whole in each; `hybrid` has `replicas` that are divided within themselves.
        tensor: processes that divide each matrix of the global transformer.
        activation_checkpointing: in the backward pass, compute blocks again (`full`), or all of them but matrix
            products and attention (`selective`), instead of keeping their inner results.
        tables: `rows` divides the hash tables by rows that are looked up where they lie; `gather` treats them as the
            other weights.
        reduce_dtype: of gradients as they are summed; those of `rows` are in float32.
    """

    data: Literal["replicate", "shard", "hybrid"] = "shard"
    replicas: int | None = Field(default=None, ge=1)
    tensor: int = Field(default=1, ge=1)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    tables: Literal["rows", "gather"] = "rows"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if (self.data == "hybrid") != (self.replicas is not None):
            raise ValueError("data=hybrid and replicas go together, as in parallel.data=hybrid parallel.replicas=2")
        return self
