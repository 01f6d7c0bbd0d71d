"""The plan of a study: families of models, budgets of training FLOPs, seeds, and the trials that choose settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from bytelatent.config import Settings, flat, laid_over, load_yaml
from bytelatent.errors import UserError, nearest
from bytelatent.model import TokenLMSettings, preset, settings_class
from bytelatent.study.results import NAME
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.documents import MAX_BAD_ROWS
from bytelatent.training import TrainSettings

DECIDED = {  # settings that follow from a study, and by what
    "run": "the study's folder",
    "seed": "seeds",
    "steps": "budgets",
    "minutes": "budgets",
    "data.train": "text.train",
    "data.valid": "text.tuning",
    "data.tokenizer": "model.vocab_size",
    "data.max_bad_rows": "text.max_bad_rows",
    "data.max_row_bytes": "text.max_row_bytes",
}
# Settings that change nothing of a result that is there: the others of a finished run must be those of the plan.
FREE = re.compile(
    r"run|steps|minutes|device|compile|cuda_graph|log_every|track|statistics_every|entropy_model|"
    r"(wandb|profile|checkpoint|validation|faults|parallel)\..*|data\.(workers|train|valid|tokenizer|allow_changed)\b.*"
)


class StudyText(Settings):
    """The text of a study, the same for all its models.

    Attributes:
        train: files, folders or globs to train on.
        tuning: held-out text by which settings are chosen, and which validation reads.
        held_out: the text that results are of. No choice depends on it.
        text_key: the key or column that holds the text.
        category: the key or column whose value is a document's category; None for no categories.
        tokenizer_bytes: training text of which tokenizers are made; None: all of it.
        measured_bytes: size of the sample of the training text on which mean patches and tokens are measured.
        evaluated_bytes: of the tuning and of the held-out text, that results are of; None: all.
    """

    train: list[str] = Field(min_length=1)
    tuning: list[str] = Field(min_length=1)
    held_out: list[str] = Field(min_length=1)
    text_key: str = "text"
    category: str | None = None
    tokenizer_bytes: int | None = Field(default=None, ge=1)
    measured_bytes: int = Field(default=8_000_000, ge=1)
    evaluated_bytes: int | None = Field(default=None, ge=1)
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1)

    @field_validator("train", "tuning", "held_out", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class FamilySettings(Settings):
    """Models of a kind that differ only in size.

    Attributes:
        label: its name in tables and figures; by default that in the plan.
        like: another family, from which this one differs in what is given here.
        settings: settings of training, laid over the plan's `base`. `model.vocab_size` of a token LM names its
            tokenizer, `entropy_model` one of the plan's `entropy_models`, and `calibration.patch_bytes` the mean patch.
        sizes: settings laid over these, by budget: usually `model`.
        ladder: such settings without a budget, of which the plan picks: among those that read the text at most
            `max_epochs` times, the one whose bytes per parameter are nearest to `bytes_per_parameter`.
        bytes_per_parameter: bytes of text for each parameter, without hash tables and embeddings.
        budgets: those of the plan's that this family gets; None for all.
    """

    label: str | None = None
    like: str | None = None
    settings: dict[str, Any] = Field(default={})
    sizes: dict[float, dict[str, Any]] = Field(default={})
    ladder: list[dict[str, Any]] = Field(default=[])
    bytes_per_parameter: float | None = Field(default=None, gt=0)
    budgets: list[float] | None = None

    @model_validator(mode="after")
    def _one_way_to_a_size(self) -> Self:
        if self.sizes and self.ladder:
            raise ValueError("sizes and ladder both give shapes; leave one of them out")
        return self


class Trials(Settings):
    """Trials at one budget, by which settings are chosen. They are measured on the tuning text alone.

    Attributes:
        of: for each family its trials by their names: settings laid over the family's.
    """

    budget: float = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    of: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)


class StudyPlan(Settings):
    """A study.

    Attributes:
        base: settings of training that all families have.
        entropy_models: by name, either settings of training laid over `base`, with its own steps, or a run that is
            there already.
        budgets: training FLOPs.
        seeds: of each budget, or by budget.
        max_epochs: how often a run may read the training text.
        warmup_share: share of a run's steps in which the learning rate rises, unless settings have
            `optimizer.warmup_steps`.
        unequal_trials: families may have different numbers of trials.
    """

    text: StudyText
    base: dict[str, Any] = Field(default={})
    entropy_models: dict[str, str | dict[str, Any]] = Field(default={})
    families: dict[str, FamilySettings] = Field(min_length=1)
    budgets: list[float] = Field(min_length=1)
    seeds: list[int] | dict[float, list[int]] = Field(default=[0])
    max_epochs: float = Field(default=4.0, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    trials: Trials | None = None
    unequal_trials: bool = False

    @model_validator(mode="after")
    def _names_and_budgets(self) -> Self:
        for name in [*self.families, *self.entropy_models]:
            if not NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no name: letters, digits and . _ + - without spaces")
        if min(self.budgets) <= 0 or len({budget_name(budget) for budget in self.budgets}) < len(self.budgets):
            raise ValueError(f"budgets are positive FLOPs that differ in their first digits, not {self.budgets}")
        if isinstance(self.seeds, dict) and (missing := [b for b in self.budgets if not self.seeds.get(b)]):
            raise ValueError(f"seeds: none for the budget {budget_name(missing[0])}; write [0]")
        for name in self.families:
            family = self.family(name)
            for budget in family.budgets or []:
                if budget not in self.budgets:
                    raise ValueError(f"families.{name}: {budget_name(budget)} is not one of the plan's budgets")
            if family.sizes:
                missing = [b for b in family.budgets or self.budgets if b not in family.sizes]
                if missing:
                    raise ValueError(f"families.{name}.sizes: none for the budget {budget_name(missing[0])}")
            if family.ladder and family.bytes_per_parameter is None:
                raise ValueError(f"families.{name}: a ladder needs bytes_per_parameter, by which a size is picked")
        return self

    @model_validator(mode="after")
    def _equal_trials(self) -> Self:
        if self.trials is None:
            return self
        for name in self.trials.of:
            if name not in self.families:
                raise ValueError(f"trials.of: no family '{name}'{nearest(name, list(self.families))}")
        counts = {name: len(self.trials.of.get(name, {})) for name in self.families}
        if len(set(counts.values())) > 1 and not self.unequal_trials:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"trials: each family gets as many as the others, and here they have {listed}; add trials, or write "
                "unequal_trials: true"
            )
        return self

    def family(self, name: str, seen: tuple[str, ...] = ()) -> FamilySettings:
        """A family with what it takes from the one that it is like."""
        own = self.families[name]
        if own.like is None:
            return own
        if own.like not in self.families or own.like in (*seen, name):
            raise ValueError(f"families.{name}.like: '{own.like}' is no other family of the plan")
        other = self.family(own.like, (*seen, name))
        values = own.model_dump(exclude_unset=True)
        budgets = other.sizes.keys() | own.sizes.keys()
        values["settings"] = laid(other.settings, own.settings)
        values["sizes"] = {b: laid(other.sizes.get(b, {}), own.sizes.get(b, {})) for b in budgets}
        if own.ladder:
            values["sizes"] = {}
        elif own.sizes:
            values["ladder"] = []
        kept = {key: getattr(other, key) for key in ("ladder", "bytes_per_parameter", "budgets")}
        return FamilySettings.parse({**kept, **values, "like": None}, f"families.{name}")

    def drafts(self, folder: Path, trials: bool = False) -> Iterator[list["Draft"]]:
        """The runs of the study, or its trials, by budget; of each the sizes from which one is picked.

        Raises:
            UserError: settings of a family are wrong.
        """
        if trials:
            assert self.trials is not None
            for name, variations in self.trials.of.items():
                for variation, above in variations.items():
                    yield self._sizes(folder, name, self.trials.budget, self.trials.seed, variation, above)
            return
        for budget in sorted(self.budgets):
            for seed in self.seeds[budget] if isinstance(self.seeds, dict) else self.seeds:
                for name in self.families:
                    if budget in (self.family(name).budgets or self.budgets):
                        yield self._sizes(folder, name, budget, seed)

    def _sizes(
        self,
        folder: Path,
        name: str,
        budget: float,
        seed: int,
        variation: str = "",
        above: dict[str, Any] | None = None,
    ) -> list["Draft"]:
        family = self.family(name)
        if family.sizes and budget not in family.sizes:
            raise UserError(f"families.{name}.sizes: none for the budget {budget_name(budget)} of the trials")
        where = f"trials.of.{name}.{variation}" if variation else f"families.{name}"
        found = []
        for size in family.ladder or [family.sizes.get(budget, {})]:
            values = laid(laid(laid(self.base, family.settings), size), above or {})
            parts = [name, *([variation] if variation else []), budget_name(budget), str(seed)]
            about = {
                "where": where,
                "family": name,
                "label": family.label or name,
                "budget": budget,
                "seed": seed,
                "variation": variation,
                "bytes_per_parameter": family.bytes_per_parameter,
            }
            found.append(self._draft(folder, "-".join(parts), values, about))
        return found

    def _draft(self, folder: Path, name: str, values: dict[str, Any], about: dict[str, Any]) -> "Draft":
        where = about["where"]
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: '{name}' is no name: letters, digits and . _ + - without spaces")
        given = _checked(values, where, ("steps", "minutes"))
        values = laid(values, {"run": str(folder / "runs" / name), "seed": about["seed"], "steps": 1})
        values["data"] = {**(values.get("data") or {}), **self._sources()}
        entropy_model = values.get("entropy_model")
        if entropy_model is not None:
            if entropy_model not in self.entropy_models:
                near = nearest(str(entropy_model), list(self.entropy_models))
                raise UserError(
                    f"{where}: entropy_model: '{entropy_model}' is not one of the plan's entropy_models{near}"
                )
            values["entropy_model"] = str(self.entropy_model_folder(folder, entropy_model))
        if (size := _vocab_size(values.get("model"))) is not None:
            values["data"]["tokenizer"] = str(folder / "tokenizers" / f"{size}.json")
        elif values.get("cuda_graph") and values.get("patching") and not values["data"].get("batch_patches"):
            values["data"].setdefault("patch_bytes", 1.0)  # any; a graph needs some, and the mean patch is measured
        settings = TrainSettings.parse(values, where)
        if settings.patching is not None and settings.patching.needs_entropies and entropy_model is None:
            raise UserError(f"{where}: patching by entropy needs entropy_model: one of the plan's entropy_models")
        return Draft(name=name, settings=settings, entropy_model=entropy_model, given=frozenset(flat(given)), **about)

    def entropy_model_folder(self, folder: Path, name: str) -> Path:
        found = self.entropy_models[name]
        return Path(found).expanduser() if isinstance(found, str) else folder / "entropy_models" / name

    def entropy_model_settings(self, folder: Path, name: str) -> TrainSettings | None:
        """How an entropy model is trained; None if it is there already.

        Raises:
            UserError: the settings are wrong.
        """
        found, where = self.entropy_models[name], f"entropy_models.{name}"
        if isinstance(found, str):
            return None
        values = laid(self.base, found)
        given = _checked(values, where)
        values = laid(values, {"run": str(folder / "entropy_models" / name), "seed": 0})
        values["data"] = {**(values.get("data") or {}), **self._sources()}
        steps = values.get("steps")
        if isinstance(steps, int) and "optimizer.warmup_steps" not in flat(given):
            values = laid(values, {"optimizer": {"warmup_steps": round(self.warmup_share * steps)}})
        settings = TrainSettings.parse(values, where)
        if settings.model.kind != "byte_lm":
            raise UserError(f"{where}: model: an entropy model is a byte LM, not a {settings.model.kind}")
        return settings

    def _sources(self) -> dict[str, Any]:
        text = self.text
        named = {"train": text.train, "valid": text.tuning}
        sources = {key: [{"path": path, "text_key": text.text_key} for path in paths] for key, paths in named.items()}
        return {**sources, "max_bad_rows": text.max_bad_rows, "max_row_bytes": text.max_row_bytes}


@dataclass(frozen=True)
class Draft:
    """A run of the plan before its text is measured.

    Attributes:
        where: in the plan, for errors.
        variation: of a trial; empty for a run of the study.
        settings: but for what follows from measurement: steps, warm-up, threshold, and the patch that is expected.
        entropy_model: its name in the plan.
        given: the whole keys of settings that the plan gives.
    """

    name: str
    where: str
    family: str
    label: str
    budget: float
    seed: int
    variation: str
    bytes_per_parameter: float | None
    settings: TrainSettings
    entropy_model: str | None
    given: frozenset[str]

    def differences(self, then: Mapping[str, Any]) -> list[str]:
        """How settings of a finished run differ from these, where that changes a result."""
        derived = {"patching.threshold"} if self.settings.calibration is not None else set()
        derived |= {"optimizer.warmup_steps", "data.patch_bytes"} - self.given
        return changed_settings(then, self.settings.shown(), derived)


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any], derived: set[str] | None = None) -> list[str]:
    """A line for each setting that differs and is not free to: `optimizer.lr is 0.001, and was 0.002`."""
    with suppress(UserError):  # settings that came later were at their defaults
        then = TrainSettings.parse(dict(then)).shown()
    before, after = flat(dict(then)), flat(dict(now))
    return [
        f"{key} is {after.get(key)} in the plan, and was {before.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not FREE.fullmatch(key) and key not in (derived or set())
    ]


def is_chosen(draft: Draft, families: Sequence[str], budgets: Sequence[float]) -> bool:
    """Whether a run is of these families and budgets; empty ones are all."""
    return (not families or draft.family in families) and (not budgets or draft.budget in budgets)


def load_plan(path: Path) -> StudyPlan:
    """
    Raises:
        UserError: it cannot be read, or a key or a value is wrong; the file and the key are named.
    """
    if not path.is_file():
        raise UserError(f"plan: '{path}' does not exist; name a YAML file, such as apps/bytelatent/studies/debug.yaml")
    return StudyPlan.parse(load_yaml(path), str(path))


def budget_name(budget: float) -> str:
    """FLOPs as in `1e16` and `5.5e16`."""
    return f"{budget:.4g}".replace("e+", "e")


def laid(values: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """As `laid_over`, where the name of a preset is a model over which shapes can be laid."""
    return laid_over(_named(values), _named(above))


def _named(values: Mapping[Any, Any]) -> dict[Any, Any]:
    names = {key: {"preset": values[key]} for key in TrainSettings.presets if isinstance(values.get(key), str)}
    return {**values, **names}


def _vocab_size(model: Any) -> int | None:
    """The ids of a token LM by its values; None of another model, or where `TrainSettings` will name what is wrong."""
    if not isinstance(model, dict):
        return None
    with suppress(UserError):
        if isinstance(model.get("preset"), str):
            model = laid_over(preset(model["preset"]).plain(), {k: v for k, v in model.items() if k != "preset"})
        if settings_class(model) is TokenLMSettings and isinstance(model.get("vocab_size"), int):
            return model["vocab_size"]
    return None


def _checked(values: dict[str, Any], where: str, of_run: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values of a plan, none of which the study decides."""
    given = flat(values)
    for key, by in DECIDED.items():
        is_decided = key in of_run or key not in ("steps", "minutes")
        if is_decided and any(f"{name}.".startswith(f"{key}.") for name in given):
            raise UserError(f"{where}: {key}: the plan decides it by {by}; leave it out")
    return values
