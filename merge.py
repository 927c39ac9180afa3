"""Merge a trained adapter into its base model: a new folder, which any program can load.

    python merge.py --output FOLDER                        the newest run in runs/
    python merge.py --model runs/NAME --output FOLDER      a run, a checkpoint, an adapter

The weights are added up in fp32, and the adapter's folder stays as it is. Weights that were frozen
in 4 bits are written as the numbers that the training has computed with.
"""

from dataclasses import replace

from safetensors import SafetensorError

from objectives.table import NAMES
from support.adapters import learning_rate, merge, read_adapter
from support.command_line import parse_run_config
from support.errors import UserError, command
from support.files import new_folder, open_to_readers, written_whole
from support.model import load_model, load_tokenizer
from support.model_card import save_tokenizer


@command
def main(argv: list[str]) -> None:
    """Load the adapter with its base model as in its training, and write their sum."""
    config, others = parse_run_config(
        argv, __doc__, NAMES, output="a new folder, for the merged model"
    )
    folder = new_folder(others["output"], "--output", "the merged model is")
    adapter = read_adapter(config.model)
    if adapter is None:
        raise UserError(f"{config.model} holds no adapter, so there is nothing to merge.")
    tokenizer = load_tokenizer(config.model)
    # An adapter of another program says nothing of its base's precision: nothing is rounded then.
    chosen = others["base"] or any(word.startswith("--precision") for word in argv)
    precision = config.sampling_precision if chosen else "fp32"
    trained = load_model(config.model, precision, quantize=config.quantize)
    whole = load_model(adapter["base_model_name_or_path"], "fp32")
    merge(trained, whole)
    with written_whole(folder, "--output", (OSError, SafetensorError)) as partial:
        whole.save_pretrained(partial)
        open_to_readers(partial)
        if others["base"]:  # it is of a run, whose prompt and settings belong to the model
            save_tokenizer(partial, tokenizer, config)
            # A base that is an adapter itself has been merged too.
            chain = read_adapter(others["base"]) is not None
            base = adapter["base_model_name_or_path"] if chain else others["base"]
            lr = learning_rate(config.lr, adapted=False)
            own = {"model": base, "adapter_rank": 0, "quantize": "none", "lr": lr}
            settings = replace(config, adapter_targets=["all-linear"], **own)
            settings.save(partial / "config.yaml")
        else:
            tokenizer.save_pretrained(partial)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
