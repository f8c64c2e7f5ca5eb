"""The command `flux-attn`."""

from flux_attention.cli.app import main

__all__ = ["main"]
