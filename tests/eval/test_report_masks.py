"""The heat map of masks: every count is in it, and it is a plain inline SVG."""

from erasure.eval.report.masks import heat_map, shares_of

SHARES = {
    "heads": {"": {"off": 1, "all": 8}, "unet.a.0": {"off": 1, "all": 8}},
    "neurons": {"": {"off": 3, "all": 200}, "unet.a.0": {"off": 0, "all": 100}, "unet.b.1": {"off": 3, "all": 100}},
}


def test_every_count_is_in_the_map() -> None:
    svg = heat_map(SHARES)
    for text in ("1 of 8", "0 of 100", "3 of 100", "unet.b.1", "12.50% off", "1.50% off"):
        assert f">{text}<" in svg, text
    assert svg.startswith("<svg") and 'aria-label="Units switched off by block. heads: 12.50% off; neurons: 1.50% off"' in svg


def test_no_masks_no_map() -> None:
    assert heat_map({}) == ""


def test_the_details_of_an_artefact_are_read_back() -> None:
    details = {
        f"Switched off: {kind}": {block or "all": {**counts, "share": "1 %"} for block, counts in blocks.items()}
        for kind, blocks in SHARES.items()
    }
    assert shares_of({**details, "Merging": {"merged": {"rank": 4}}}) == SHARES and shares_of({}) == {}
