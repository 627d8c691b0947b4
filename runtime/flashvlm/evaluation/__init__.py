"""What fewer visual tokens cost in accuracy: a pipeline over tasks, through its own code.

tasks.py       a task: questions, their answers and a metric
metrics.py     how an answer is judged
runner.py      EvalRun: a pipeline over a task at some budgets
results.py     Prediction, and files of them
statistics.py  means and paired differences with intervals

A benchmark is added as one file: a function that gives a ``Task``.
"""

from flashvlm.evaluation.metrics import Metric, exact_match
from flashvlm.evaluation.results import Prediction
from flashvlm.evaluation.runner import EvalRun, scores
from flashvlm.evaluation.statistics import Bootstrap, Interval
from flashvlm.evaluation.tasks import Item, Task

__all__ = ["Bootstrap", "EvalRun", "Interval", "Item", "Metric", "Prediction", "Task", "exact_match", "scores"]
