"""Names of feature extractors and the hashes of their weights, as protocols record them; reading a protocol loads no torch."""

EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EXTRACTORS = {"efficientnet-lite0": EFFICIENTNET_LITE0_SHA256}
"""Name of every feature extractor and the SHA-256 of its weight file."""
