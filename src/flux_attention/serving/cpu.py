"""Routed attention on a CPU, where the tests run the plugin."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from flux_attention.serving.attention import RoutedBuilder, RoutedImpl


class RoutedCPUBuilder(RoutedBuilder, CPUAttentionMetadataBuilder):
    """Plans every batch on the host."""


class RoutedCPUImpl(RoutedImpl, CPUAttentionBackendImpl):
    """The CPU's paged kernel."""


class RoutedCPUBackend(CPUAttentionBackend):
    """Takes the place of vLLM's CPU backend, whose name the platform hard-codes."""

    @staticmethod
    def get_impl_cls() -> type[RoutedCPUImpl]:
        return RoutedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[RoutedCPUBuilder]:
        return RoutedCPUBuilder
