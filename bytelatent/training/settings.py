"""The settings of a training run, all that its parts take.

Checks that need no machine are validators here; `checks` holds those of a number of processes, a device or files.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bytelatent.config import Settings, laid_over, must_be_named, renamed, shorten
from bytelatent.data import DataSettings
from bytelatent.model import (
    BLTSettings,
    LanguageModelSettings,
    ModelSettings,
    UnknownPreset,
    preset,
    settings_class,
)
from bytelatent.model.settings import NAMES
from bytelatent.patching import PatchSettings
from bytelatent.training.checkpoint.settings import CheckpointSettings
from bytelatent.training.distributed.settings import Float8, ParallelSettings
from bytelatent.training.initial import TAKEN_OVER, taken_over

ScheduleName = Literal["cosine", "wsd"]
OF_ONE_SCHEDULE = {"wsd": ("decay_share", "decay_steps", "decay_minutes")}  # settings that no other schedule takes


class LearningRateScale(Settings):
    """Factors of the learning rate, by part of the model. 0 freezes a part: it costs neither gradients nor optimizer
    state.

    Attributes:
        byte_embedding, hash_tables: of the encoder (or the byte LM), and not of `encoder`.
    """

    byte_embedding: float = Field(default=1.0, ge=0)
    hash_tables: float = Field(default=1.0, ge=0)
    encoder: float = Field(default=1.0, ge=0)
    global_transformer: float = Field(default=1.0, ge=0)
    decoder: float = Field(default=1.0, ge=0)

    def of(self, name: str) -> float:
        """The factor for a weight, by the part of the model that its name begins with."""
        of_parts = {
            "embedding.": self.byte_embedding,
            "encoder.embedding.": self.byte_embedding,
            "encoder.ngram_hash.": self.hash_tables,
            "encoder.": self.encoder,
            "global_transformer.": self.global_transformer,
            "decoder.": self.decoder,
        }
        return next((scale for part, scale in of_parts.items() if name.startswith(part)), 1.0)


class OptimizerSettings(Settings):
    """AdamW or Muon, and the learning rate: linear warm-up, then a decay to `final_lr_ratio` of the peak.

    Defaults: Pagnoni et al. 2024, section 4.8.

    Attributes:
        lr: the peak.
        schedule: `cosine` decays from the end of warm-up to the end of the run; `wsd` (warmup-stable-decay) keeps the
            peak until the decay begins, and decays linearly.
        decay_share: with `wsd`, the share of the run, at its end, that decays;
        decay_steps, decay_minutes: its length instead, in the unit of the run's own.
        name: `muon` trains the matrices of the blocks by Muon, and the rest by AdamW.
        lr_scale: factors of the learning rate; 0 freezes a part of the model.
        clip: gradients are scaled so that their norm, as of one vector, is at most this.
        accumulation: batches of each process in a step.
        hash_gradients: with `rows` the gradients of the hash tables hold only the rows that a step reads, and AdamW
            changes only these. A row makes up for the steps it missed before it is read again, so the results are the
            same but for rounding.
        hash_weight_decay: decoupled weight decay of hash tables, all of whose rows shrink in every step.
    """

    lr: float = Field(default=4e-4, gt=0)
    schedule: ScheduleName = "cosine"
    warmup_steps: int = Field(default=2000, ge=0)
    decay_share: float = Field(default=0.2, gt=0, le=1)
    decay_steps: int | None = Field(default=None, ge=1)
    decay_minutes: float | None = Field(default=None, gt=0)
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    name: Literal["adamw", "muon"] = "adamw"
    lr_scale: LearningRateScale = LearningRateScale()
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    accumulation: int = Field(default=1, ge=1, le=10**6)
    hash_gradients: Literal["dense", "rows"] = "dense"
    hash_weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _leaves_weights(self) -> Self:
        decay, rate = self.hash_weight_decay, self.lr * self.lr_scale.hash_tables
        if decay * rate >= 1:
            line = f"{decay:g} times the tables' learning rate {rate:g} leaves nothing of a weight; take a smaller one"
            raise ValueError(f"hash_weight_decay: {line}")
        return self

    @model_validator(mode="after")
    def _of_its_schedule(self) -> Self:
        own = self.schedule
        for other, names in OF_ONE_SCHEDULE.items():
            for name in names:
                if other != own and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for schedule={other}, and schedule={own} does not take it")
        return self


class CalibrationSettings(Settings):
    """Choose the threshold before training.

    Attributes:
        patch_bytes: the wanted mean size of a patch.
        text_bytes: training text that it is measured on.
    """

    patch_bytes: float = Field(gt=1, le=10**6)
    text_bytes: int = Field(default=1_000_000, ge=1)


class ValidationSettings(Settings):
    """When held-out text is read.

    Attributes:
        every: steps from one validation to the next.
        max_bytes: text that each one reads; None: all of it.
    """

    every: int = Field(default=1000, ge=1)
    max_bytes: int | None = Field(default=1_000_000, ge=1)


class WandbSettings(Settings):
    """Where Weights & Biases puts a run.

    Attributes:
        name: of the run; the name of its folder if left out.
        mode: `offline` keeps everything below the run's folder, for `wandb sync`.
    """

    project: str = "bytelatent"
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class ProfileSettings(Settings):
    """A trace of some steps, taken at a step or when the file `profile` appears in the run's folder.

    Attributes:
        from_step: the first step to trace; None: only when the file appears.
        steps: to trace.
        memory: trace allocations, too, and on CUDA write a snapshot of the memory.
    """

    from_step: int | None = Field(default=None, ge=1)
    steps: int = Field(default=3, ge=1)
    memory: bool = False


class FaultSettings(Settings):
    """What happens when something goes wrong.

    Attributes:
        on_nan: where the loss or the gradient is not finite: `stop`; `skip` leaves the update out; `rollback` resumes
            from the last checkpoint with the text that comes next.
        spike: a loss of this many times the median of the last steps is treated likewise; None: never.
        watchdog_minutes: after this time without a step every thread's stack is printed and the process ends.
    """

    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    spike: float | None = Field(default=None, gt=1)
    watchdog_minutes: float | None = Field(default=30.0, gt=0, le=10**6)


class TrainSettings(Settings):
    """A training run.

    Attributes:
        run: the folder it writes.
        steps: optimizer steps, or else
        minutes: time spent in steps (but for the first after each start, which compiles and warms up). Beside it
            calibration takes at most a tenth as long, and so does validation; what does not fit is left out, with a
            line in the log. The learning rate follows the clock, and on a CPU the number of threads is the fastest one
            (unless OMP_NUM_THREADS is set), so such a run is not repeatable.
        init: the model to begin from: a run, a folder in any known format, or OWNER/NAME on the hub. Its weights,
            `model`, `patching`, `entropy_model` and tokenizer are taken over; what is named must be the same.
        model: a preset's name, the shapes themselves, or a mapping of `preset` and the shapes that differ from it.
        patching: where patches start (BLT only). With `calibration` its threshold may be left out.
        entropy_model: a run or folder with the frozen byte LM that gives entropies which are not stored with the text.
            The run keeps a copy in `byte_lm/`, so that the model can be used on other text.
        track: where metrics go beside `metrics.jsonl`.
        statistics_every: steps from one row of statistics, layer by layer, to the next; None: never.
        dtype: `auto` is bfloat16 where the device computes in it, else float32. Weights stay float32.
        compile: `auto` compiles on CUDA.
        cuda_graph: forward and backward pass are captured once and replayed, so that the host does not hold up the
            device; one process on CUDA, and batches of one shape.
        determinism: only operations that give the same bits each time; slower on a GPU.
        float8: multiply those matrices of the global transformer that gain by it in 8-bit floats, with a scale a row
            (`rowwise`; `rowwise_with_gw_hp` leaves the gradients of weights in bfloat16) or a matrix (`tensorwise`).
    """

    presets: ClassVar[tuple[str, ...]] = ("model",)
    alternatives: ClassVar[tuple[str, ...]] = ("steps", "minutes")
    old_names: ClassVar[dict[str, str]] = {"byte_lm": "entropy_model"}

    run: str = "runs/train"
    seed: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1, le=10**12)
    minutes: float | None = Field(default=None, gt=0, le=10**8)
    init: str | None = None
    model: ModelSettings
    data: DataSettings
    patching: PatchSettings | None = None
    calibration: CalibrationSettings | None = None
    entropy_model: str | None = None
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    parallel: ParallelSettings = ParallelSettings()
    faults: FaultSettings = FaultSettings()
    log_every: int = Field(default=10, ge=1)
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb: WandbSettings = WandbSettings()
    profile: ProfileSettings = ProfileSettings()
    statistics_every: int | None = Field(default=None, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    cuda_graph: bool = False
    determinism: bool = False
    float8: Float8 | None = None

    @field_validator("run")
    @classmethod
    def _in_the_home_folder(cls, value: str) -> str:
        return str(Path(must_be_named(value, "a folder")).expanduser())

    @field_validator("init")
    @classmethod
    def _init_is_named(cls, value: str | None) -> str | None:
        return None if value is None else must_be_named(value, "a run, a folder with a model, or OWNER/NAME on the hub")

    @field_validator("track", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        """A preset by its name, with the shapes given beside it laid over its own. `kind` decides whose keys errors
        name.
        """
        name = value.get("preset") if isinstance(value, dict) else value
        if isinstance(name, str):
            try:
                shapes = preset(name)
            except UnknownPreset as error:  # pydantic puts the key in front
                raise ValueError(error.reason) from None
            if not isinstance(value, dict):
                return shapes
            value = laid_over(shapes.plain(), {key: inner for key, inner in value.items() if key != "preset"})
        if isinstance(value, dict):
            return settings_class(value).model_validate(value)
        if not isinstance(value, ModelSettings):
            raise ValueError(f"no model but {shorten(repr(value))}; name a preset or give its shapes")
        return value

    def source_of_default(self, key: str) -> str:
        if key == "patching.threshold" and self.calibration is not None:
            return "calibration"
        is_taken_over = self.init is not None and key.startswith((*TAKEN_OVER, "data.tokenizer"))
        return f"init {self.init}" if is_taken_over else "default"

    @model_validator(mode="before")
    @classmethod
    def _taken_over(cls, values: Any) -> Any:
        """With `init` all that the model has may be missing."""
        source = values.get("init") if isinstance(values, dict) else None
        if not isinstance(source, str) or not source.strip():
            return values
        run = values.get("run", cls.model_fields["run"].default)
        return taken_over(renamed(values, cls.old_names), Path(str(run)).expanduser())

    @field_validator("patching", "calibration", "entropy_model", mode="before")
    @classmethod
    def _of_a_blt(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse them before they are validated."""
        model = info.data.get("model")
        if value is not None and isinstance(model, LanguageModelSettings):
            raise ValueError(
                f"this model is a {NAMES[model.kind]} and has no patches; leave patching, calibration and "
                "entropy_model out"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _threshold_to_come(cls, values: Any) -> Any:
        """With `calibration` the threshold may be missing."""
        if not isinstance(values, dict) or not values.get("calibration"):
            return values
        patching = values.get("patching") or {}
        if not isinstance(patching, dict) or patching.get("mode", "entropy") != "entropy":
            return values
        return {**values, "patching": {"threshold": 0.0, **patching}}

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.steps is None and self.minutes is None:
            raise ValueError("set steps or minutes: how long to train")
        if self.steps is not None and self.minutes is not None:
            raise ValueError("steps and minutes are both set; set the one that should not count to null: minutes=null")
        return self

    @model_validator(mode="after")
    def _decay_by_its_end(self) -> Self:
        for unit, other in (("steps", "minutes"), ("minutes", "steps")):
            if getattr(self.optimizer, f"decay_{unit}") is not None and getattr(self, unit) is None:
                raise ValueError(
                    f"optimizer.decay_{unit} goes with {unit}, and this run ends by {other}; set "
                    f"optimizer.decay_{other} or optimizer.decay_share"
                )
        return self

    @model_validator(mode="after")
    def _parts(self) -> Self:
        """Refuse settings of a part that the model does not have."""
        scales = self.optimizer.lr_scale
        own = NAMES[self.model.kind]
        if isinstance(self.model, LanguageModelSettings):
            if self.float8 is not None:
                raise ValueError(f"float8 is for the global transformer, and a {own} has none; leave it out")
            for name in ("batch_patches", *(["patch_bytes"] if self.model.kind == "byte_lm" else [])):
                if getattr(self.data, name) is not None:
                    raise ValueError(f"data.{name} is for a BLT, and a {own} has no patches; leave it out")
            for name in ("hash_tables", "encoder", "global_transformer", "decoder"):
                if getattr(scales, name) != 1:
                    raise ValueError(f"optimizer.lr_scale.{name} belongs to a BLT; this model is a {own}")
        has_tables = isinstance(self.model, BLTSettings) and self.model.ngram_hash is not None
        if not any(scales.model_dump(exclude=None if has_tables else {"hash_tables"}).values()):
            raise ValueError("optimizer.lr_scale: 0 freezes a part, and here all of them; leave one to train")
        if not has_tables:
            if scales.hash_tables != 1:
                raise ValueError("optimizer.lr_scale.hash_tables: this model has no hash tables; leave it out")
            if self.optimizer.hash_gradients == "rows":
                raise ValueError("optimizer.hash_gradients: this model has no hash tables; leave 'rows' out")
            if self.optimizer.hash_weight_decay:
                raise ValueError("optimizer.hash_weight_decay: this model has no hash tables; leave it out")
        return self

    @model_validator(mode="after")
    def _tensor_parallel(self) -> Self:
        tensor = self.parallel.tensor
        if tensor == 1:
            return self
        if isinstance(self.model, LanguageModelSettings):
            own = NAMES[self.model.kind]
            raise ValueError(f"parallel.tensor divides the global transformer, and a {own} has none; leave it out")
        stack = self.model.global_transformer
        sizes = {"num_heads": stack.num_heads, "num_kv_heads": stack.kv_heads, "feed-forward width": stack.hidden_dim}
        for name, size in sizes.items():
            if size % tensor:
                line = f"the global transformer's {name} {size} is no multiple of {tensor}; take a divisor"
                raise ValueError(f"parallel.tensor: {line}")
        return self

    @model_validator(mode="after")
    def _captured(self) -> Self:
        if self.cuda_graph and isinstance(self.model, BLTSettings):
            if self.data.patch_slots is None:
                raise ValueError("cuda_graph: batches must have one shape; set data.batch_patches or data.patch_bytes")
            if self.optimizer.hash_gradients == "rows" and self.optimizer.accumulation > 1:
                raise ValueError(
                    "cuda_graph: gradients by rows are not added up in a graph; take optimizer.accumulation=1, or "
                    "optimizer.hash_gradients=dense"
                )
        return self

    @model_validator(mode="after")
    def _text_of_its_kind(self) -> Self:
        is_token_lm, tokenizer = self.model.kind == "token_lm", self.data.tokenizer
        if is_token_lm != (tokenizer is not None):
            raise ValueError(
                "data.tokenizer: a token LM needs one; name its tokenizer.json, which blt tokenizer writes"
                if is_token_lm
                else f"data.tokenizer is for a token LM, and this model is a {NAMES[self.model.kind]}; leave it out"
            )
        if isinstance(self.model, LanguageModelSettings):
            return self
        if self.patching is None:
            raise ValueError("patching: a BLT needs patching settings; for example patching.mode=space")
        if self.calibration is not None and not self.patching.needs_entropies:
            raise ValueError(f"calibration chooses a threshold; patching.mode '{self.patching.mode}' has none")
        return self
