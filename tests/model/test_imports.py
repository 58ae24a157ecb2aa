"""What a first token must not wait for: modules that take a second to import and that nothing here uses."""

import subprocess
import sys

START = """
import sys, torch
import nanohybrid
from nanohybrid import LLM, HybridConfig, HybridLM, SamplingParams, load, save
from nanohybrid.engine.random_weights import stand_in_tokenizer

config = nanohybrid.preset("tiny")
with torch.device("meta"):
    HybridLM(config)
save(HybridLM(config, seed=0).bfloat16(), sys.argv[1])
stand_in_tokenizer(config).save(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16):
    assert load(sys.argv[1], dtype).dtype == dtype
    llm = LLM(sys.argv[1], dtype)
    assert len(llm.generate(["hi"], SamplingParams(max_tokens=1, ignore_eos=True))[0].token_ids) == 1
slow = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "transformers", "pandas")
print([name for name in slow if name in sys.modules])
"""


def test_building_loading_and_a_first_token_import_no_compiler(tmp_path):
    """torch._dynamo alone takes a second: torch loads it to draw numbers on the meta device, as nn.Embedding
    does unasked.
    """
    done = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_package_itself_imports_no_torch():
    code = (
        "import sys, nanohybrid; print([name for name in ('torch', 'numpy', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
