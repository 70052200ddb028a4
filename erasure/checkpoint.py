"""The state of a training run on disk: one file of tensors, whole or not there, that only an equal run takes up again."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from .errors import ErasureError

if TYPE_CHECKING:
    from .callbacks import Callback
    from .training import Training

log = logging.getLogger("erasure")
NOTHING_LEFT = "no state was saved"


@dataclass
class Checkpoint:
    """The whole state of a run in one file of tensors, which is replaced by renaming: a kill leaves the old state or the new one.

    A state is a draft until a loss was seen at its weights, which may be bad already. Of several processes the first one writes.
    """

    path: Path
    agreed: dict[str, Any]
    run: "Training"
    scaler: Any
    callbacks: Sequence["Callback"]
    step: int = 0
    """Of the state that was kept last, 0 for none."""
    draft: int = 0
    """Of the state that is written and not kept, 0 for none."""

    def save(self) -> None:
        """Write the state as it is now, as a draft."""
        self.draft = self.run.step
        if PartialState().is_main_process:
            self._write()

    def keep(self) -> None:
        """Put the draft, if there is one, in the place of the state that was kept before."""
        if self.draft:
            if PartialState().is_main_process:
                os.replace(self._partial, self.path)
            self.step, self.draft = self.draft, 0

    @property
    def left(self) -> str:
        """What a run that fails now leaves behind, in words."""
        if not self.step:
            return NOTHING_LEFT
        fresh = "other settings need a fresh start: remove it, or choose another folder"
        return f"the last good state, of step {self.step}, is in {self.path}; {fresh}"

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".partial")

    def _write(self) -> None:
        from safetensors.torch import save_file

        tensors = {f"weights.{name}": weight.detach() for name, weight in self.run.weights.items()}
        for index, entry in self.run.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in entry.items()}
        for index, callback in enumerate(self._stateful()):
            tensors |= {f"callback.{index}.{key}": value for key, value in callback.state().items()}
        tensors["losses"] = torch.tensor(self.run.losses, dtype=torch.float64)
        note = {"agreed": self.agreed, "stop": self.run.stop, "scaler": self.scaler.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, self._partial, {"erasure": json.dumps(note)})

    def load(self) -> int:
        """Take up the kept state, if there is one; gives its step. Processes that do not see the same state raise ErasureError."""
        if self.path.exists():
            self._take_up()
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise ErasureError(
                f"{self.path}: the processes found states of steps {', '.join(map(str, steps))}: give a folder that all of them see, or "
                "remove the file to start again"
            )
        return self.step

    def _take_up(self) -> None:
        tensors, note = self._read()
        if different := _differences(note["agreed"], json.loads(json.dumps(self.agreed))):
            raise ErasureError(
                f"{self.path} was begun with other settings: {'; '.join(different)}. Go on with the former ones, or remove the file "
                "to start again"
            )
        self.run.losses, self.run.stop = tensors["losses"].tolist(), note["stop"]
        self.run.write(_below("weights", tensors))
        optimiser = self.run.optimiser
        groups = optimiser.state_dict()["param_groups"]
        entries = {index: _below(f"optimiser.{index}", tensors) for index in range(len(self.run.weights))}
        optimiser.load_state_dict({"state": entries, "param_groups": groups})
        self.scaler.load_state_dict(note["scaler"])
        for index, callback in enumerate(self._stateful()):
            callback.load(_below(f"callback.{index}", tensors))
        self.step = self.run.step
        log.info("goes on from step %d of %d (%s)", self.step, self.run.steps, self.path)

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


@torch.no_grad()
def digest(weights: Mapping[str, Tensor]) -> str:
    """What a run starts from: names, shapes, and 16 entries of each tensor."""
    found = hashlib.sha256()
    for name, weight in weights.items():
        entries = weight.flatten()[:: max(weight.numel() // 16, 1)].float().cpu()
        found.update(f"{name} {tuple(weight.shape)}".encode() + entries.numpy().tobytes())
    return found.hexdigest()[:16]
