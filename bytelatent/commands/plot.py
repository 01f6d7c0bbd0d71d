"""`blt plot`: the paper's figures from models and runs."""

from collections import Counter

from bytelatent.commands.options import RowSettings
from bytelatent.commands.patch import PatchingModes, standard_input
from bytelatent.commands.plot_options import (
    PlotEntropiesSettings,
    PlotPatchesSettings,
    PlotRunsSettings,
    PlotStudySettings,
)
from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.evaluation import Texts
from bytelatent.model import ByteLM
from bytelatent.progress import Progress
from bytelatent.report import (
    compare_runs,
    figure_format,
    write_entropies_figure,
    write_patches_figure,
    write_runs_figure,
)
from bytelatent.study import read_rows
from bytelatent.study.page import write_study
from bytelatent.terminal import print_line
from bytelatent.text.documents import forget_logged, must_have_read
from bytelatent.vocab import to_bytes

OWN = "model"  # patching mode


def run(settings: Settings) -> None:
    if isinstance(settings, PlotEntropiesSettings):
        plot_entropies(settings)
    elif isinstance(settings, PlotPatchesSettings):
        plot_patches(settings)
    elif isinstance(settings, PlotRunsSettings):
        figure_format(settings.out)
        write_runs_figure(settings.out, compare_runs(settings.folders).runs, settings.against)
        print_line(str(settings.out))
    elif isinstance(settings, PlotStudySettings):
        for path in write_study(read_rows(settings.folders), settings.out):
            print_line(str(path))


def plot_entropies(settings: PlotEntropiesSettings) -> None:
    """
    Raises:
        UserError: there is no text, or the model's patches do not come from entropies.
    """
    figure_format(settings.out)
    text = standard_input() if settings.text is None else to_bytes(settings.text)
    if not text:
        raise UserError("text: it is empty; give some words to draw")
    modes = PatchingModes(settings.model, settings.context, settings.threshold)
    [(name, patches)] = modes.patched([OWN], text).items()
    if patches[0].entropies is None:
        raise UserError(f"model: '{settings.model}' finds patches by '{name}', without entropies; name a byte LM")
    write_entropies_figure(settings.out, text, patches, modes.thresholds.get(name))
    print_line(str(settings.out))


def plot_patches(settings: PlotPatchesSettings) -> None:
    """
    Raises:
        UserError: a model or the text is not there, or there are too many bad rows.
    """
    figure_format(settings.out)
    forget_logged()
    names = set(RowSettings.model_fields) | {"max_bytes"}
    texts = Texts([settings.text], **settings.model_dump(include=names))
    lengths: dict[str, Counter[int]] = {}
    for model in dict.fromkeys(settings.models):
        modes, lengths[model] = PatchingModes(model, settings.context, settings.threshold), Counter()
        if settings.threshold is None and isinstance(modes.model, ByteLM):
            raise UserError(f"threshold: '{model}' is a byte LM, which has none; give one: --threshold 1.3")
        with Progress(f"patches of {model}", settings.max_bytes, about=True) as progress:
            for sample in texts.read():
                [patches] = modes.patched([OWN], sample.document.text).values()
                lengths[model].update(patch.end - patch.start for patch in patches)
                progress.advance(len(sample.document.text))
        if not lengths[model]:
            must_have_read(texts.bad_rows.unread)
            raise UserError(f"text: '{settings.text}' holds no text; name files with some")
    write_patches_figure(settings.out, lengths)
    print_line(str(settings.out))
    must_have_read(texts.bad_rows.unread)
