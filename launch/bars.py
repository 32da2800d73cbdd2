"""Progress bars that suit where they are shown: drawn on a terminal, in a file a line now and then.

It imports no torch, so that commands without a model start at once.
"""

import sys
import time

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines
COLUMNS = 100  # of a line
COUNTS = "{percentage:.0f} %, {n_fmt} of {total_fmt} {unit}s"
TIMES = "{elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


class Bar(tqdm):
    """tqdm, but where stderr is no terminal it writes a line every half minute and one at the end.

    Takes what tqdm takes. With `leave=False` there is no line at the end, and with `delay` none for
    what takes less than that many seconds.
    """

    def __init__(self, *args, **options):
        self.plain = not sys.stderr.isatty()
        self.began = self.said = time.monotonic()
        self.said_n = None  # how far it was at the last line
        if self.plain:
            # Any update may be the one after half a minute, so all of them look at the clock.
            options |= {"bar_format": f"{COUNTS}, {TIMES}", "miniters": 1, "mininterval": EVERY}
            options["disable"] = bool(options.get("disable"))  # tqdm's None would be silent
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar; in a file, write a line if it is time for one."""
        if not self.plain:
            return super().display(msg, pos)
        if time.monotonic() - self.said >= EVERY:
            self._say()
        return False  # nothing was drawn that tqdm would have to wipe away

    def _say(self) -> None:
        self.said, self.said_n = time.monotonic(), self.n
        name = self.desc.removesuffix(": ")
        line = f"{name}: {self}" if name else str(self)
        line = line if len(line) <= COLUMNS else line[: COLUMNS - 4] + " ..."
        self.fp.write(line + "\n")
        self.fp.flush()

    def clear(self, *args, **options) -> None:
        """Wipe the bar away, to print above it; lines in a file stay."""
        if not self.plain:
            super().clear(*args, **options)

    def close(self) -> None:
        """End the bar; in a file with a line, unless it said the same before."""
        if self.plain and not self.disable:
            late = time.monotonic() - self.began >= self.delay
            if self.leave and late and self.n not in (0, self.initial, self.said_n):
                self._say()
            self.leave = False  # tqdm would end its drawing with an empty line
        super().close()


class WritingBar(Bar):
    """A bar of the tokens of texts that are written about users' histories.

    How many texts there will be follows from the histories; how long they will be is first the
    limit, then the mean of those that are done. So the bar moves with every token, and what it
    foresees is too long at first rather than too short.
    """

    def __init__(self, lengths: list[int], block_size: int, merged: bool, limit: int, hidden: bool):
        """lengths: items of each user. merged: one more text joins those of a user's blocks."""
        blocks = [-(-length // block_size) for length in lengths]
        self.texts = sum(blocks) + merged * sum(n > 1 for n in blocks)
        self.limit, self.users_done, self.users = limit, 0, len(lengths)
        super().__init__(total=self.texts * limit, unit="token", disable=hidden)

    def wrote(self, tokens: int, answered: int, under_way: int) -> None:
        """Show how far it is: tokens of texts that are done, their number, and other tokens."""
        mean = tokens / answered if answered else self.limit
        now = tokens + under_way
        self.total = max(now, round(tokens + (self.texts - answered) * mean))
        self.set_postfix_str(f"{self.users_done} of {self.users} users", refresh=False)
        self.update(max(0, now - self.n))  # texts that start over are not taken back

    def user_done(self) -> None:
        """Count a user."""
        self.users_done += 1

    def close(self) -> None:
        """End the bar; what was foreseen has become what there was."""
        if not self.disable and self.users_done == self.users:
            self.total = self.n
            self.set_postfix_str(f"{self.users_done} of {self.users} users", refresh=False)
        super().close()
