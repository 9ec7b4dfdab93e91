"""Run Mixture-of-Experts language models on devices they do not fit on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moedge.errors import MoedgeError

if TYPE_CHECKING:
    from moedge.models.anatomy import Anatomy as Anatomy
    from moedge.models.anatomy import dissect as dissect
    from moedge.models.tiny import make_tiny as make_tiny
    from moedge.models.trace import RoutingTrace as RoutingTrace
    from moedge.runtime.budget import Plan as Plan
    from moedge.runtime.generate import Step as Step
    from moedge.runtime.lm import LM as LM
    from moedge.runtime.lm import load as load
    from moedge.runtime.policy import POLICIES as POLICIES
    from moedge.runtime.replay import replay as replay
    from moedge.runtime.sampling import Sampling as Sampling

_EXPORTS = {  # public name -> the module it is imported from at first use, so that `import moedge` takes no time
    "Anatomy": "moedge.models.anatomy",
    "LM": "moedge.runtime.lm",
    "POLICIES": "moedge.runtime.policy",
    "Plan": "moedge.runtime.budget",
    "RoutingTrace": "moedge.models.trace",
    "Sampling": "moedge.runtime.sampling",
    "Step": "moedge.runtime.generate",
    "dissect": "moedge.models.anatomy",
    "load": "moedge.runtime.lm",
    "make_tiny": "moedge.models.tiny",
    "replay": "moedge.runtime.replay",
}
__all__ = ["MoedgeError", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moedge' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
