"""The tables of a study in the terminal."""

from bytelatent.study.tables import results_table
from tests.study.made_rows import made_row


def test_results_are_means_beside_the_best_and_the_worst_seed() -> None:
    rows = [made_row(seed=seed, bits=bits) for seed, bits in enumerate((1.21, 1.2, 1.25))]
    header, several, one = results_table([*rows, made_row("flat", bits=1.3)]).splitlines()
    cells = dict(zip(("held out", "best seed", "worst seed"), several.split()[3:6], strict=True))
    assert "held out  best seed  worst seed" in header
    assert cells == {"held out": "1.2200", "best seed": "1.2000", "worst seed": "1.2500"}
    assert one.split()[:6] == ["flat", "1e16", "1", "1.3000", "–", "–"]
