"""What a run learns from."""

from .base import ImageTask, Task, TextTask, build_model, build_task

__all__ = ["ImageTask", "Task", "TextTask", "build_model", "build_task"]
