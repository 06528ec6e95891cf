"""What a run reports while it goes: metrics.jsonl, a progress bar or plain lines, TensorBoard, W&B.

Called by train and pretrain. Names of values: `loss`, `examples_per_second`, ... of training, and
`eval/<metric>` (`eval/accuracy` in percent, `eval/loss`) of an evaluation. All that a human reads
goes to standard error.
"""

import dataclasses
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from jaxprompt.typing import UserError

EVAL = "eval/"
METRICS_FILE = "metrics.jsonl"
Values = Mapping[str, float | int | str | None]


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """How a run reports; the fields are keyword arguments of `RunLogger`.

    Attributes:
      terminal: a progress bar (true) or plain lines (false); null = a bar on a terminal.
      sinks: any of `tensorboard`, `wandb`, beside metrics.jsonl.
      line_seconds: plain lines of training come at most this often; evaluations always show.
    """

    terminal: bool | None = None
    sinks: tuple[str, ...] = ()
    line_seconds: float = 10.0


class RunLogger:
    """Writes what a run measures, and shows it. Use as a context manager, or call `close`."""

    def __init__(
        self,
        directory: Path | str,
        *,
        terminal: bool | None = None,
        sinks: Sequence[str] = (),
        line_seconds: float = 10.0,
        total_steps: int = 0,
        resumed_step: int | None = None,
        score: str = "",
        config: Mapping[str, Any] | None = None,
        active: bool = True,
        screen: bool = True,
    ) -> None:
        """Opens `directory`/metrics.jsonl and the sinks.

        Args:
          directory: the run's; made where missing.
          terminal, sinks, line_seconds: see `LoggingConfig`.
          total_steps: where the run ends, for the bar and the time left; 0 = unknown.
          resumed_step: the step a run goes on from: records after it are cut off, for they will be
            written again. None = a new run: what the file held is cut off.
          score: the `eval/...` value to keep in sight, "" = the first one of an evaluation.
          config: the run's resolved configuration, for W&B.
          active: false on every process but the first: nothing is written or shown.
          screen: false = written only.
        Raises: UserError if the directory cannot be written, a sink is unknown or its package is
          missing.
        """
        self._sinks: list[_Sink] = []
        self._screen: _Bar | _Lines | None = None
        openers = [_opener(name) for name in sinks]
        if not active:
            return
        folder = Path(directory)
        file = _JsonLines(folder / METRICS_FILE, resumed_step)
        self._sinks.append(file)
        try:
            for open_sink in openers:
                self._sinks.append(open_sink(folder, resumed_step, config))
        except BaseException:
            self.close()
            raise
        if not screen:
            return
        if _has_terminal() if terminal is None else terminal:
            self._screen = _Bar(resumed_step or 0, total_steps, score)
        else:
            self._screen = _Lines(total_steps, line_seconds)
        for text in file.damage:
            self.note(text)

    def log(self, step: int, values: Values) -> None:
        """Records values of one step: a line of metrics.jsonl, the sinks, the screen.

        Args:
          step: never smaller than that of the record before (a step may have several records).
          values: plain or numpy numbers or texts; what is not finite is written as null.
        Raises: ValueError for a step that goes back; UserError if the file cannot be written.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, plain)
        if self._screen is not None:
            self._screen.show(step, plain)

    def progress(self, step: int) -> None:
        """Moves the bar without a record; cheap enough for every step."""
        if self._screen is not None:
            self._screen.move(step)

    def note(self, text: str) -> None:
        """Shows one line of text, above the bar if there is one."""
        if self._screen is not None:
            self._screen.note(text)

    def close(self) -> None:
        """Ends the bar and closes the file and the sinks; a second call does nothing."""
        if self._screen is not None:
            self._screen.close()
        for sink in self._sinks:
            sink.close()
        self._sinks, self._screen = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _plain(value: Any) -> float | int | str | None:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _training_text(values: Values) -> list[str]:
    """What one sees of a training record: loss and speed."""
    loss, speed = values.get("loss"), values.get("examples_per_second")
    said = [f"loss {loss:.4f}"] if isinstance(loss, int | float) else []
    return said + ([f"{speed:.1f} examples/s"] if isinstance(speed, int | float) else [])


def _evaluation_text(values: Values) -> list[str]:
    named = ((name.removeprefix(EVAL), v) for name, v in values.items() if name.startswith(EVAL))
    numbers = [(name, v) for name, v in named if isinstance(v, int | float)]
    return [f"{name} {v:.4f}" if "loss" in name else f"{name} {v:.1f}" for name, v in numbers]


def _step_text(step: int, total_steps: int) -> str:
    return f"step {step}/{total_steps}" if total_steps else f"step {step}"


class _Lines:
    """Plain lines: each evaluation, the first and last step, and others every `line_seconds`."""

    def __init__(self, total_steps: int, line_seconds: float) -> None:
        self._total_steps, self._line_seconds = total_steps, line_seconds
        self._first: tuple[int, float] | None = None  # step and time of training's first record
        self._last_line = -math.inf

    def show(self, step: int, values: Values) -> None:
        now = time.monotonic()
        evaluation = _evaluation_text(values)
        said = _training_text(values) + evaluation
        if self._first is None and not evaluation:
            self._first = (step, now)
        due = now - self._last_line >= self._line_seconds or step == self._total_steps
        if not said or not (evaluation or due):
            return
        if not evaluation:
            self._last_line = now
        if self._first is not None and self._first[0] < step < self._total_steps:
            step_seconds = (now - self._first[1]) / (step - self._first[0])
            said.append(f"time left {_clock((self._total_steps - step) * step_seconds)}")
        self.note("  ".join([_step_text(step, self._total_steps), *said]))

    def move(self, step: int) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Bar:
    """A progress bar on standard error; evaluations stay as lines above it."""

    def __init__(self, start: int, total_steps: int, score: str) -> None:
        progress = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(
            stderr=True, force_terminal=True, highlight=False, markup=False
        )
        self._total_steps, self._score = total_steps, score
        self._training: list[str] = []
        self._evaluation: list[str] = []
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=16),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[said]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console,
            redirect_stdout=False,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=total_steps or None, completed=start, said="")
        self._bar.start()

    def show(self, step: int, values: Values) -> None:
        self._training = _training_text(values) or self._training
        if evaluation := _evaluation_text(values):
            self.note("  ".join([_step_text(step, self._total_steps), *evaluation]))
            self._evaluation = _evaluation_text(self._in_sight(values))
        said = "  ".join(self._training[:1] + self._evaluation + self._training[1:])
        self._bar.update(self._task, completed=step, said=said)

    def _in_sight(self, values: Values) -> Values:
        scores = [name for name in values if name.startswith(EVAL) and name != f"{EVAL}loss"]
        name = self._score if self._score in values else (scores or [f"{EVAL}loss"])[0]
        return {name: values.get(name)}

    def move(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def note(self, text: str) -> None:
        self._bar.console.print(text, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class _Sink(Protocol):
    def write(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class _JsonLines:
    """metrics.jsonl: one object a line, one write a line, so that a kill harms the last at most."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        self._path = path
        self.damage: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self._file.truncate(self._good_bytes(resumed_step))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._last_step = resumed_step or 0

    def _good_bytes(self, resumed_step: int | None) -> int:
        """Bytes up to the first record after the resumed step, or to a half-written last line."""
        if resumed_step is None:
            return 0
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file.readlines(), start=1):
            if not line.endswith(b"\n"):
                self.damage.append(f"{self._path}:{number}: dropped a half-written last line")
                break
            step = _step_of(line)
            if step is None:
                self.damage.append(f"{self._path}:{number}: not a record; left as it is")
            elif step > resumed_step:
                break
            good += len(line)
        return good

    def write(self, step: int, values: Values) -> None:
        if step < self._last_step:
            raise ValueError(f"a record of step {step} after one of step {self._last_step}")
        line = json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")
        except OSError as error:
            self._file.truncate(end)
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        self._last_step = step

    def close(self) -> None:
        self._file.close()


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class _TensorBoard:
    """Event files through tensorboardX, which needs neither TensorFlow nor torch."""

    def __init__(
        self, folder: Path, resumed_step: int | None, config: Mapping[str, Any] | None
    ) -> None:
        purge_step = 0 if resumed_step is None else resumed_step + 1
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
            elif value is not None:
                self._writer.add_text(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A W&B run that goes on when the run does; its id is kept in the run's directory."""

    def __init__(
        self, folder: Path, resumed_step: int | None, config: Mapping[str, Any] | None
    ) -> None:
        kept = folder / "wandb_id"
        if resumed_step is None or not kept.exists():
            kept.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        wandb = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "jaxprompt"),
                id=kept.read_text(encoding="utf-8"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                resume="allow",
                dir=str(folder),
                config=dict(config or {}),
            )
        except wandb.Error as error:
            raise UserError(f"logging sink wandb did not start: {error}") from error

    def write(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step)

    def close(self) -> None:
        self._run.finish()


_Opener = Callable[[Path, int | None, Mapping[str, Any] | None], _Sink]
SINKS: dict[str, tuple[str, _Opener]] = {  # name = extra -> package, what opens it
    "tensorboard": ("tensorboardX", _TensorBoard),
    "wandb": ("wandb", _WeightsAndBiases),
}


def _opener(name: str) -> _Opener:
    if name not in SINKS:
        raise UserError(f"unknown logging sink {name!r}; there are: {', '.join(SINKS)}")
    package, open_sink = SINKS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"logging sink {name} needs the package {package}: pip install 'jaxprompt[{name}]'"
        ) from error
    return open_sink
