"""`pip install .` ends here: this project is read and run in its folder."""

raise SystemExit(
    "pocket-grpo is not installed, it is run in its folder: pip install -r requirements.txt, then "
    "python train.py."
)
