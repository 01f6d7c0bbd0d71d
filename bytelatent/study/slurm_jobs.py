"""The jobs of a study on a SLURM cluster: each is launched once, and again where it ended without its row."""

from bytelatent.errors import UserError
from bytelatent.launch import SUBMIT, LaunchSettings, launch, slurm, with_defaults
from bytelatent.study.worker import StudyJob

SCRIPT = "bytelatent.study.worker"
JOBS = "jobs"  # the folder of batch scripts and logs


def submit_job(job: StudyJob, given: dict[str, str]) -> str:
    """Submit a job, unless it is in the queue.

    Args:
        given: settings of the job, as `blt launch` takes them.

    Returns:
        A line about it.

    Raises:
        UserError: a setting is wrong, or SLURM rejects the job.
    """
    folder = job.place / JOBS / job.name
    script = folder / SUBMIT
    if script.is_file() and (number := slurm.job_of(script)) is not None:
        return f"{job.name}: job {number} is pending or runs"
    settings = LaunchSettings.parse(
        {"requeue": True, **given, "script": SCRIPT, "dump_dir": str(folder), "override": True}, "slurm"
    )
    if settings.ngpu is None:
        node = slurm.largest_node(settings.partition)
        settings = settings.model_copy(update={"ngpu": 1 if node is None else min(node.num_gpus, 1)})
    settings = with_defaults(settings)
    if settings.nodes * settings.processes > 1:
        raise UserError(
            f"slurm: a run of a study is one process, not {settings.nodes * settings.processes}; take nodes=1 ngpu=1"
        )
    return f"{job.name}: {launch(settings, job.plain())}"
