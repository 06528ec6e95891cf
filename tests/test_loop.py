"""The loop over a step that only counts: what is fetched, evaluated, saved and stopped, when."""

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt import step_metrics as step_metrics_module
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.loop import Loop, LoopConfig, restore
from jaxprompt.members import Member, Progress
from jaxprompt.steps import TrainState
from jaxprompt.typing import UserError

IDENTITY = {"method": "soft"}


class Metric:
    """A metric on a device that says when it is fetched."""

    def __init__(self, value: float, fetched: Callable[[], None]):
        self._value, self._fetched = value, fetched

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._fetched()
        return np.array([self._value], dtype)


class Numbers:
    """Batches 1, 2, 3, ..."""

    def __init__(self, shapes: Callable[[int], int] = lambda number: 1):
        self.number, self._shapes = 0, shapes

    def __next__(self) -> int:
        self.number += 1
        return self.number

    def get_state(self) -> dict[str, Any]:
        return {"number": self.number}

    def set_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]

    @property
    def shape_counts(self) -> dict[int, int]:
        return dict.fromkeys({self._shapes(number) for number in range(1, self.number + 1)}, 1)


class Logger:
    """Keeps what it is told."""

    def __init__(self, told: list[str]):
        self.told, self.values, self.notes = told, [], []

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.values.append((step, dict(values)))

    def progress(self, step: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


class Run:
    """A run in a directory; every start makes a new process's worth of objects."""

    def __init__(self, directory: Path, total: int = 7, **config: Any):
        self.directory, self.total = directory, total
        self.config = LoopConfig(
            **{"eval_every": 0, "save_every": 0, "log_every": 1, **config}  # pyright: ignore
        )
        self.loss: Callable[[int], dict[str, float]] = lambda number: {}
        self.scores: Callable[[int], float] | None = lambda number: 1.0
        self.during: Callable[[str, int], None] = lambda what, number: None
        self.shapes: Callable[[int], int] = lambda number: 1

    def start(self) -> "Run":
        """Restores and runs to the end or wherever it stops."""
        self.told: list[str] = []
        self.logger = Logger(self.told)
        batches = Numbers(self.shapes)
        fresh = TrainState(
            jnp.zeros((), jnp.int32), {"sum": jnp.zeros(())}, [()], jax.random.key(0)[None],
            jnp.ones(1, bool),
        )  # fmt: skip
        with Checkpoints(self.directory / "checkpoints", self.config.keep) as checkpoints:
            self._note_saves(checkpoints)
            state, (self.progress,), self.resumed = restore(
                checkpoints, IDENTITY, fresh, batches, [self.total]
            )
            loop = Loop(
                step=self._step, frozen={}, batches=batches, put=lambda batch: batch,
                config=self.config, checkpoints=checkpoints, on_best=self._on_best,
                identity=IDENTITY, logger=self.logger,  # pyright: ignore[reportArgumentType]
                evaluate=None if self.scores is None else self._evaluate,
                members=[Member(
                    "", self.total, self.config.early_stopping, lambda done: done / 10,
                    self.logger,  # pyright: ignore[reportArgumentType]
                )],
            )  # fmt: skip
            self.state = loop.run(state, [self.progress])
        return self

    @property
    def saved(self) -> list[int]:
        return [int(text.split()[1]) for text in self.told if text.startswith("save ")]

    @property
    def evaluated(self) -> list[int]:
        return [int(text.split()[1]) for text in self.told if text.startswith("evaluate ")]

    def _step(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        number = int(batch)
        self.told.append(f"step {number}")
        self.during("step", number)
        with jax.transfer_guard("allow"):
            state = dataclasses.replace(
                state, step=state.step + 1, trained={"sum": state.trained["sum"] + number}
            )
        values = {"loss": 2.0, "grad_norm": 1.0, "trained_norm": 3.0, "examples": 8.0}
        values |= self.loss(number)

        def fetched() -> None:
            self.told.append(f"fetch {number}")

        def loss_fetched() -> None:
            fetched()
            self.during("fetch", number)

        metrics = {name: Metric(value, fetched) for name, value in values.items()}
        return state, {**metrics, "loss": Metric(values["loss"], loss_fetched)}

    def _evaluate(self, number: int, trained: Any, which: Any) -> list[dict[str, float]]:
        self.told.append(f"evaluate {number}")
        self.during("evaluate", number)
        assert self.scores is not None
        return [{"accuracy": 50.0, "score": self.scores(number)}]

    def _on_best(self, n: int, number: int, trained: Any, metrics: dict[str, float]) -> None:
        self.told.append(f"best {number}")

    def _note_saves(self, checkpoints: Checkpoints) -> None:
        save = checkpoints.save

        def noted(number: int, *arguments: Any) -> None:
            self.told.append(f"save {number}")
            save(number, *arguments)

        checkpoints.save = noted


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    return lambda *arguments, **config: Run(tmp_path, *arguments, **config)


def order(told: list[str]) -> list[str]:
    """What happened, each thing once."""
    return list(dict.fromkeys(told))


def test_metrics_are_fetched_one_step_late(run):
    started = run(4).start()
    assert order(started.told) == [
        "step 1", "step 2", "fetch 1", "step 3", "fetch 2", "step 4", "fetch 3", "fetch 4",
        "evaluate 4", "best 4", "save 4",
    ]  # fmt: skip


def test_they_are_all_fetched_before_an_evaluation_and_before_a_save(run):
    started = run(6, eval_every=2, save_every=3).start()
    assert order(started.told) == [
        "step 1", "step 2", "fetch 1", "fetch 2", "evaluate 2", "best 2",
        "step 3", "fetch 3", "save 3", "step 4", "fetch 4", "evaluate 4",
        "step 5", "step 6", "fetch 5", "fetch 6", "evaluate 6", "save 6",
    ]  # fmt: skip


def test_records_hold_the_step_s_own_values_and_rate(run):
    made = run(5, log_every=2, eval_every=4)
    made.loss = lambda number: {"loss": float(number)}
    started = made.start()
    logged = [(step, v.get("loss"), v.get("learning_rate")) for step, v in started.logger.values]
    assert logged == [
        (2, 2.0, 0.1), (4, 4.0, pytest.approx(0.3)), (4, None, None), (5, 5.0, 0.4),
        (5, None, None),
    ]  # fmt: skip
    assert started.logger.values[2] == (4, {"eval/accuracy": 50.0})


def test_the_transfer_guard_is_on_in_a_step_and_off_around_it(run):
    made = run(2, eval_every=1)
    seen = []

    def during(what: str, number: int) -> None:
        try:
            jax.jit(lambda x: x)(np.ones(3))
            seen.append(what)
        except Exception as error:
            assert "Disallowed host-to-device transfer" in str(error)

    made.during = during
    made.start()
    assert seen == ["evaluate", "evaluate"]


def test_speed_leaves_out_windows_in_which_something_was_compiled(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_metrics_module.time, "perf_counter", lambda: now[0])
    made = run(8, log_every=2, eval_every=4)
    made.shapes = lambda number: 2 if number >= 5 else 1

    def during(what: str, number: int) -> None:
        if what == "fetch":
            now[0] += 2.0  # waits for the step
        elif what == "step" and number in (1, 5):
            now[0] += 100.0  # compiles
        elif what == "evaluate":
            now[0] += 1000.0

    made.during = during
    progress = made.start().progress
    assert (progress.train_examples, progress.train_seconds) == (32.0, 8.0)
    assert progress.examples_per_second == 4.0
    assert Progress().examples_per_second == 0.0


def test_the_best_evaluation_is_kept_and_an_equal_one_is_not_better(run):
    made = run(6, eval_every=1)
    made.scores = {1: 1.0, 2: 3.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 0.0}.__getitem__
    started = made.start()
    assert [text for text in started.told if text.startswith("best")] == [
        "best 1",
        "best 2",
        "best 5",
    ]
    assert (started.progress.best_step, started.progress.best_score) == (5, 4.0)
    assert started.progress.best_metrics == {"accuracy": 50.0}
    assert started.progress.waited == 1


def test_early_stopping(run):
    made = run(20, eval_every=2, early_stopping=3)
    made.scores = {2: 1.0, 4: 5.0, 6: 5.0, 8: 2.0, 10: 3.0}.__getitem__
    started = made.start()
    assert started.saved == [10] and started.progress.finished
    assert started.logger.notes == [
        "stopped early at step 10: 3 evaluations without a better score than 5.00 of step 4"
    ]
    again = made.start()
    assert again.told == [] and again.resumed == 10 and again.progress.finished
    assert again.logger.notes == ["the run ended at step 10 already; train.steps makes it longer"]
    longer = run(20, eval_every=2, early_stopping=4)
    longer.scores = lambda number: 0.0
    assert longer.start().evaluated == [12]


def test_a_run_without_evaluations(run):
    made = run(3)
    made.scores = None
    started = made.start()
    assert started.evaluated == [] and started.saved == [3] and started.progress.finished


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "trained_norm"])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(run, name, value):
    made = run(9, save_every=2)
    made.loss = lambda number: {name: value} if number >= 5 else {}
    with pytest.raises(UserError) as caught:
        made.start()
    message = str(caught.value)
    said = f"{name} is not finite at step 5 (found by step 6); the last good checkpoint is step 4"
    assert said in message
    assert made.saved == [2, 4] and "step 7" not in made.told
    made.loss = lambda number: {}
    assert made.start().resumed == 4


@pytest.mark.parametrize("due", [{"save_every": 3}, {"eval_every": 3}])
def test_it_is_found_before_that_very_step_is_saved_or_evaluated(run, due):
    made = run(9, **due)
    made.loss = lambda number: {"loss": math.nan} if number == 3 else {}
    with pytest.raises(UserError, match=r"at step 3 \(found by step 3\); no checkpoint was saved"):
        made.start()
    assert made.saved == made.evaluated == []


def terminate(at: tuple[str, int]) -> Callable[[str, int], None]:
    def during(what: str, number: int) -> None:
        if (what, number) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    return during


@pytest.mark.parametrize(
    ("at", "saved", "evaluated", "then"),
    [
        (("step", 3), 3, [2], [4, 6, 7]),
        (("step", 4), 4, [2], [4, 6, 7]),  # the evaluation that was due comes first on return
        (("evaluate", 4), 4, [2, 4], [6, 7]),
        (("step", 7), 7, [2, 4, 6], [7]),
    ],
)
def test_sigterm_saves_and_the_same_command_goes_on(run, at, saved, evaluated, then):
    before = signal.getsignal(signal.SIGTERM)
    made = run(7, eval_every=2)
    made.during = terminate(at)
    stopped = made.start()
    assert stopped.saved == [saved] and stopped.evaluated == evaluated
    assert not stopped.progress.finished
    assert stopped.logger.notes == [
        f"SIGTERM: stopped and saved at step {saved}; the same command goes on"
    ]
    assert signal.getsignal(signal.SIGTERM) is before
    made.during = lambda what, number: None
    ended = made.start()
    assert ended.resumed == saved and ended.evaluated == then
    assert ended.progress.finished and float(ended.state.trained["sum"]) == sum(range(1, 8))
    assert int(ended.state.step) == 7
    assert made.start().told == []


def test_sigterm_in_the_last_evaluation_finishes_the_run(run):
    made = run(3)
    made.during = terminate(("evaluate", 3))
    stopped = made.start()
    assert stopped.saved == [3] and stopped.progress.finished and stopped.logger.notes == []


def test_in_a_thread_signals_are_left_alone(run):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run(2).start()))
    thread.start()
    thread.join()
    assert ended[0].progress.finished


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run):
    made = run(7, save_every=2)

    def interrupt(what: str, number: int) -> None:
        if number == 6:
            raise KeyboardInterrupt

    made.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.start()
    made.during = lambda what, number: None
    ended = made.start()
    assert ended.resumed == 4 and ended.told[0] == "step 5"
    assert float(ended.state.trained["sum"]) == sum(range(1, 8))


def test_more_steps_go_on_and_fewer_are_refused(run):
    assert run(4).start().progress.finished
    longer = run(6).start()
    assert longer.resumed == 4 and longer.told[0] == "step 5" and longer.saved == [6]
    with pytest.raises(
        UserError, match=r"is at step 6 already, this run has 5: raise train\.steps"
    ):
        run(5).start()


def test_baselines_travel_with_the_run(run):
    made = run(4, save_every=2)

    def baselines(what: str, number: int) -> None:
        made.progress.baselines = {"bare": {"accuracy": 12.5}}

    made.during = baselines
    made.start()
    made.during = lambda what, number: None
    assert made.start().progress.baselines == {"bare": {"accuracy": 12.5}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "train.steps is -1, it cannot be negative"),
        ({"epochs": -0.5}, "train.epochs is -0.5, it cannot be negative"),
        ({"eval_every": -1}, "train.eval_every is -1"),
        ({"save_every": -1}, "train.save_every is -1"),
        ({"early_stopping": -1}, "train.early_stopping is -1"),
        ({"log_every": 0}, "train.log_every is 0, it has to be at least 1"),
        ({"keep": 0}, "train.keep is 0"),
        ({"accumulate": 0}, "train.accumulate is 0"),
        ({"steps": 3, "epochs": 1.0}, "train.steps and train.epochs are both set"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        LoopConfig(**options)


def test_a_batch_has_to_divide_into_its_parts():
    LoopConfig(accumulate=4).check_batch_size("data.batch_size", 8)
    with pytest.raises(UserError, match=r"batch_size 8 does not divide into train\.accumulate 3"):
        LoopConfig(accumulate=3).check_batch_size("data.batch_size", 8)
