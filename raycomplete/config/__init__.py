"""The typed run file: every setting of a run, checked before torch is imported.

A run file is YAML. Command lines may override single values (`train.steps=50`). Unknown keys are refused with the
nearest known one, and relative paths are resolved against the folder of the run file.
"""

from raycomplete.config.diagnosis import DiagnoseConfig, PromptSource
from raycomplete.config.engines import ClusterConfig, PromptAugmentationConfig, RolloutConfig, TeacherConfig
from raycomplete.config.evaluation import EvaluationConfig, RemoteConfig
from raycomplete.config.loading import dump, load_run_file, map_paths, parse
from raycomplete.config.run import OutputConfig, PromptSets, RunConfig
from raycomplete.config.serving import ServeConfig
from raycomplete.config.training import TrainConfig, ValidationConfig
from raycomplete.runtime.section import Dtype

__all__ = [
    "ClusterConfig",
    "DiagnoseConfig",
    "Dtype",
    "EvaluationConfig",
    "OutputConfig",
    "PromptAugmentationConfig",
    "PromptSets",
    "PromptSource",
    "RemoteConfig",
    "RolloutConfig",
    "RunConfig",
    "ServeConfig",
    "TeacherConfig",
    "TrainConfig",
    "ValidationConfig",
    "dump",
    "load_run_file",
    "map_paths",
    "parse",
]
