"""The monitor: takes the statistics of each step, and passes them to history, alarms, criteria and writers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gradstep.monitor import plots
from gradstep.monitor.alarms import CATEGORIES, Alarms, DivergenceWarning, Event, Thresholds
from gradstep.monitor.checks import check_choice, check_count, number
from gradstep.monitor.criteria import Criterion
from gradstep.monitor.table import Table
from gradstep.monitor.writers import STATS_COLUMNS, Writer, stats_row
from gradstep.stats import StepStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self

    from gradstep.stats import Stats

_PARAMETER_COLUMNS = ("grad_norm", "update_norm", "param_norm", "update_ratio")
_RESERVED = frozenset(["step", "loss", "lr", *STATS_COLUMNS, "kind", "parameters"])
_VALIDATION = "validation/"


class Monitor:
    """Watches a training: records statistics and metrics, warns, tells when to stop, writes and draws.

    Call `record` after every step, and `validate` after every validation.

    Args:
        thresholds: when to warn.
        watch: criteria by the name of the value that each looks at: ``loss``, ``grad_norm`` or any other column or metric of
            steps; for a metric of validations ``validation/`` and its name. One criterion, or a sequence of them.
        writers: where records go as they come.
        on_event: called with each event.
        warn: whether events with a category are issued as Python warnings. `events` has them in any case.
        keep: the most records that `history` and `validation` hold each, spread evenly over the run; None for all.
        keep_parameters: the same for `parameters`, 0 for none.

    Attributes:
        history: table of the steps: step, loss, lr, the statistics of `StepStats` and its update ratio, and the metrics.
        validation: table of the validations.
        parameters: table of each parameter's statistics: columns ``(key, "grad_norm")``, ``update_norm``, ``param_norm``,
            ``update_ratio``, and ``step``.
        keys: the keys of the parameters, in the order in which they came.
        events: all events so far.
        step: the newest step, 0 before the first.
        watch: the criteria, a list for each name.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of range.

    >>> from gradstep.monitor import RelativeChange
    >>> monitor = Monitor(watch={"loss": RelativeChange(1e-3, window=3)})
    >>> for loss in [2.0, 1.0, 0.9999, 0.9998]:
    ...     events = monitor.record(loss=loss)
    >>> monitor.stop, str(events[0])
    (True, 'step 4: loss: the last 3 values lie between 0.9998 and 1')
    >>> monitor.history["loss"]
    array([2.    , 1.    , 0.9999, 0.9998])
    """

    def __init__(
        self,
        *,
        thresholds: Thresholds | None = None,
        watch: Mapping[str, Criterion | Sequence[Criterion]] | None = None,
        writers: Iterable[Writer] = (),
        on_event: Callable[[Event], object] | None = None,
        warn: bool = True,
        keep: int | None = 100_000,
        keep_parameters: int | None = 1000,
    ) -> None:
        for where, value in (("keep", keep), ("keep_parameters", keep_parameters)):
            if value is not None:
                check_count(f"Monitor: {where}", value, least=0)
        self.history, self.validation, self.parameters = Table(keep), Table(keep), Table(keep_parameters)
        self.keys: list[Hashable] = []
        self.events: list[Event] = []
        self.step = 0
        self.watch = {name: list(one) if isinstance(one, Sequence) else [one] for name, one in (watch or {}).items()}
        for name, criteria in self.watch.items():
            for one in criteria:
                if not isinstance(one, Criterion):
                    raise TypeError(f"Monitor: watch[{name!r}] must be a Criterion, got {type(one).__name__}")
        self.writers, self.on_event, self.warn = list(writers), on_event, warn
        self._alarms = Alarms(thresholds or Thresholds())
        self._known_keys: set[Hashable] = set()

    # ---- recording --------------------------------------------------------------------------------------------------------

    def record(
        self, stats: StepStats | None = None, *, loss: Any = None, lr: Any = None, step: int | None = None, **metrics: Any
    ) -> list[Event]:
        """Record a step, and return the events that it causes.

        Args:
            stats: what ``optimizer.step(grads, stats=True)`` returned.
            loss: the training loss.
            lr: the learning rate.
            step: the number of the step; by default that of `stats`, or the newest and one.
            metrics: more numbers. They, loss and lr may be arrays or tensors of one element.

        Raises:
            TypeError: if a value is no number, or a metric has the name of another column.

        Warns:
            TrainingWarning: for an event with a category, unless `warn` is False. The step has been recorded then.
        """
        if step is None:
            step = self.step + 1 if stats is None else stats.step
        row: dict[str, float] = {"step": step}
        for name, value in {"loss": loss, "lr": lr}.items():
            if value is not None:
                row[name] = number(f"Monitor.record: {name}", value)
        row |= {} if stats is None else stats_row(stats)
        for name, value in metrics.items():
            if name in _RESERVED or name.startswith(_VALIDATION):
                raise TypeError(f"Monitor.record: metrics[{name!r}] has a name that is taken")
            row[name] = number(f"Monitor.record: metrics[{name!r}]", value)
        parameters = {} if stats is None else stats.parameters
        for writer in self.writers:
            writer.write_step(row, parameters)
        self.step = step
        self.history.append(row)
        if stats is not None:
            self._record_parameters(step, parameters)
        events = self._alarms.check(step, stats, row.get("loss"))
        return self._finish([*events, *self._look(step, row, "")])

    def validate(self, *, step: int | None = None, **metrics: Any) -> list[Event]:
        """Record the metrics of a validation, and return the events that it causes: criteria whose condition is met.

        Args:
            step: the number of the step after which it was made; by default the newest.
            metrics: numbers, or arrays or tensors of one element. A metric ``loss`` is drawn beside the training loss.

        Raises:
            TypeError: if there is no metric, or one is no number or has the name of another column.
        """
        if not metrics:
            raise TypeError("Monitor.validate: metrics must not be empty")
        row: dict[str, float] = {"step": self.step if step is None else step}
        for name, value in metrics.items():
            if name == "kind":
                raise TypeError(f"Monitor.validate: metrics[{name!r}] has a name that is taken")
            row[name] = number(f"Monitor.validate: metrics[{name!r}]", value)
        for writer in self.writers:
            writer.write_validation(row)
        self.validation.append(row)
        return self._finish(self._look(int(row["step"]), row, _VALIDATION))

    def _record_parameters(self, step: int, parameters: Mapping[Hashable, Stats]) -> None:
        for key in parameters:
            if key not in self._known_keys:
                self._known_keys.add(key)
                self.keys.append(key)
        row: dict[Any, float] = {}
        if self.parameters.keeps_next:
            row["step"] = step
            for key, one in parameters.items():
                for name in _PARAMETER_COLUMNS:
                    row[key, name] = getattr(one, name)
        self.parameters.append(row)

    def _look(self, step: int, row: Mapping[str, float], prefix: str) -> list[Event]:
        """Show each criterion its value, and return those whose condition was not met before."""
        events = []
        for name, value in row.items():
            for criterion in self.watch.get(prefix + name, ()):
                before = criterion.reached
                if criterion.update(value, step) and not before:
                    events.append(Event("reached", step, f"{prefix}{name}: {criterion.describe()}"))
        return events

    def _finish(self, events: list[Event]) -> list[Event]:
        self.events += events
        for event in events:
            for writer in self.writers:
                writer.write_event(event)
        for event in events:
            if self.on_event is not None:
                self.on_event(event)
        for event in events:  # last: where warnings are errors, the first one leaves
            if self.warn and event.category is not None:
                warnings.warn(str(event), event.category, stacklevel=3)
        return events

    # ---- what it has found ------------------------------------------------------------------------------------------------

    @property
    def alarms(self) -> frozenset[str]:
        """The kinds of event, of those that warn, whose condition has not gone."""
        return self._alarms.raised

    @property
    def diverged(self) -> bool:
        """Whether an alarm of divergence has not gone."""
        return any(CATEGORIES[kind] is DivergenceWarning for kind in self.alarms)

    @property
    def reached(self) -> list[str]:
        """The names in `watch` with a criterion whose condition is met now."""
        return [name for name, criteria in self.watch.items() if any(one.reached for one in criteria)]

    @property
    def stop(self) -> bool:
        """Whether the condition of any criterion is met now."""
        return bool(self.reached)

    # ---- pictures ---------------------------------------------------------------------------------------------------------

    def plot_losses(self, *, log: bool = False, smooth: int = 1) -> Figure:
        """Draw training loss, validation loss and learning rate over the steps. Values that are not finite are left out.

        Args:
            log: whether the loss has a logarithmic scale.
            smooth: how many training losses to take the mean of.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if no loss has been recorded, or `smooth` is less than 1.
        """
        check_count("Monitor.plot_losses: smooth", smooth)
        figure = plots.new_figure(8, 4)
        plots.draw_losses(figure.subplots(), self.history, self.validation, log=log, smooth=smooth)
        return figure

    def plot_gradients(self, *, over: Literal["steps", "parameters"] = "steps") -> Figure:
        """Draw how gradients flow: gradient norm and update ratio of each parameter.

        Args:
            over: "steps" for heat maps of the parameters over time, in which zeros are black, missing values and NaN grey, and
                infinities red; "parameters" for curves over the parameters, which show where gradients vanish on their way
                through the layers.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if no statistics of parameters have been kept, or `over` is something else.
        """
        check_choice("Monitor.plot_gradients: over", over, ("steps", "parameters"))
        if not self.keys or not len(self.parameters):
            raise ValueError("Monitor.plot_gradients: no statistics of parameters have been kept")
        names = plots.flow_names()
        if over == "steps":
            figure = plots.new_figure(9, 2 * min(1.5 + 0.15 * len(self.keys), 7))
            for axes, name in zip(figure.subplots(2, 1, sharex=True), names, strict=True):
                plots.draw_flow_over_time(figure, axes, self.parameters, self.keys, name)
        else:
            figure = plots.new_figure(min(6 + 0.15 * len(self.keys), 14), 7)
            for axes, name in zip(figure.subplots(2, 1, sharex=True), names, strict=True):
                plots.draw_flow_over_layers(axes, self.parameters, self.keys, name)
        return figure

    def save(self, path: str | os.PathLike[str], *, log: bool = False, smooth: int = 1) -> None:
        """Save all that there is to draw as one picture: the losses, and the gradients over the steps.

        Args:
            path: the file; its ending is the format.
            log: whether the loss has a logarithmic scale.
            smooth: how many training losses to take the mean of.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if no loss has been recorded, or `smooth` is less than 1.
        """
        check_count("Monitor.save: smooth", smooth)
        flows = plots.flow_names() if self.keys and len(self.parameters) else []
        heights = [4.0, *[min(1.5 + 0.15 * len(self.keys), 7)] * len(flows)]
        figure = plots.new_figure(9, sum(heights))
        first, *others = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        plots.draw_losses(first, self.history, self.validation, log=log, smooth=smooth)
        if flows:
            first.label_outer()
        for axes, name in zip(others, flows, strict=True):
            plots.draw_flow_over_time(figure, axes, self.parameters, self.keys, name)
        figure.savefig(path)

    # ---- saving -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later run needs to go on, as plain numbers, strings, lists and dicts: not settings and writers."""
        return {
            "step": self.step,
            "history": self.history.state_dict(),
            "validation": self.validation.state_dict(),
            "parameters": self.parameters.state_dict(),
            "keys": list(self.keys),
            "events": [[event.kind, event.step, event.message, list(event.parameters)] for event in self.events],
            "alarms": self._alarms.state_dict(),
            "watch": {name: [one.state_dict() for one in criteria] for name, criteria in self.watch.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned: history, events, what alarms and criteria have seen.

        Args:
            state_dict: of a monitor with the same kinds of criteria under the same names.

        Raises:
            ValueError: if the criteria are not the same.
        """
        theirs = {name: len(states) for name, states in state_dict["watch"].items()}
        ours = {name: len(criteria) for name, criteria in self.watch.items()}
        if theirs != ours:
            raise ValueError(f"Monitor.load_state_dict: state_dict has criteria {theirs}, the monitor has {ours}")
        for name, criteria in self.watch.items():
            for one, state in zip(criteria, state_dict["watch"][name], strict=True):
                one.load_state_dict(state)
        self.step = state_dict["step"]
        self.history.load_state_dict(state_dict["history"])
        self.validation.load_state_dict(state_dict["validation"])
        self.parameters.load_state_dict(state_dict["parameters"])
        self.keys = list(state_dict["keys"])
        self._known_keys = set(self.keys)
        self.events = [Event(kind, step, text, tuple(keys)) for kind, step, text, keys in state_dict["events"]]
        self._alarms.load_state_dict(state_dict["alarms"])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: all but writers and callback, which belong to their process."""
        return {**self.__dict__, "writers": [], "on_event": None}

    # ---- closing ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the writers."""
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        alarms = ", ".join(sorted(self.alarms)) or "none"
        return f"Monitor(step={self.step}, records={len(self.history)}, alarms: {alarms}, reached: {self.reached or 'none'})"
