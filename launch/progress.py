"""What a long run shows while it works."""

from statistics import median

import torch

from launch.bars import Bar
from launch.processes import peak_memory


class StepBar:
    """A bar of optimizer steps with loss, rate and memory; after ten steps it foresees an epoch."""

    def __init__(self, total: int, done: int, tokens_per_epoch: int, device: torch.device):
        self.tokens, self.device, self.speeds = tokens_per_epoch, device, []
        self.bar = Bar(total=total, initial=done, unit="step")

    def step(self, epoch: int, loss: float, lr: float, speed: float) -> None:
        """Show a step that was done at `speed` tokens/s."""
        what = f"epoch {epoch}, loss {loss:.4f}, lr {lr:g}, {speed:.0f} tokens/s"
        self.bar.set_postfix_str(f"{what}, {peak_memory(self.device)}")
        self.bar.update()
        self.speeds.append(speed)
        if len(self.speeds) == 10:  # the first ones compile
            rate = median(self.speeds)
            minutes = self.tokens / rate / 60
            self.write(f"after ten steps {rate:.0f} tokens/s: {minutes:.1f} minutes per epoch")

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.write(line)
