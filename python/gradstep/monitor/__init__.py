"""gradstep.monitor: what a training does, recorded, watched, written and drawn.

A `Monitor` takes the statistics of each step (``optimizer.step(grads, stats=True)``), the loss and metrics. It warns of
vanishing, exploding and dead gradients and of divergence, tells convergence by criteria that are of use on their own as well
(`EarlyStopping`, `Plateau`, `RelativeChange`), writes CSV, JSON lines and TensorBoard events, and draws with matplotlib.

>>> from gradstep.monitor import EarlyStopping, Monitor
>>> monitor = Monitor(watch={"validation/accuracy": EarlyStopping(patience=2, mode="max")}, warn=False)
>>> for epoch, accuracy in enumerate([0.7, 0.8, 0.79, 0.78]):
...     events = monitor.record(loss=1.0 / (1 + epoch), lr=0.1)
...     events = monitor.validate(accuracy=accuracy)
>>> monitor.stop
True
>>> print(events[0])
step 4: validation/accuracy: no better for 2 values; the best is 0.8, of step 2
"""

from gradstep.monitor.alarms import (
    DeadParameterWarning,
    DivergenceWarning,
    Event,
    ExplodingGradientWarning,
    Thresholds,
    TrainingWarning,
    VanishingGradientWarning,
)
from gradstep.monitor.criteria import Criterion, EarlyStopping, Plateau, RelativeChange
from gradstep.monitor.monitor import Monitor
from gradstep.monitor.table import Table
from gradstep.monitor.writers import CSVWriter, JSONLinesWriter, TensorBoardWriter, Writer

__all__ = [
    "CSVWriter",
    "Criterion",
    "DeadParameterWarning",
    "DivergenceWarning",
    "EarlyStopping",
    "Event",
    "ExplodingGradientWarning",
    "JSONLinesWriter",
    "Monitor",
    "Plateau",
    "RelativeChange",
    "Table",
    "TensorBoardWriter",
    "Thresholds",
    "TrainingWarning",
    "VanishingGradientWarning",
    "Writer",
]
