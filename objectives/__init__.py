"""The other 16 methods of the GRPO family, as differences from loss.py."""
