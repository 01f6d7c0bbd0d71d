"""Work handed to a SLURM cluster: settings, the batch script, and what runs inside the job."""

from bytelatent.launch.settings import LaunchSettings
from bytelatent.launch.submit import filled_in, launch

__all__ = ["LaunchSettings", "filled_in", "launch"]
