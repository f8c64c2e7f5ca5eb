"""A plugin for stock vLLM: per-request routing inside one continuous batch, KV blocks of sparse layers given back.

`register` is the entry point that vLLM calls in each of its processes. It changes nothing for engines that do not ask
for routing with `--additional-config '{"flux": {"adapter": …}}'`, which `flux-attn serve` does.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make the plugin's classes known to vLLM.

    Outside of the supported range it only warns: vLLM loads the plugin in every process, whether an engine asks for
    routing or not. One that does is refused by the scheduler and the worker.
    """
    from flux_attention.serving.compat import UnsupportedVLLMError, check_version, on_request_validation

    try:
        check_version()
    except UnsupportedVLLMError as error:
        logging.getLogger(__name__).warning("Flux routing is not available: %s", error)
        return
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
