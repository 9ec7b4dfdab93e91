"""A process of the command line leaves out what running a model never calls; results and later imports stay right."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moedge.models.lean import _CONCRETE as CONCRETE
from moedge.models.lean import lean_imports

HEAVY = ("sympy.core", "scipy.sparse", "torch.distributed.tensor", "torch._inductor", "torch.onnx")

LOGITS = """
import json, sys
lean = sys.argv[1] == "lean"
if lean:
    from moedge.models.lean import lean_imports
    lean_imports()
import moedge
with moedge.load(sys.argv[2]) as lm:
    import torch
    ids = torch.arange(12).reshape(2, 6)
    logits = lm.model(ids).logits.double()
    tokens = lm.model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
print(json.dumps({"logits": logits.flatten().tolist(), "tokens": tokens, "modules": list(sys.modules)}))
"""

LATER = """
from moedge.models.lean import lean_imports
lean_imports()
from transformers import PreTrainedModel
import torch, scipy.optimize, sympy
assert scipy.optimize.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
assert sympy.Symbol("x") + 1 != 0
assert torch._dynamo.config.recompile_limit > 0
square = torch.compile(lambda x: x * x, backend="eager")
assert square(torch.tensor([3.0])).item() == 9
"""


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_lean_process_gives_the_same_results_from_fewer_modules(tiny: Callable[..., Path]) -> None:
    lean, plain = (json.loads(run(LOGITS, how, str(tiny()))) for how in ("lean", "plain"))
    assert lean["logits"] == plain["logits"]
    assert lean["tokens"] == plain["tokens"]
    assert not set(HEAVY) & set(lean["modules"])
    assert set(HEAVY) <= set(plain["modules"]), (
        "transformers imports less than it did: what is left out can be reviewed"
    )


def test_what_was_left_out_can_be_imported_later() -> None:
    run(LATER)


def test_it_leaves_a_process_alone_that_has_transformers() -> None:
    import transformers  # noqa: F401

    before = list(sys.meta_path)
    lean_imports()
    assert sys.meta_path == before


def test_a_size_that_is_a_number_has_a_hint_and_is_itself() -> None:
    assert CONCRETE["has_guarding_hint"](3)
    assert CONCRETE["guarding_hint_or_throw"](3) == 3
    assert not CONCRETE["is_nested_int"](3)
    assert [CONCRETE[f"sym_{which}"](True, False) for which in ("and", "or")] == [False, True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_forgotten_code_is_no_memory_and_still_runs() -> None:
    program = """if True:
        import re, torch
        from moedge.models.lean import forget_code
        def code(): return int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1])
        before, expected = code(), torch.ones(9) @ torch.ones(9)
        forget_code()
        print(before - code() > 20_000, bool(torch.ones(9) @ torch.ones(9) == expected))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
