"""Tasks and texts that need no download. Imports nothing of the package but itself; training and evaluation use it."""

from flux_attention.data.sample import HOLISTIC, METRICS, RETRIEVAL, TASK_CLASSES, Sample
from flux_attention.data.tasks import TASKS, Task, get_task, make_sample, make_samples, training_tasks

__all__ = [
    "HOLISTIC",
    "METRICS",
    "RETRIEVAL",
    "TASKS",
    "TASK_CLASSES",
    "Sample",
    "Task",
    "get_task",
    "make_sample",
    "make_samples",
    "training_tasks",
]
