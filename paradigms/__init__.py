"""Your own paradigms: every command imports each file here, which registers what it defines.

docs/extending.md shows one.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(found.name for found in iter_modules(__path__)):  # the same order everywhere
    try:
        import_module(f"{__name__}.{_module}")
    except ValueError as error:  # a name that is taken, for example
        print(f"{__name__}/{_module}.py: {error}", file=sys.stderr)
        sys.exit(2)
