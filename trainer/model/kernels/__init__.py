"""Elementwise work of decoder layers and the loss in as few passes over memory as it takes: Triton on CUDA, torch
elsewhere.

Plain functions on tensors ``[rows, columns]``, forward and backward; `trainer.model.blocks` makes autograd functions of
them. All compute in float32 and round once.
"""
