"""What all results of a study depend on: kept in its folder, and compared at each start, whatever is left to do.

A row has the settings of its own run, and `training_text.py` compares the text. The rest is here: `basis.json` holds
the share of the warm-up and each entropy model: its settings or, of one from elsewhere, the fingerprint of its weights.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bytelatent.files import json_if_any, write_whole_json
from bytelatent.study.changes import began_otherwise, changed_settings, changed_values, inside
from bytelatent.study.plan import StudyPlan
from bytelatent.weights import fingerprint, load_byte_lm

BASIS = "basis.json"
TRAINED = "trained.json"  # in the folder of an entropy model that is ready


class Basis:
    """The basis of a study by its plan.

    Args:
        entropy_models: names of those that the chosen runs need.

    Raises:
        UserError: it is not the one that the study in this folder began with.
    """

    def __init__(self, plan: StudyPlan, folder: Path, entropy_models: Iterable[str]):
        self.path = folder / BASIS
        self._before = json_if_any(self.path) or {}
        now: dict[str, Any] = {"warmup_share": plan.warmup_share}
        changed = changed_values({key: self._before.get(key, value) for key, value in now.items()}, now)
        before, models = self._before.get("entropy_models", {}), dict[str, Any]()
        for name in entropy_models:
            where, settings = f"entropy_models.{name}", plan.entropy_model_settings(folder, name)
            own = plan.entropy_model_folder(folder, name)
            if settings is not None:
                models[name] = inside(settings, folder)
            else:
                models[name] = {"fingerprint": fingerprint(load_byte_lm(own, setting=where))}
            trained = json_if_any(folder / "entropy_models" / name / TRAINED) or {}
            then = before.get(name) or trained.get("settings")
            if then is not None:
                lines = changed_settings(then, models[name], fixed=("steps", "minutes"))
                changed += [f"{where}.{line}" for line in lines]
        if changed:
            raise began_otherwise(changed[0], folder)
        self._now = {**now, "entropy_models": {**models, **before}}

    def keep(self) -> None:
        """Write what is new."""
        if self._now != self._before:
            write_whole_json(self.path, self._now, indent=1)
