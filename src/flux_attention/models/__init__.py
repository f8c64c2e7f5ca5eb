"""Frozen backbones: attaching routers to them, loading them, and the adapter files."""
