"""What the runs of a study share, made once and kept in its folder: tokenizers, entropy models, measurements of text.

text.json              the size of the training text, and the state of all text
tokenizers/8192.json   of each vocabulary
entropy_models/NAME/   a training run of each
measured/DIGEST.json   the mean patch or token, of each tokenizer or patching
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bytelatent.data import DataSettings, Loader, Patcher, SourceSettings
from bytelatent.device import choose_device, choose_dtype
from bytelatent.errors import UserError
from bytelatent.files import json_if_any, whole_file, write_whole_json
from bytelatent.inference import FastEntropies
from bytelatent.model import ModelSettings
from bytelatent.run_folder import read_metrics
from bytelatent.study.basis import TRAINED
from bytelatent.study.cost import MeasuredText, PlannedRun, picked, run_cost
from bytelatent.study.plan import Draft, StudyPlan
from bytelatent.study.training_text import TrainingText
from bytelatent.text.tokenizer import Tokenizer, train_tokenizer
from bytelatent.training import TrainSettings, train
from bytelatent.training.calibration import calibrate_on
from bytelatent.vocab import BYTES, Vocabulary
from bytelatent.weights import find_byte_lm, fingerprint, load_byte_lm

LOGGER = logging.getLogger(__name__)

MEASUREMENTS = "measurements"  # a part of what runs share
FEWEST_BATCHES = 8  # that a measurement reads


class Shared:
    """The shared parts of a study.

    Args:
        folder: of the study.
        writes: keep what is measured.
    """

    def __init__(self, plan: StudyPlan, folder: Path, writes: bool = True):
        self.plan, self.folder, self.writes = plan, folder, writes
        self.text = TrainingText(plan.text, folder, writes)
        self._measured: dict[str, MeasuredText] = {}
        self._expected: dict[str, MeasuredText] = {}
        self._stand_ins: dict[str, Tokenizer] = {}

    # Tokenizers and entropy models

    def make_tokenizer(self, path: Path) -> None:
        """Train a tokenizer, if it is not there; its file is named by its vocabulary."""
        if path.is_file():
            return
        LOGGER.info(f"tokenizer of {int(path.stem):,} ids")
        documents = self.text.documents("train", f"tokenizer of {int(path.stem):,} ids", self.plan.text.tokenizer_bytes)
        text = train_tokenizer(documents, int(path.stem))
        with whole_file(path) as aside:
            aside.write_text(text, encoding="utf-8")

    def make_entropy_model(self, name: str) -> None:
        """Train an entropy model, if it is not there."""
        settings = self._entropy_model_settings(name)
        if settings is None or self.has_entropy_model(name):
            return
        LOGGER.info(f"entropy model '{name}'")
        run = train(settings)
        flops = self._flops_of(settings, run)
        write_whole_json(run / TRAINED, {"training_flops": flops, "settings": settings.shown()}, indent=1)

    def has_entropy_model(self, name: str) -> bool:
        """Whether it is ready. That it is the plan's is in the basis."""
        settings = self._entropy_model_settings(name)
        return settings is None or (Path(settings.run) / TRAINED).is_file()

    def entropy_model_flops(self, name: str | None) -> float | None:
        """What training an entropy model cost; 0 without one, None where that is not known."""
        if name is None:
            return 0.0
        settings = self._entropy_model_settings(name)
        if settings is not None:
            return (json_if_any(Path(settings.run) / TRAINED) or {}).get("training_flops")
        known = json_if_any(self.plan.entropy_model_folder(self.folder, name) / TRAINED)
        return None if known is None else known.get("training_flops")

    def _entropy_model_settings(self, name: str) -> TrainSettings | None:
        return self.plan.entropy_model_settings(self.folder, name)

    def _flops_of(self, settings: TrainSettings, run: Path) -> float:
        measured = self._measure_batches(settings.data, None)
        cost = run_cost(settings.model, 1.0, measured.context_bytes)
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "bits_per_byte" in row]
        return cost.flops_per_byte * rows[-1]["bytes_seen"]

    def entropy_model_shape(self, name: str | None) -> ModelSettings | None:
        if name is None:
            return None
        settings = self._entropy_model_settings(name)
        if settings is not None:
            return settings.model
        folder = self.plan.entropy_model_folder(self.folder, name)
        return find_byte_lm(folder, False, f"entropy_models.{name}")[0].config.model

    # Measurements

    def measured(self, draft: Draft) -> MeasuredText:
        """What batches hold, by measurement with all that the run needs, which must be there; kept once made."""
        key = self._key(draft)
        path = self.folder / "measured" / f"{key}.json"
        if key not in self._measured:
            known = json_if_any(path)
            if known is None:
                self._measured[key] = self._measure(draft)
                if self.writes:
                    write_whole_json(path, self._measured[key].plain(), indent=1)
            else:
                self._measured[key] = MeasuredText.parse(known, str(path))
        return self._measured[key]

    def expected(self, draft: Draft) -> MeasuredText:
        """The same, where what is needed may not be there yet; then something takes its place."""
        settings, key = draft.settings, self._key(draft)
        if key in self._measured or (self.folder / "measured" / f"{key}.json").is_file():
            return self.measured(draft)
        if key not in self._expected:
            wanted = settings.calibration.patch_bytes if settings.calibration is not None else None
            wanted = wanted or (settings.data.patch_bytes if "data.patch_bytes" in draft.given else None)
            if draft.entropy_model is not None and wanted is not None:
                data = settings.data.model_copy(update={"batch_patches": None, "patch_bytes": None})
                batches = self._measure_batches(data, None)
                self._expected[key] = batches.model_copy(update={"unit_bytes": wanted, "is_expected": True})
            elif settings.data.tokenizer is not None and not Path(settings.data.tokenizer).is_file():
                tokenizer = self._stand_in(settings.data.tokenizer)
                self._expected[key] = self._measure_tokens(draft, tokenizer, is_expected=True)
            else:
                self._must_have(draft)
                return self.measured(draft)
        return self._expected[key]

    def _must_have(self, draft: Draft) -> None:
        if draft.entropy_model is not None and not self.has_entropy_model(draft.entropy_model):
            raise UserError(
                f"{draft.where}: the mean patch is not known before the entropy model is trained; give "
                "calibration.patch_bytes, or the size that is expected: data.patch_bytes"
            )

    def _key(self, draft: Draft) -> str:
        """Of all that decides what batches hold, wherever the folder is."""
        settings, text = draft.settings, self.plan.text
        data = settings.data.plain()
        for name in ("valid", "workers", "allow_changed"):
            data.pop(name)
        data["tokenizer"] = data["tokenizer"] and Path(data["tokenizer"]).name
        entropy_model = None
        if draft.entropy_model is not None:
            own = self._entropy_model_settings(draft.entropy_model)
            entropy_model = draft.entropy_model if own is None else {**own.plain(), "run": None}
        given = [settings.patching, settings.calibration]
        parts = [data, *(part and part.plain() for part in given), entropy_model, text.measured_bytes]
        parts += [settings.dtype, self.text.state]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _measure(self, draft: Draft) -> MeasuredText:
        settings = draft.settings
        if settings.data.tokenizer is not None:
            return self._measure_tokens(draft, Tokenizer.read(settings.data.tokenizer))
        if settings.patching is None:
            return self._measure_batches(settings.data, None)
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        byte_lm = threshold = mark = None
        patching = settings.patching
        if settings.entropy_model is not None:
            byte_lm = load_byte_lm(settings.entropy_model, dtype="float32", setting="entropy_model")
            mark = fingerprint(byte_lm)
            byte_lm = byte_lm.to(device)
        if settings.calibration is not None:
            found = calibrate_on(byte_lm, self._of_sample(settings.data), settings.calibration, patching, device, dtype)
            threshold = found.threshold
            patching = patching.model_copy(update={"threshold": threshold})
        patcher = Patcher(patching, byte_lm, dtype, mark, FastEntropies.where_possible(byte_lm, device, dtype))
        data, patch_bytes = settings.data, None
        if data.patch_bytes is not None and "data.patch_bytes" not in draft.given:
            data = data.model_copy(update={"patch_bytes": None})
            patch_bytes = round(self._measure_batches(data, patcher).unit_bytes, 3)
            data = data.model_copy(update={"patch_bytes": patch_bytes})
        measured = self._measure_batches(data, patcher)
        return measured.model_copy(update={"threshold": threshold, "patch_bytes": patch_bytes})

    def _measure_tokens(self, draft: Draft, tokenizer: Tokenizer, is_expected: bool = False) -> MeasuredText:
        """So that batches hold as many bytes as those of other families, `data.patch_bytes` is the mean token."""
        data = draft.settings.data
        measured = self._measure_batches(data, None, tokenizer).model_copy(update={"is_expected": is_expected})
        if data.patch_bytes is not None:
            return measured
        patch_bytes = round(measured.unit_bytes, 3)
        sized = data.model_copy(update={"patch_bytes": patch_bytes})
        batch_bytes = measured.batch_bytes * sized.batch_ids / data.batch_ids
        return measured.model_copy(update={"batch_bytes": batch_bytes, "patch_bytes": patch_bytes})

    def _of_sample(self, data: DataSettings) -> DataSettings:
        """The data of a run with a sample of its training text, from all over it."""
        return data.model_copy(update={"train": [SourceSettings(path=str(self.text.sample))], "workers": 0})

    def _measure_batches(
        self, data: DataSettings, patcher: Patcher | None, vocabulary: Vocabulary = BYTES
    ) -> MeasuredText:
        """Read a sample of the text in batches as training does, and count."""
        num_bytes = num_units = num_ids = num_batches = 0
        positions = 0.0
        with Loader(self._of_sample(data), 0, patcher, vocabulary=vocabulary) as loader:
            while num_bytes < self.text.sample_bytes or num_batches < FEWEST_BATCHES:
                batch = next(loader)
                own = batch.stream.document.numpy() >= 0  # not padding
                positions += float(batch.stream.position.numpy()[own].sum(dtype=np.float64))
                num_bytes += batch.num_bytes
                num_units += batch.num_patches
                num_ids += batch.num_ids
                num_batches += 1
        context_ids = 2 * positions / num_ids + 1  # whose mean position is the same
        return MeasuredText(
            unit_bytes=max(num_bytes / num_units, 1.0) if num_units else 1.0,
            batch_bytes=num_bytes / num_batches,
            context_bytes=max(context_ids * num_bytes / num_ids, 1.0),
            text_bytes=num_bytes,
        )

    def _stand_in(self, path: str) -> Tokenizer:
        """A tokenizer of as many ids, of less text."""
        if path not in self._stand_ins:
            documents = self.text.documents("train", f"expecting {Path(path).stem} ids", self.plan.text.measured_bytes)
            self._stand_ins[path] = Tokenizer(train_tokenizer(documents, int(Path(path).stem)))
        return self._stand_ins[path]

    # Runs

    def planned(self, sizes: Sequence[Draft], is_final: bool = False) -> PlannedRun:
        """A run with its cost.

        Args:
            sizes: from which one is picked.
            is_final: all that it needs is there.

        Raises:
            UserError: it cannot be run as planned.
        """
        runs = []
        for draft in sizes:
            measured = self.measured(draft) if is_final else self.expected(draft)
            shape = self.entropy_model_shape(draft.entropy_model)
            cost = run_cost(draft.settings.model, measured.unit_bytes, measured.context_bytes, shape)
            runs.append(PlannedRun(draft, measured, cost, self.text.train_bytes, self.plan.warmup_share))
        return picked(self.plan, runs)

    def needs(self, drafts: Sequence[Draft]) -> list[str]:
        """The tokenizers and entropy models of runs that are not there yet, as `make` takes them."""
        vocabularies = {d.settings.data.tokenizer for d in drafts if d.settings.data.tokenizer is not None}
        models = {d.entropy_model for d in drafts if d.entropy_model is not None}
        found = [f"tokenizer {Path(path).stem}" for path in sorted(vocabularies) if not Path(path).is_file()]
        return found + [f"entropy_model {name}" for name in sorted(models) if not self.has_entropy_model(name)]

    def missing(self, drafts: Sequence[Draft]) -> list[str]:
        """The same, and at last the measurements, if some are not made yet."""
        is_known = all((self.folder / "measured" / f"{self._key(draft)}.json").is_file() for draft in drafts)
        return self.needs(drafts) + [MEASUREMENTS] * (not is_known)

    def make(self, part: str, drafts: Sequence[Draft]) -> None:
        """Make a part of those that `missing` names."""
        kind, _, name = part.partition(" ")
        if kind == "tokenizer":
            self.make_tokenizer(self.folder / "tokenizers" / f"{name}.json")
        elif kind == "entropy_model":
            self.make_entropy_model(name)
        else:
            for draft in drafts:
                self.measured(draft)
