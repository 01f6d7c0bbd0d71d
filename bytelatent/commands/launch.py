"""Hand a script to a SLURM cluster: code, settings and batch script go into one folder, and the folder to sbatch.

python -m bytelatent.stool script=bytelatent.train config=CONFIG.yaml nodes=2 partition=PARTITION
python -m bytelatent.stool script=bytelatent.train config=CONFIG.yaml dump_dir=runs/mine ngpu=8 time=24:00:00 \\
    -- steps=20000 optimizer.lr=1e-3        # after --: settings of the script itself
python -m bytelatent.stool script=bytelatent.train config=CONFIG.yaml dry_run=true    # write it and submit nothing
sbatch DUMP_DIR/submit.slurm                # start it again: training goes on from its last checkpoint

Keys: {keys}
What each means: docs/cluster.md, and `blt launch --help`.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from bytelatent import log
from bytelatent.command_line import ParsedSettings
from bytelatent.commands.options import LaunchArguments
from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.launch import LaunchSettings, launch, with_defaults
from bytelatent.terminal import print_line

USAGE = "name a script and its settings: python -m bytelatent.stool script=bytelatent.train config=PATH nodes=1"
TRAIN = "bytelatent.train"
SETTINGS = {  # what the package's own scripts read
    TRAIN: ("bytelatent.training", "TrainSettings"),
    "bytelatent.generate": ("bytelatent.commands.options", "GenerateSettings"),
}


def run(settings: LaunchArguments) -> None:
    print_line(launch_script(settings.model_dump(exclude={"settings"}, exclude_unset=True), settings.settings))


def main(arguments: list[str]) -> str:
    """Launch what `key=value` says, and after `--` the script's own.

    Raises:
        UserError: a key, a value or a path is invalid, or the cluster refuses the job.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, of_script = arguments[:cut], arguments[cut + 1 :]
    if not own:
        raise UserError(USAGE)
    if {"-h", "--help"} & set(own):
        return (__doc__ or "").strip().format(keys=", ".join(LaunchSettings.model_fields))
    return launch_script(_values(own), of_script)


def command(arguments: list[str]) -> None:
    log.configure()
    print_line(main(arguments))


def launch_script(values: dict[str, Any], of_script: list[str]) -> str:
    """Launch a script.

    Args:
        values: of `LaunchSettings`.
        of_script: settings of the script, laid over those of `config`.

    Returns:
        One line about the job.

    Raises:
        UserError: a key, a value or a path is invalid, or the cluster refuses the job.
    """
    settings = LaunchSettings.parse(values)
    given = ParsedSettings(_settings_of(settings.script) or Settings)
    if settings.config is not None:
        given.read_file(settings.config)
    given.lay_over(of_script)
    config = given.values
    if not config:
        raise UserError(USAGE)
    training = settings.script == TRAIN
    dump_dir = settings.dump_dir or (training and config.get("run")) or f"runs/{_name(settings)}"
    requeue = settings.requeue if settings.requeue is not None else training
    settings = with_defaults(
        LaunchSettings.parse({**settings.plain(), "dump_dir": str(Path(dump_dir).absolute()), "requeue": requeue})
    )
    if training:
        if values.get("dump_dir") and any(argument.startswith("run=") for argument in of_script):
            raise UserError("run: dump_dir is the run's folder; leave one of them out")
        config["run"] = settings.dump_dir
    if settings.script in SETTINGS:  # here and now, and not once the job has waited for its nodes
        checked = given.settings()
        if training:
            _check_training(checked, settings)
    return launch(settings, config)


def _settings_of(script: str) -> type[Settings] | None:
    if script not in SETTINGS:
        return None
    module, name = SETTINGS[script]
    return getattr(import_module(module), name)


def _values(arguments: list[str]) -> dict[str, str]:
    """Keys and values as text: read as YAML, 12:00:00 would be a number."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise UserError(f"'{argument}' is not a setting; write key=value, as in nodes=2")
        if "." in key:
            raise UserError(f"{key}: settings of the script stand after --, as in: ... nodes=1 -- {argument}")
        values[key] = value
    return {key: value for key, value in values.items() if value not in ("", "null")}


def _name(settings: LaunchSettings) -> str:
    return settings.name or Path(settings.config or settings.script.replace(".", "_")).stem


def _check_training(training: Any, settings: LaunchSettings) -> None:
    """Check what the job's processes can do, and, unless nothing is submitted, its inputs: it runs in this folder."""
    import torch

    from bytelatent.training.checks import check_inputs, check_settings

    device = torch.device("cuda" if settings.ngpu else "cpu")
    check_settings(training, settings.nodes * settings.processes, device)
    if not settings.dry_run:
        check_inputs(training, f" (the job looks for it from '{Path.cwd()}')")
