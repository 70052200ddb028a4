"""ONNX files: where installed wheels keep them, and how they run."""

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np

from erasure.errors import ErasureError


def wheel_file(package: str, name: str, extra: str) -> Path:
    """A data file of an installed wheel, found in its list of files: none of the package's code is imported."""
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError as error:
        raise ErasureError(f"{name} comes with the package {package}: pip install 'erasure-suite[{extra}]'") from error
    for entry in listed:
        path = Path(str(entry.locate()))
        if entry.name == name and path.is_file():
            return path
    raise ErasureError(f"{package} {version(package)} is installed without {name}: reinstall it")


class Session:
    """An ONNX model on the CPU; call it with one array, get all its outputs."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """threads: 0 leaves the number to ONNX Runtime."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ErasureError(f"{path.name} needs ONNX Runtime: pip install 'erasure-suite[detectors]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # warnings about the export are not the user's to solve
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.runtime = f"onnxruntime {onnxruntime.__version__}"

    def __call__(self, images: np.ndarray) -> list[Any]:
        return self._session.run(None, {self._input: images})
