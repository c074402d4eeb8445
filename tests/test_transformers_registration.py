"""Our loader takes its place in transformers in either import order, and gives it back."""

import subprocess
import sys

import pytest
from cases import GOLDEN
from transformers import AqlmConfig, LlamaConfig
from transformers_cases import load

HEAD = """
import sys, importlib
def light(): return not {"transformers", "accelerate", "aqlm"} & set(sys.modules)
def ours():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
    return table["aqlm"].__module__ == "aqlm_infer.integrations.transformers"
def loads():
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    return type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
def watchers(): return sum(type(f).__name__ == "_AfterTransformers" for f in sys.meta_path)
"""

ORDERS = {
    "ours first, reloads, unregister": """
import aqlm_infer; assert light()
import aqlm_infer.checkpoint; assert light()
importlib.reload(aqlm_infer.integrations); importlib.reload(aqlm_infer)
assert light() and watchers() == 1
import transformers; assert ours() and loads()
importlib.reload(sys.modules["transformers.quantizers.auto"]); assert ours()
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
from aqlm_infer.integrations import transformers as module
stock = module.AqlmInferQuantizer.replaces
assert stock.__name__ == "AqlmHfQuantizer"
importlib.reload(module); importlib.reload(aqlm_infer.integrations); importlib.reload(aqlm_infer)
assert table["aqlm"] is module.AqlmInferQuantizer and table["aqlm"].replaces is stock
assert watchers() == 1
module.register(); assert module.AqlmInferQuantizer.replaces is stock
module.unregister(); assert table["aqlm"] is stock and watchers() == 0
module.unregister(); assert table["aqlm"] is stock
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "llama_aqlm" not in CONFIG_MAPPING
module.register(); assert ours() and "llama_aqlm" in CONFIG_MAPPING
""",
    "transformers first": """
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto; assert not ours()
import aqlm_infer; assert ours()
""",
    "transformers first, its quantizers through us": """
import transformers; assert "transformers.quantizers.auto" not in sys.modules
import aqlm_infer; assert "transformers.quantizers.auto" not in sys.modules
import aqlm_infer.integrations.transformers; assert ours()
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registration(order):
    folder = str(GOLDEN / "hf_llama_tied_1x8g8")
    command = [sys.executable, "-c", HEAD + ORDERS[order], folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stock_config_class_stays():
    model = load(GOLDEN / "hf_llama_2x8g8")
    assert type(model.config.quantization_config) is AqlmConfig
    assert isinstance(model.config, LlamaConfig)
