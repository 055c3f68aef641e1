"""Each row of metrics.jsonl also to tensorboard, wandb or trackio: `track=[wandb]`. They are imported when named."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmrpt.settings import Settings, SettingsError, flatten, to_yaml

PROJECT = "mmrpt"


class WandbTracker:
    """Weights & Biases. Each phase has steps of its own, so they are a metric: wandb's step only ever grows."""

    module = "wandb"

    def __init__(self, settings: Settings, folder: Path) -> None:
        config, name = flatten(asdict(settings)), settings.name
        self.run = importlib.import_module(self.module).init(project=PROJECT, name=name, group=name, config=config)
        self.phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self.phases:
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self.phases.add(phase)
        self.run.log({f"{phase}/{name}": value for name, value in values.items()} | {f"{phase}/step": step})

    def close(self) -> None:
        self.run.finish()


class TrackioTracker(WandbTracker):
    """trackio, which has wandb's interface and takes steps in any order."""

    module = "trackio"

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)


class TensorboardTracker:
    """Event files in the run's folder, under tensorboard/."""

    module = "torch.utils.tensorboard"

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.writer = importlib.import_module(self.module).SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("settings", f"```yaml\n{to_yaml(settings)}```")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{phase}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


# In the order they are started: the last one makes a folder, and the others may refuse to start.
TRACKERS = {"wandb": WandbTracker, "trackio": TrackioTracker, "tensorboard": TensorboardTracker}


class Trackers:
    """The trackers of a run. One that fails is told once and gets no more rows: metrics.jsonl has them all."""

    def __init__(self, names: Iterable[str]) -> None:
        """Imports the named packages. Raises SettingsError where one is not installed."""
        self.names = [name for name in TRACKERS if name in names]
        self.running: dict[str, Any] = {}
        for name in self.names:
            try:
                importlib.import_module(TRACKERS[name].module)
            except ImportError as error:
                raise SettingsError(
                    f"track names {name}, which cannot be imported ({error}): pip install {name}, or leave it out."
                ) from error

    def start(self, settings: Settings, folder: Path) -> None:
        """Begins the run there. Raises SettingsError where one does not start."""
        for name in self.names:
            try:
                self.running[name] = TRACKERS[name](settings, folder)
            except Exception as error:  # each has errors of its own
                self.close()
                raise SettingsError(
                    f"track names {name}, which does not start ({type(error).__name__}: {error}): log in or choose its "
                    "offline mode as its documentation says, or leave it out."
                ) from error

    def log(self, phase: str, step: int, row: Mapping[str, Any]) -> None:
        """Sends the numbers of a row."""
        values = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        for name in list(self.running):
            self._attempt(name, "log", phase, step, values)

    def close(self) -> None:
        for name in list(self.running):
            self._attempt(name, "close")
        self.running = {}

    def _attempt(self, name: str, method: str, *arguments: Any) -> None:
        try:
            getattr(self.running[name], method)(*arguments)
        except Exception as error:
            del self.running[name]
            warnings.warn(
                f"{name} failed ({type(error).__name__}: {error}) and gets nothing more of this run, which goes on; "
                "metrics.jsonl has every row.",
                stacklevel=2,
            )
