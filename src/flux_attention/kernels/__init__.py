"""Attention kernels on packed sequences; everything public is in `flux_attention.kernels.api`."""
