"""Training: settings, optimizer, checkpoints, metrics, the loop."""

from bytelatent.run_folder import read_metrics
from bytelatent.training.calibration import sample_entropies
from bytelatent.training.settings import TrainSettings
from bytelatent.training.trainer import train

__all__ = ["TrainSettings", "read_metrics", "sample_entropies", "train"]
