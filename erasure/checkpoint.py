"""The state of a training run on disk: one file of tensors, whole or not there, that only an equal run takes up again."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ErasureError

if TYPE_CHECKING:
    from .training import Callback, Training

log = logging.getLogger("erasure")


@dataclass
class Checkpoint:
    """The whole state of a run in one file of tensors, which is replaced by renaming: a kill leaves the old state or the new one."""

    path: Path
    agreed: dict[str, Any]
    run: "Training"
    optimiser: torch.optim.Optimizer
    scaler: Any
    callbacks: Sequence["Callback"]
    step: int = 0

    def save(self) -> None:
        from safetensors.torch import save_file

        tensors = {f"weights.{name}": weight.detach() for name, weight in self.run.weights.items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in entry.items()}
        for index, callback in enumerate(self._stateful()):
            tensors |= {f"callback.{index}.{key}": value for key, value in callback.state().items()}
        tensors["losses"] = torch.tensor(self.run.losses, dtype=torch.float64)
        note = {"agreed": self.agreed, "stop": self.run.stop, "scaler": self.scaler.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, partial, {"erasure": json.dumps(note)})
        os.replace(partial, self.path)
        self.step = self.run.step

    def load(self) -> int:
        """Take up the saved state, if there is one; gives its step."""
        if not self.path.exists():
            return 0
        tensors, note = self._read()
        if different := _differences(note["agreed"], json.loads(json.dumps(self.agreed))):
            raise ErasureError(
                f"{self.path} was begun with other settings: {'; '.join(different)}. Go on with the former ones, or remove the file "
                "to start again"
            )
        self.run.losses, self.run.stop = tensors["losses"].tolist(), note["stop"]
        self.run.write(_below("weights", tensors))
        groups = self.optimiser.state_dict()["param_groups"]
        entries = {index: _below(f"optimiser.{index}", tensors) for index in range(len(self.run.weights))}
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})
        self.scaler.load_state_dict(note["scaler"])
        for index, callback in enumerate(self._stateful()):
            callback.load(_below(f"callback.{index}", tensors))
        self.step = self.run.step
        log.info("goes on from step %d of %d (%s)", self.step, self.run.steps, self.path)
        return self.step

    def _stateful(self) -> list["Callback"]:
        return [callback for callback in self.callbacks if callback.state()]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["erasure"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ErasureError(f"{self.path} is no state of a training run ({error}); remove it to start again") from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str = "") -> list[str]:
    """Each setting that differs, by its path, with both values."""
    found = []
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        then, now = theirs.get(key), ours.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            found += _differences(then, now, f"{path}{key}.")
        elif then != now:
            found.append(f"{path}{key} was {then!r}, is {now!r}")
    return found
