"""Your own paradigms: every command imports each file here, which registers what it defines.

docs/extending.md shows one.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(found.name for found in iter_modules(__path__)):  # the same order everywhere
    import_module(f"{__name__}.{_module}")
