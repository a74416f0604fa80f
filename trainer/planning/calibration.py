"""Every constant of the planner that was fitted or estimated, and to what. No torch.

Fitted to runs on H200s (torch 2.11, NVLink) that README's table of strategies and the recipes' headers show. Where
nothing was measured a line says "estimate". `tests/unit/test_planner.py` holds the measured points against the model.
"""

from __future__ import annotations

GIB = 2**30

# ---------------------------------------------------------------------------------------------------------------- rates

MATMUL_SHARE = 0.80  # of the peak FLOP/s that large 16-bit matmuls reach: 788 of 989 TFLOP/s on an H200
BANDWIDTH_SHARE = 0.90  # of the peak bandwidth that elementwise kernels reach: 4.3 of 4.8 TB/s on an H200
FABRIC_SHARE = 0.75  # of a link's peak that collectives reach; estimate
# Bytes that forward and backward move beside the matmuls, for each element that autograd keeps of a layer: norms,
# rotary embedding, activation, low-rank branch, residuals and what attention of short documents waits for.
UNFUSED_TRAFFIC = 57.0  # transformers' layer with one autograd function a linear
FUSED_TRAFFIC = 40.0  # one autograd function for several linears; estimate
RECOMPUTED_TRAFFIC = 0.75  # share of these that a whole layer's second forward moves again
LAYER_SECONDS = 0.6e-3  # that the host takes to launch a layer's kernels, forward and backward; estimate
LAUNCHES = {"none": 1.0, "norms": 1.05, "mlp": 1.15, "full": 1.35}  # of that, with a second forward; estimate

# ---------------------------------------------------------------------------------------------------- several processes

WAITING = 0.03  # share of a step that processes wait for one another: ddp against one GPU
GATHERING = 0.035  # and with layers gathered beside the matmuls: fsdp2 against ddp
ZERO_3 = 0.035  # and of DeepSpeed's stage 3 on top
GATHER_OVERLAP = 0.8  # share of a layer's computation that a gather may hide behind; estimate
BETWEEN_HOSTS = 40e9  # bytes/s each way of a GPU's share of the network between hosts; estimate (400 Gb/s InfiniBand)
HOST_LINK = 24e9  # bytes/s between a GPU and its host's memory; estimate (PCIe 4.0 x16)
HOST_ADAM = 1.5e9  # weights that a process's optimizer steps on in host memory each second; estimate

# --------------------------------------------------------------------------------------------------------------- memory

CONTEXT = 0.8 * GIB  # CUDA's context and libraries, which torch does not count; estimate
COMMUNICATION = 1.0 * GIB  # NCCL's buffers, with several processes; estimate
MARGIN = 0.05  # of what is predicted, left free for the allocator and the prediction's error
GATHERED_LAYERS = 3  # whole at a time under fsdp2: computing, coming, and copied out of what was received
ZERO_BUFFERS = 2.4  # bytes for each trained weight that DeepSpeed holds to send and receive; one run of zero3
HOST_PROCESS = 4.0 * GIB  # of host memory that a process has for Python, torch, CUDA and its packs; estimate

# ------------------------------------------------------------------------------------ what nobody knows before the data

TRAINED_SHARE = 0.5  # of the tokens that are in the loss
ATTENDED = 256  # positions a token attends to: documents of some 500 tokens
