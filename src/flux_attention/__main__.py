"""`python -m flux_attention` is `flux-attn`."""

from flux_attention.cli import main

main()
