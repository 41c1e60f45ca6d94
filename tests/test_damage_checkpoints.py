"""Files damaged at random; `tests/campaigns/damage_checkpoints.py` does more."""

from tests.campaigns.damage_checkpoints import campaign


def test_damage_is_noticed_or_changes_nothing():
    counts = campaign(tries=35, seed=3)
    assert sum(counts.values()) == 35
    for name in ("last.pt", "model.pt", "model.safetensors"):
        assert counts[f"{name}: noticed"] > 0
