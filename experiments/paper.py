"""What the paper reports (section 5): table 2's numbers, and what its text says about the figures.

The figures themselves are plots without numbers.
"""

DATASETS = {"products": "Amazon-M2", "news": "MIND"}  # by this project's domains
METRICS = ("Recall@3", "Recall@5", "Recall@10", "MRR@3", "MRR@5", "MRR@10")

# By the name of the row here: Amazon-M2, then MIND, each in the order of METRICS.
TABLE2 = {
    "ncf": (
        (0.8300, 0.8830, 0.9440, 0.7328, 0.7448, 0.7529),
        (0.7010, 0.8030, 0.9240, 0.5523, 0.5759, 0.5926),
    ),
    "din": (
        (0.7380, 0.8330, 0.9240, 0.5838, 0.6053, 0.6174),
        (0.7900, 0.8620, 0.9330, 0.6352, 0.6519, 0.6616),
    ),
    "dien": (
        (0.7330, 0.8170, 0.9070, 0.5922, 0.6114, 0.6229),
        (0.7300, 0.8200, 0.9140, 0.6045, 0.6251, 0.6379),
    ),
    "gru4rec": (
        (0.4420, 0.5590, 0.7350, 0.3355, 0.3621, 0.3855),
        (0.6650, 0.7970, 0.9260, 0.5305, 0.5610, 0.5787),
    ),
    "narm": (
        (0.8410, 0.8860, 0.9330, 0.7475, 0.7577, 0.7638),
        (0.5820, 0.7330, 0.8930, 0.4142, 0.4489, 0.4703),
    ),
    "sasrec": (
        (0.6550, 0.7570, 0.9040, 0.4938, 0.5173, 0.5374),
        (0.8420, 0.8960, 0.9410, 0.7447, 0.7574, 0.7636),
    ),
    "core": (
        (0.5230, 0.4632, 0.6450, 0.4527, 0.4632, 0.4728),
        (0.5170, 0.5580, 0.6370, 0.4392, 0.4488, 0.4586),
    ),
    "whole-history": (
        (0.8790, 0.9050, 0.9460, 0.8585, 0.8644, 0.8697),
        (0.8580, 0.9020, 0.9590, 0.7708, 0.7807, 0.7885),
    ),
    "hierarchical": (
        (0.8910, 0.9120, 0.9490, 0.8597, 0.8643, 0.8693),
        (0.9160, 0.9430, 0.9750, 0.8505, 0.8568, 0.8611),
    ),
    "recurrent": (
        (0.8910, 0.9130, 0.9570, 0.8632, 0.8681, 0.8737),
        (0.9060, 0.9390, 0.9840, 0.8400, 0.8475, 0.8534),
    ),
}
HISTORY_ITEMS = 3  # in the prompts of table 2
RECOMMENDER = "Llama-2-7b"  # of table 2
MISPRINTS = {("Amazon-M2", "core", "Recall@5")}  # below the Recall@3 next to it

NOTES = {
    "table2": "The paper's rows are of other users and models: 1,000 test users, summaries by "
    "Llama-30b-instruct, recommendations by Llama-2-7b, baselines over BERT.",
    "figure9": "The paper's figure 9 is a plot without numbers, on MIND. Its text says: best at 3 "
    "items, worse with fewer and with more, and reasonably good even at 0. The values in "
    "italics are those of table 2, which has 3 items.",
    "figure10": "The paper's figure 10 is a plot without numbers, on Amazon-M2, of Pythia-1.4b, "
    "Pythia-2.8b and Llama-2-7b. Its text says: in general, the larger the better. The values "
    "in italics are those of table 2, which has Llama-2-7b.",
    "figure11": "The paper's figure 11 is a plot without numbers, on MIND, with 0 history items. "
    "Its text says: Llama-30b-instruct summarizes far better than Llama-2-13b, whose summaries are "
    "hard to understand.",
}


def paper_values(domain: str, row: str) -> dict[str, float]:
    """Return table 2's values for a row on the domain's dataset, by metric.

    {} for rows and domains that it does not have.
    """
    if row not in TABLE2 or domain not in DATASETS:
        return {}
    return dict(zip(METRICS, TABLE2[row][list(DATASETS).index(domain)], strict=True))
