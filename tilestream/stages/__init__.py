"""The steps of a run, one file each: a configuration in, artefacts in the run's folder out; and pipelines of them."""

from .base import ClusterConfig, Context, Stage, StageConfig, parse
from .dashboard import page_of
from .models import convert_checkpoint
from .pipeline import STAGES, Pipeline, find, load, run_pipeline
from .plan import plan_text
from .runner import execute
from .upkeep import clear, verify

__all__ = [
    "STAGES",
    "ClusterConfig",
    "Context",
    "Pipeline",
    "Stage",
    "StageConfig",
    "clear",
    "convert_checkpoint",
    "execute",
    "find",
    "load",
    "page_of",
    "parse",
    "plan_text",
    "run_pipeline",
    "verify",
]
