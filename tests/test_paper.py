"""experiments/paper.py: the paper's table 2, with its one misprint known."""

from experiments import paper


def test_recalls_and_mrrs_grow_with_k_but_for_the_misprint():
    falling = set()
    for domain, dataset in paper.DATASETS.items():
        for row in paper.TABLE2:
            values = paper.paper_values(domain, row)
            for metric in ("Recall", "MRR"):
                three, five, ten = (values[f"{metric}@{k}"] for k in (3, 5, 10))
                falling |= {(dataset, row, f"{metric}@5")} if not three < five < ten else set()
                assert three < ten < 1
    assert falling == paper.MISPRINTS
    assert paper.paper_values("news", "recent-only") == {}
