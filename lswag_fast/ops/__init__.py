"""Ops: pure functions over tensors, one file each; checks first, then the choice of backend."""
