"""How several processes share the work of training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bytelatent.config import Settings

ActivationCheckpointing = Literal["none", "selective", "full"]
Float8 = Literal["rowwise", "rowwise_with_gw_hp", "tensorwise"]  # as torchao names its recipes


class ParallelSettings(Settings):
    """How several processes share the work. With one process only `activation_checkpointing` has an effect.

    Attributes:
        data: `shard` (FSDP) divides weights and the optimizer's state among the processes and gathers them block by
            block; `replicate` holds all of them in each process; `hybrid` has `replicas`, each of them sharded.
        tensor: processes that divide each matrix of the global transformer (tensor parallelism).
        activation_checkpointing: in the backward pass, recompute blocks (`full`), or all of them but matrix products
            and attention (`selective`), instead of saving their activations.
        tables: `rows` shards the hash tables by row, and looks rows up on the rank that holds them; `gather` treats
            them like the other weights, with dense gradients.
        reduce_dtype: in which gradients are summed; those of `rows` are summed in float32.
        reshard_after_forward: whether FSDP frees gathered weights after the forward pass, and gathers them again in the
            backward pass. Without it each step sends a third less, and all weights lie in each process in between.
    """

    data: Literal["replicate", "shard", "hybrid"] = "shard"
    replicas: int | None = Field(default=None, ge=1)
    tensor: int = Field(default=1, ge=1)
    activation_checkpointing: ActivationCheckpointing = "none"
    tables: Literal["rows", "gather"] = "rows"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if (self.data == "hybrid") != (self.replicas is not None):
            raise ValueError("data=hybrid and replicas go together, as in parallel.data=hybrid parallel.replicas=2")
        return self
