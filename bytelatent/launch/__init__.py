"""Jobs of a SLURM cluster: settings, the batch script, and the processes inside the job."""

from bytelatent.launch.settings import LaunchSettings
from bytelatent.launch.submit import launch, with_defaults

__all__ = ["LaunchSettings", "launch", "with_defaults"]
