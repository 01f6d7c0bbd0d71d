"""Work handed to a SLURM cluster: settings, the batch script, and what runs inside the job."""

from bytelatent.launch.settings import LaunchSettings
from bytelatent.launch.submit import launch

__all__ = ["LaunchSettings", "launch"]
