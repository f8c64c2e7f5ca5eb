"""A plugin for stock vLLM: per-request routing inside one continuous batch, KV blocks of sparse layers given back.

`register` is the entry point that vLLM calls in each of its processes. It changes nothing for engines that do not ask
for routing with `--additional-config '{"flux": {"adapter": …}}'`, which `flux-attn serve` does.
"""

from __future__ import annotations


def register() -> None:
    """Make the plugin's classes known to vLLM. Raises UnsupportedVLLMError outside of the supported range."""
    from flux_attention.serving.compat import check_version, on_request_validation

    check_version()
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from flux_attention.serving.options import check_request

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "flux_attention.serving.cpu.RoutedCPUBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "flux_attention.serving.flash.RoutedFlashBackend")
    on_request_validation(check_request)
    from flux_attention.serving import kv

    kv.register()
