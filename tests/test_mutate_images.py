"""Image files with random damage, a few of those of `tests/campaigns/mutate_images.py`."""

from collections import Counter

from tests.campaigns.mutate_images import campaign, samples
from ttsr_fast.images import read_image

REFUSED = {"ink.jpg"}  # of another colour mode


def test_samples_are_valid(tmp_path):
    for name, content in samples().items():
        if name not in REFUSED:
            (tmp_path / name).write_bytes(content)
            assert read_image(tmp_path / name).size in ((13, 17), (17, 13))


def test_every_file_gives_an_image_or_one_error(tmp_path):
    outcomes = dict(campaign(tmp_path, 64, seed=5))
    assert [outcome for outcome in outcomes.values() if outcome.startswith("FAULT")] == []
    counts = Counter(outcome.split()[0].strip(",") for outcome in outcomes.values())
    assert min(counts["image"], counts["error"]) > 10
    assert sum(", command" in outcome for outcome in outcomes.values()) > 60
