"""Metrics on images, one name each; formulas lie in modules that load no model, and each names its paper.

A metric of another package registers a subclass of ``base.ImageMetric`` in the entry-point group ``erasure.metrics``.
"""

from erasure.registry import Entry, Registry

metrics = Registry(
    "metric",
    "erasure.metrics",
    {
        "fid": Entry("erasure.eval.metrics.distances:FID", "Fréchet Inception Distance to reference images or to the base's own"),
        "kid": Entry("erasure.eval.metrics.distances:KID", "Kernel Inception Distance, unbiased at small n"),
        "cmmd": Entry("erasure.eval.metrics.distances:CMMD", "MMD of CLIP embeddings under a Gaussian kernel"),
        "clip_score": Entry(
            "erasure.eval.metrics.clip_score:CLIPScore", "Alignment with the prompt by any open_clip model; truncation counted"
        ),
        "lpips": Entry("erasure.eval.metrics.perceptual:LPIPS", "Perceptual distance to the base's image of the same row: drift"),
        "st_lpips": Entry("erasure.eval.metrics.perceptual:STLPIPS", "Shift-tolerant perceptual distance; all weights in its wheel"),
        "canvas_alignment": Entry(
            "erasure.eval.metrics.canvas_alignment:CanvasAlignment",
            "Share of what a canvas prompt asks for that the judge finds",
        ),
        "pick_score": Entry("erasure.eval.metrics.preference:PickScore", "Human preference by PickScore, through transformers"),
        "image_reward": Entry("erasure.eval.metrics.preference:ImageReward", "Human preference by ImageReward, through its own package"),
    },
)
