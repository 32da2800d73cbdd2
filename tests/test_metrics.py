"""state/metrics.py: a resumed run's lines are those up to its checkpoint."""

from helpers import metrics, write_lines

from state.metrics import drop_lines_after


def test_lines_after_a_checkpoint_are_dropped(tmp_path):
    lines = [{"step": n, "epoch": 1, "loss": 1.0} for n in (1, 2)]
    lines.append({"step": 2, "epoch": 1, "validation": {"Recall@3": 0.5}})
    lines += [{"step": n, "epoch": 2, "loss": 1.0} for n in (3, 4)]
    lines.append({"step": 4, "epoch": 2, "validation": {"Recall@3": 0.5}})
    path = tmp_path / "metrics.jsonl"

    for step, epoch, kept in ((4, 2, 6), (4, 1, 5), (3, 1, 4), (2, 0, 2), (0, 0, 0)):
        write_lines(path, lines)
        with open(path, "a") as file:
            file.write('{"step": 5, "ep')  # what an interruption leaves
        drop_lines_after(tmp_path, step, epoch)
        assert metrics(tmp_path) == lines[:kept]


def test_a_run_without_lines_gets_an_empty_file(tmp_path):
    drop_lines_after(tmp_path, 0, 0)
    assert metrics(tmp_path) == []
