"""Run models in transformers 4, in a process of its own: python in_transformers4.py FOLDER.

For each model in FOLDER/*/: its logits for the `rows` and `mask` of FOLDER/inputs.safetensors, and for the first row
alone what it generates, go into FOLDER/*/outputs.safetensors. A model that it saves itself lies in FOLDER/*/saved.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BltForCausalLM

assert transformers.__version__.startswith("4.57."), transformers.__version__
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
for folder in sorted(file.parent for file in root.glob("*/config.json")):
    model, report = BltForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        logits = model.eval()(inputs["rows"], attention_mask=inputs["mask"], use_cache=False).logits
    generated = model.generate(inputs["rows"][:1, :4], attention_mask=torch.ones(1, 4).long(), max_new_tokens=4)
    prompt = AutoTokenizer.from_pretrained(folder)("a\u00e9<s>", return_tensors="pt")["input_ids"]
    model.save_pretrained(folder / "saved")
    save_file({"logits": logits, "generated": generated, "prompt": prompt}, folder / "outputs.safetensors")
