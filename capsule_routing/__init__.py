__version__ = "0.2.0"

from typing import TYPE_CHECKING
if TYPE_CHECKING: from .all import *

def __getattr__(name):
    "`capsule_routing.CapsNet` and every other name of `capsule_routing.all`; importing the package loads none of them."
    from importlib import import_module
    from importlib.util import find_spec
    if name.startswith("__"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec(f"{__name__}.{name}"): return import_module(f"{__name__}.{name}")
    try: return getattr(import_module(f"{__name__}.all"), name)
    except AttributeError: raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

def __dir__(): return sorted([*globals(), *__getattr__("all").__all__])
