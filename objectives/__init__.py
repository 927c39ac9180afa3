"""The other methods of the GRPO family, as differences from loss.py."""
