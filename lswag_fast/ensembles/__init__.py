"""Proxies combined: LIBRA, what it is compared with, and what learns from a few trained architectures."""
