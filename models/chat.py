"""The form of a prompt: the plain one, or the turns of the model's own chat template.

A template is rendered once, with a placeholder for the user's words. A prompt is then the text
before them, the words, and the text behind them. The template's control tokens become tokens; the
words never do, so nothing that an item, a summary or a user says can end the user's turn.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import trsr
from llama import CheckpointError
from models import render
from models.markup import named_tokens, open_markup, read_options
from models.tokenizer import Tokenizer

SECONDS, BYTES, CHARACTERS = 5, 2**30, 100_000  # what a template may take and write
PATIENCE = 12  # times as many seconds by the clock, on a busy machine
WAY_OUT = "for the plain form: --no-chat, or train.py without --chat"

USER, ANSWER = "TheUsersWords7f3a", "TheAssistantsWords7f3a"
BLANKS = "\n "
PROBE = "Ab  \"c\" 'd' <e> & {{f}} {% g %} \\n [h]\n\n1. é ☃; #i"
SAMPLE = "Title: blue lamp; Price: 12"

# A template's turns may be marked by plain text too, such as [/INST] or <|user|>.
_MARK = re.compile(r"<<?/?\|?[\w./-]+\|?>>?|\[/?[A-Z_]+\]")


class Plain:
    """The form without a template: headers in plain text, as trsr.plain_turn writes them."""

    stops: tuple[str, ...] = trsr.STOP_TEXTS  # texts at which an answer is over
    no_repeat_ngram_size = 0  # what a summary does not repeat, unless asked otherwise; 0: anything
    end_ids: tuple[int, ...] = ()  # tokens at which it is, besides the model's own

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def show(self, message: str) -> str:
        """Return the prompt of a message as text."""
        return trsr.plain_turn(message)

    def encode(self, messages: list[str], answer: str = "") -> list[list[int]]:
        """Return the ids of each message's prompt, continued by the assistant's answer."""
        return self.tokenizer.encode([self.show(message) + answer for message in messages])


class Chat:
    """The form that the chat template in a model's folder gives to a user's message.

    For a message without control tokens the ids are those of transformers. Raises CheckpointError
    for a template that cannot be used.
    """

    stops: tuple[str, ...] = ()  # what a message or an answer may say is up to the model
    no_repeat_ngram_size = 8  # docs/prompts.md has the measurement

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.path, template = read_template(folder)
        self.markup = open_markup(tokenizer)
        self._read(*self._render(template, named_tokens(folder)))

        # Marks that are tokens need no change: in a message they are no tokens.
        marks = set(_MARK.findall(template)) - set(self.markup.controls)
        self.marks = re.compile("|".join(map(re.escape, sorted(marks))) or "(?!)")
        self.frames: dict[str, tuple] = {}
        self._check(tokenizer.rows)

    def show(self, message: str) -> str:
        """Return the prompt of a message as text."""
        return self.before + self._words(message) + self.after

    def encode(self, messages: list[str], answer: str = "") -> list[list[int]]:
        """Return the ids of each message's prompt, continued by the assistant's answer."""
        head, before, after, tail = self._frame(answer)
        texts = [before + self._words(message) + after for message in messages]
        rows = self.markup.encode(texts, first=not head)
        return [head + row + tail for row in rows]

    def _words(self, message: str) -> str:
        """Return a message as the template takes it, without texts that mark the turns."""
        message = message.lstrip() if self.trims[0] else message
        message = message.rstrip() if self.trims[1] else message
        return self.marks.sub(lambda mark: f"({mark[0].strip('<>[]')})", message)

    def _frame(self, answer: str) -> tuple[list[int], str, str, list[int]]:
        """Return what goes around a message: ids, text, text, ids."""
        if answer not in self.frames:  # as a rule there are three of them
            pieces = self.answered if answer else self.asked
            pieces = [p if isinstance(p, int) else p.replace(ANSWER, answer) for p in pieces]
            place = next(i for i, p in enumerate(pieces) if isinstance(p, str) and USER in p)
            before, after = pieces[place].split(USER)
            head = self.markup.join(pieces[:place])
            tail = self.markup.join(pieces[place + 1 :], first=False)
            self.frames[answer] = head, before, after, tail
        return self.frames[answer]

    # ---- What the template does

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the chat template {what}; {WAY_OUT}")

    def _render(self, template: str, variables: dict[str, str]) -> list[str]:
        """Return three chats: the placeholder, the probe between blanks, and one with an answer."""
        chats = [([turn("user", text)], True) for text in (USER, BLANKS + PROBE + BLANKS)]
        chats.append(([turn("user", USER), turn("assistant", ANSWER)], False))
        limits = {"seconds": SECONDS, "bytes": BYTES, "characters": CHARACTERS}
        asked = {"template": template, "variables": variables, "chats": chats, **limits}
        command = [sys.executable, "-P", render.__file__]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked),
                capture_output=True,
                encoding="utf-8",
                timeout=PATIENCE * SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise self._error("comes to no end") from None
        if done.returncode == -getattr(signal, "SIGXCPU", 0) < 0:
            raise self._error(f"takes longer than {SECONDS} s")
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise self._error(f"cannot be rendered ({why[:300]})") from None
        if "error" in answer:
            raise self._error(f"cannot be rendered ({answer['error']})")
        return answer["texts"]

    def _read(self, prompt: str, probe: str, turns: str) -> None:
        """Take the rendered chats apart: what goes around a message, and what ends an answer."""
        if prompt.count(USER) != 1:
            raise self._error("has no place for a user's turn")
        self.before, self.after = prompt.split(USER)

        # It may trim a message, and so must we. Whatever else it did to it would go unnoticed.
        core = probe.removeprefix(self.before).removesuffix(self.after)
        self.trims = not core.startswith(BLANKS), not core.endswith(BLANKS)
        kept = ["" if trimmed else BLANKS for trimmed in self.trims]
        if probe != self.before + kept[0] + PROBE + kept[1] + self.after:
            raise self._error("changes the words of a user's turn")

        parts = re.split(f"({USER}|{ANSWER})", turns)
        if parts[1::2] != [USER, ANSWER]:
            raise self._error("has no place for an assistant's turn behind a user's")
        between, end = parts[2], parts[4]
        # Between the cue and an answer the template may have a blank, which belongs to the answer.
        gap = between.removeprefix(self.after) if between.startswith(self.after) else ""
        self.asked, self.answered = map(self.markup.split, (prompt, f"{prompt}{gap}{ANSWER}"))
        ends = [piece for piece in self.markup.split(end) if isinstance(piece, int)]
        self.end_ids: tuple[int, ...] = tuple(ends[:1])

    def _check(self, rows: int) -> None:
        """Raise CheckpointError unless the prompts fit the tokenizer, and the model's embedding."""
        (ids,), text = self.encode([SAMPLE]), self.show(SAMPLE)
        if ids != self.markup.whole(text):
            raise self._error("and the tokenizer do not agree on where its tokens are")
        highest = max([*ids, *self.end_ids, *self.encode([SAMPLE], answer="Yes")[0]])
        if highest >= rows:
            what = f"has token {highest}, but the model's embedding has {rows} rows"
            raise self._error(what)


Form = Plain | Chat


def turn(role: str, text: str) -> dict[str, str]:
    """Return a message as templates have them."""
    return {"role": role, "content": text}


def has_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template, be it a good one or not."""
    own = (folder / "chat_template.jinja").is_file()
    return own or read_options(folder).get("chat_template") is not None


def read_template(folder: Path) -> tuple[Path, str]:
    """Return a folder's chat template and its file; CheckpointError if there is none.

    A chat_template.jinja goes before what tokenizer_config.json has. Of several templates the one
    named "default" is meant.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path, path.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{path}: not a text ({error}); {WAY_OUT}") from None

    path = folder / "tokenizer_config.json"
    found = read_options(folder).get("chat_template")
    if found is None:
        what = "no chat_template.jinja, and no chat_template in tokenizer_config.json"
        raise CheckpointError(f"{folder}: {what}; {WAY_OUT}")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str):
        what = "chat_template is neither a text nor a list with a text named 'default'"
        raise CheckpointError(f"{path}: {what}; {WAY_OUT}")
    return path, found


def form_of(folder: Path, tokenizer: Tokenizer, chat: bool) -> Form:
    """Return the form of a model's prompts: its chat template's if chat, else the plain one.

    Raises CheckpointError, which names the file, if chat and there is no template or a bad one.
    """
    return Chat(folder, tokenizer) if chat else Plain(tokenizer)
