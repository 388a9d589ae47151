"""Kernels: attention of one device's queries to one shard of keys and values."""
