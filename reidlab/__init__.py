"""Person and vehicle re-identification, and the search of its networks: see `reidlab.jobs.face`."""

from .jobs.face import FACE, faced

__version__ = "0.1.0"
__all__ = [*FACE, "__version__"]


def __getattr__(name: str):
    globals()[name] = value = faced(name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})
