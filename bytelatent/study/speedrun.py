"""The speedrun: entries, which are training configurations, their results, and the table of results.

What an entry may do, and what the clock counts, is in docs/study/speedrun.md.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from bytelatent.config import Settings, flat, laid_over, load_yaml, renamed
from bytelatent.errors import UserError
from bytelatent.files import digest_of, digests, json_if_any
from bytelatent.model.settings import NAMES
from bytelatent.report.text import aligned, amount_of_bytes, number
from bytelatent.study import speedrun_text
from bytelatent.study.plan import budget_name
from bytelatent.study.results import NAME, HeldOut
from bytelatent.text.tokenizer import TOKENIZER
from bytelatent.training import TrainSettings

MINUTES = 10.0  # of a result for the table
SLACK = 1.01  # the last step ends after the minutes, and the first one is counted as long as the mean one
TOLERANCE = 1e-4  # bits per byte, between two measurements of one model
HELD_OUT = "valid.jsonl"
# What an entry leaves out, and why.
OF_THE_COMMAND = {
    "run": "--out names the folder",
    "steps": "minutes end the run",
    "data.train": "all entries have the same text, --text",
    "data.valid": "all entries have the same text, --text",
    "data.tokenizer": "a tokenizer is trained on the same clock; give tokenizer.vocab",
    "patching.tokenizer": "it would be trained on other text",
    "parallel.data": "an entry has one GPU",
    "parallel.replicas": "an entry has one GPU",
    "parallel.tensor": "an entry has one GPU",
}


class TokenizerOfEntry(Settings):
    """A byte-level BPE, trained on the training text before the model.

    Attributes:
        vocab: number of ids.
        max_bytes: bytes of text to train it on; None: all.
    """

    vocab: int = Field(default=16_384, ge=261, le=2**20)
    max_bytes: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Entry:
    """A training configuration with `minutes`, and what is trained before it on the same clock.

    Attributes:
        values: of the file, for the result.
        entropy_model, model: of the trainings, each of which writes a folder of its name.
    """

    name: str
    values: dict[str, Any]
    tokenizer: TokenizerOfEntry | None
    entropy_model: TrainSettings | None
    model: TrainSettings

    @classmethod
    def read(cls, path: Path, text: Path, out: Path, minutes: float | None = None) -> Self:
        """
        Args:
            text: the folder of the text.
            out: the folder for the folders of entries.
            minutes: in place of the file's; the entropy model's change by the same factor.

        Raises:
            UserError: the file is no entry; it names the key.
        """
        where, name, values = f"'{path}'", path.stem, load_yaml(path)
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: an entry's name has letters, digits and . _ + - without spaces; rename it")
        of_model = renamed(values, TrainSettings.old_names)
        tokenizer, of_byte_lm = of_model.pop("tokenizer", None), of_model.pop("entropy_model", None)
        if not isinstance(of_byte_lm, dict | None):
            line = "is there already, and the clock counts its training; give the settings of that, with minutes"
            raise UserError(f"{where}: entropy_model: '{of_byte_lm}' {line}")
        scale = 1.0

        def training(part: dict[str, Any], folder: str, within: str = "", **more: str) -> TrainSettings:
            if not isinstance(part.get("minutes"), int | float) or part["minutes"] <= 0:
                raise UserError(f"{where}: {within}minutes: an entry trains for minutes; write minutes: {MINUTES:g}")
            for key, why in OF_THE_COMMAND.items():
                if any(f"{given}.".startswith(f"{key}.") for given in flat(part)):
                    raise UserError(f"{where}: {within}{key}: {why}; leave it out")
            data = {"train": str(text / "train.jsonl"), "valid": str(text / "tune.jsonl")}
            if tokenizer is not None and not within:
                data["tokenizer"] = str(out / name / TOKENIZER)
            given = {"run": str(out / name / folder), "minutes": scale * part["minutes"], "data": data, **more}
            return TrainSettings.parse(laid_over(part, given), f"{where}: {within}".rstrip(": ."))

        byte_lm = {} if of_byte_lm is None else {"entropy_model": str(out / name / "entropy_model")}
        model = training(of_model, "model", **byte_lm)
        needs_one = model.patching is not None and model.patching.needs_entropies
        if needs_one != (of_byte_lm is not None):
            line = "needs one: give the settings of its training, with minutes" if needs_one else "has no use for one"
            raise UserError(f"{where}: entropy_model: this model {line}")
        scale = minutes / model.minutes if minutes and model.minutes else 1.0
        entropy_model = None if of_byte_lm is None else training(of_byte_lm, "entropy_model", "entropy_model.")
        if entropy_model is not None and entropy_model.model.kind != "byte_lm":
            kind = NAMES[entropy_model.model.kind]
            raise UserError(f"{where}: entropy_model.model: a byte LM finds patches, no {kind}")
        given = None if tokenizer is None else TokenizerOfEntry.parse(tokenizer, f"{where}: tokenizer")
        return cls(name, values, given, entropy_model, training(of_model, "model", **byte_lm))


class SpeedrunResult(Settings):
    """What an entry reached.

    Attributes:
        entry: the configuration, as its file has it.
        minutes: of the clock; other ones than `MINUTES` make a trial.
        parameters, table_parameters: of the model; those of its hash tables apart.
        mean_patch_bytes: in training; of a token LM the mean token, of a byte LM 1.
        seconds: what the clock counted, by part: tokenizer, entropy model, threshold, model.
        threshold: of patches by entropy, in nats.
        training_flops: of the model, the entropy model's forward pass included.
        entropy_model_training_flops: of the entropy model's own training.
        held_out: exact, of the saved model.
        again: its bits per byte, measured once more in another process.
        text: SHA-256 by file.
        weights: digest of the model's files.
        digest: of everything else in the result.
    """

    name: str
    entry: dict[str, Any]
    minutes: float = Field(gt=0)
    kind: Literal["blt", "byte_lm", "token_lm"]
    parameters: int = Field(ge=1)
    table_parameters: int = Field(ge=0)
    steps: int = Field(ge=1)
    bytes_read: int = Field(ge=1)
    mean_patch_bytes: float = Field(ge=1)
    seconds: dict[str, float]
    threshold: float | None
    training_flops: float = Field(gt=0)
    entropy_model_training_flops: float = Field(ge=0)
    held_out: HeldOut
    again: float
    device: str
    versions: dict[str, str]
    date: str
    text: dict[str, str]
    weights: str
    digest: str = ""

    def signed(self) -> Self:
        return self.model_copy(update={"digest": self.own_digest()})

    def own_digest(self) -> str:
        return _sha256(self.model_dump(mode="json", exclude={"digest"}, exclude_unset=True))

    def problem(self) -> str | None:
        """Why it does not count; None if it does, perhaps as a trial."""
        if self.digest != self.own_digest():
            return "it was changed after it was written: its digest is another"
        if self.text != speedrun_text.PARTS:
            return "it is of another text than the speedrun's"
        if abs(self.again - self.held_out.bits_per_byte) > TOLERANCE:
            return f"its two measurements differ: {self.held_out.bits_per_byte:.5f} and {self.again:.5f} bits per byte"
        return None

    def trial(self) -> str:
        """Why it is a trial, and not for the table; empty for a result of ten minutes."""
        counted = sum(self.seconds.values())
        if self.minutes == MINUTES and counted <= SLACK * 60 * MINUTES:
            return ""
        return f"a trial, not for the table: the clock counted {counted:.1f} s of {self.minutes:g} minutes"


def read_result(path: Path) -> SpeedrunResult:
    """
    Raises:
        UserError: the file is no result; it names the key.
    """
    values = json_if_any(path)
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is no result of blt speedrun: it does not exist, or is not JSON; name a NAME.json")
    return SpeedrunResult.parse(values, where=f"'{path}'")


def table_of_results(folder: Path) -> str:
    """The results in a folder as a Markdown table, the best one first.

    Raises:
        UserError: there are none, or one is not for the table.
    """
    found = [(path, read_result(path)) for path in sorted(folder.glob("*.json"))]
    if not found:
        lacks = "holds no results, files NAME.json" if folder.is_dir() else "is no folder"
        raise UserError(f"table: '{folder}' {lacks}; blt speedrun ENTRY.yaml writes one into runs/speedrun")
    for path, result in found:
        why = result.problem() or result.trial() or ("" if result.name == path.stem else f"it is of '{result.name}'")
        if why:
            raise UserError(f"table: '{path}': {why}; remove it, or run the entry again")
    results = sorted((result for _, result in found), key=lambda result: result.held_out.bits_per_byte)
    return as_table(results, markdown=True)


def as_table(results: Sequence[SpeedrunResult], markdown: bool = False) -> str:
    groups = list(dict.fromkeys(group for result in results for group in result.held_out.by_category))
    header = ["entry", "model", "device", "date", "bits per byte", *groups, "read", "FLOPs", "seconds"]
    rows = []
    for result in results:
        bits, by = result.held_out.bits_per_byte, result.held_out.by_category
        flops = budget_name(result.training_flops + result.entropy_model_training_flops)
        row = [result.name, f"{NAMES[result.kind]}, {result.parameters / 1e6:,.1f} M", result.device, result.date]
        row += [number(bits, 4), *(number(by[group].bits_per_byte if group in by else None, 4) for group in groups)]
        rows.append([*row, amount_of_bytes(result.bytes_read), flops, f"{sum(result.seconds.values()):.0f}"])
    return aligned(header, rows, 4, markdown)


def check_speedrun_text(folder: Path) -> dict[str, str]:
    """SHA-256 of the parts of the text.

    Raises:
        UserError: it is not the speedrun's.
    """
    found = {}
    for name, wanted in speedrun_text.PARTS.items():
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"text: '{path}' does not exist; build it: python setup/build_corpus.py {folder} --speedrun, or name "
                "its folder: --text"
            )
        found[name] = str(digest_of(path)[1])
        if found[name] != wanted:
            raise UserError(
                f"text: '{path}' is not that of the speedrun (SHA-256 {found[name][:16]}..., wanted {wanted[:16]}...), "
                f"and no score counts on it; build it again: python setup/build_corpus.py {folder} --speedrun"
            )
    return found


def digest_of_model(folder: Path) -> str:
    """A digest of the names and contents of a model's files.

    Raises:
        UserError: there are none.
    """
    found = digests(folder) if folder.is_dir() else {}
    if not found:
        raise UserError(f"check: '{folder}' is no folder with a model; name the folder 'weights' of an entry")
    return _sha256(found)


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
