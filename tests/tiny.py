"""The tiny pipelines, which ship with the package so that other packages can check their methods on them."""

from erasure.testing.tiny import *  # noqa: F403
