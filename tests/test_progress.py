"""launch/progress.py: what the bar says while training, and the forecast after ten steps."""

from helpers import CPU

from launch.progress import StepBar


def test_after_ten_steps_the_bar_foresees_an_epoch(capsys):
    bar = StepBar(total=20, done=4, tokens_per_epoch=60_000, device=CPU)
    for speed in (10.0, *[500.0] * 9):  # the first step is slow, and the median ignores it
        assert "after ten steps" not in capsys.readouterr().out
        bar.step(1, 0.25, 1e-4, speed)
    assert "after ten steps 500 tokens/s: 2.0 minutes per epoch" in capsys.readouterr().out
    assert (bar.bar.n, bar.bar.total) == (14, 20)
    assert bar.bar.postfix.startswith("epoch 1, loss 0.2500, lr 0.0001, 500 tokens/s, ")
    assert bar.bar.postfix.endswith(" GiB of memory")
    bar.step(1, 0.25, 1e-4, 500.0)
    assert "after ten steps" not in capsys.readouterr().out
