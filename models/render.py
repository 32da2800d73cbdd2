"""Renders a chat template: a program of its own, which models/chat.py starts and limits.

Reads JSON from standard input and writes JSON to standard output:

    {"template": text, "variables": {...}, "chats": [[messages, add_generation_prompt], ...],
     "seconds": of processor time, "bytes": of memory, "characters": of a rendered chat}
    {"texts": [...]} or {"error": one line}

A template is code from a stranger. In a process of its own it can neither hold up nor exhaust the
caller, whatever it does, and the caller needs no jinja2. Imports nothing of the project.
"""

import json
import sys
from datetime import datetime

try:
    import resource
except ImportError:  # not a Unix: the caller's patience is the only limit
    resource = None

JINJA = (3, 1, 6)  # earlier sandboxes have known holes
DAY = datetime(2024, 7, 26)  # for a template that insists on one: no prompt may depend on today


def limit(seconds: int, memory: int) -> None:
    """Limit this process's processor time and its bytes of memory, where the system can."""
    if resource is None:
        return
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def environment(**names: object):
    """Return jinja2's sandbox with what transformers offers to templates, and global names."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < JINJA:
        raise ImportError(f"jinja2 {jinja2.__version__} is too old: pip install -U jinja2")

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's words for training; here it changes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            """Return what stands between the tags."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    del made.filters["random"], made.globals["lipsum"]  # a prompt is no matter of chance
    made.globals |= {"raise_exception": raise_exception, **names}
    return made


def render(asked: dict, **names: object) -> list[str]:
    """Return each chat as text; whatever is wrong with the template is raised."""
    template, texts = environment(**names).from_string(asked["template"]), []
    for messages, add_generation_prompt in asked["chats"]:
        known = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        parts, room = [], asked["characters"]
        for part in template.generate(**asked["variables"], **known, tools=None, documents=None):
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise ValueError(f"writes more than {asked['characters']} characters")
        text = "".join(parts)
        text.encode()  # half a character would stop the tokenizer
        texts.append(text)
    return texts


def answer(asked: dict) -> dict:
    """Return what to write for what was asked."""
    try:
        try:
            return {"texts": render(asked)}
        except Exception as error:
            # Most templates test whether they can have the date, and do without.
            if "'strftime_now' is undefined" not in str(error):
                raise
            return {"texts": render(asked, strftime_now=DAY.strftime)}
    except MemoryError:
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "nests too deep"}
    except Exception as error:
        line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        return {"error": " ".join(f"{line}{error}".split())[:300] or type(error).__name__}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit(request["seconds"], request["bytes"])
    json.dump(answer(request), sys.stdout)
