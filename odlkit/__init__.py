"""odlkit: optimization-derived learning in PyTorch.  Its modules load when they are first named: ``odlkit.operators``."""

__version__ = "0.1.0"
MODULES = (
    "bench", "bilevel", "certify", "check", "control", "data", "instances", "linear", "metrics", "models", "networks",
    "operators", "priors", "problem", "propagate", "propositions", "solvers", "tasks", "training", "viz", "weights",
)  # fmt: skip


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module 'odlkit' has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"odlkit.{name}")


def __dir__() -> list[str]:
    return [*MODULES, "__version__"]
