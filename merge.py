"""Merge a trained adapter into its base model: a new folder, which any program can load.

    python merge.py --output FOLDER                        the newest run in runs/
    python merge.py --model runs/NAME --output FOLDER      a run, a checkpoint, an adapter

The weights are added up in fp32, and the adapter's folder stays as it is. Weights that were frozen
in 4 bits are written as the numbers that the training has computed with.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from objectives.table import NAMES
from support.adapters import merge, read_adapter
from support.checkpoint import open_to_readers
from support.command_line import parse_run_config
from support.errors import UserError, command
from support.model import load_model, load_tokenizer
from support.model_card import save_tokenizer


def check_output(output: str | None) -> Path:
    """The folder to write; UserError if there is something in its place."""
    if not output:
        raise UserError("Say where the merged model is to be written: --output FOLDER.")
    folder = Path(output).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already; choose another --output.")
    return folder


@command
def main(argv: list[str]) -> None:
    """Load the adapter with its base model as in its training, and write their sum."""
    config, others = parse_run_config(
        argv, __doc__, NAMES, output="a new folder, for the merged model"
    )
    folder, adapter = check_output(others["output"]), read_adapter(config.model)
    if adapter is None:
        raise UserError(f"{config.model} holds no adapter, so there is nothing to merge.")
    tokenizer = load_tokenizer(config.model)
    # An adapter of another program says nothing of its base's precision: nothing is rounded then.
    chosen = others["base"] or any(word.startswith("--precision") for word in argv)
    precision = config.sampling_precision if chosen else "fp32"
    trained = load_model(config.model, precision, quantize=config.quantize)
    whole = load_model(adapter["base_model_name_or_path"], "fp32")
    merge(trained, whole)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        whole.save_pretrained(partial)
        open_to_readers(partial)
        if others["base"]:  # it is of a run, whose prompt and settings belong to the model
            save_tokenizer(partial, tokenizer, config)
            # All weights learn at a tenth of the rate of adapters; a base that is an adapter itself
            # has been merged too.
            chain = read_adapter(others["base"]) is not None
            base = adapter["base_model_name_or_path"] if chain else others["base"]
            lr = float(f"{config.lr / 10:.12g}")
            own = {"model": base, "adapter_rank": 0, "quantize": "none", "lr": lr}
            settings = replace(config, adapter_targets=["all-linear"], **own)
            settings.save(partial / "config.yaml")
        else:
            tokenizer.save_pretrained(partial)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"Cannot write {folder}: {error}; choose another --output.") from error
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
