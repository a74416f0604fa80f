"""Every constant of the planner that was fitted or estimated, and to what. No torch.

Rates are fitted to 47 points on one H200 (torch 2.11): Llama-2 of 7B, 13B and 70B and Llama-3-8B, all methods, every
level, 4,096 to 32,768 tokens a micro-batch, short documents and long. Predictions differ from them by at most 2.6%. The
memory of one GPU is counted, not fitted, and within 1.0% of these points. Several processes are fitted to two and four
GPUs with NVLink. Where nothing was measured a line says "estimate". `tests/unit/test_planner.py` has the points.
"""

from __future__ import annotations

GIB = 2**30

# ---------------------------------------------------------------------------------------------------------------- rates

MATMUL_SHARE = 0.676  # of the peak FLOP/s, in the mix of a step: 669 of 989 TFLOP/s on an H200 at its limit of power
FLOAT8_SHARE = 0.64  # of float8's peak, which is twice that
VARLEN_SHARE = 0.273  # of the peak that torch's attention reaches over causal documents of 4,096 and 8,192 tokens
FLASH4_SHARE = 0.587  # and flash-attn-4
BANDWIDTH_SHARE = 0.90  # of the peak bandwidth that elementwise kernels reach: 4.3 of 4.8 TB/s on an H200
ADAMW_SHARE = 0.63  # of it that torch's fused AdamW reaches: 36 ms for 7B weights in bfloat16
# that the memory could move while one of bitsandbytes' optimizers steps on a weight: 198, 217 and 135 ms for these 7B
OPTIMIZER_BYTES = {"adamw_8bit": 141, "paged_adamw_8bit": 155, "paged_adamw_32bit": 96}
TENSOR_SECONDS = 6e-5  # for which they wait after each tensor's step
FABRIC_SHARE = 0.75  # of a link's peak that collectives reach; estimate
# How often forward and backward move all that autograd keeps of a layer beside the matmuls: norms, rotary embedding,
# activation, rank-r products, residuals.
FUSED_PASSES = 7.4  # of three nodes: the slope over tokens of level none
UNFUSED_PASSES = 19  # of modules: 16,464 tok/s of a QLoRA that had no nodes yet
FUSED_FORWARD, UNFUSED_FORWARD = 0.47, 0.5  # shares of these that are forward's: level full
LAYER_SECONDS = 0.51e-3  # of a layer whatever its tokens, on small kernels and their launch: level none at 4,096 tokens

# ---------------------------------------------------------------------------------------------------- several processes

WAITING = 0.03  # share of a step that processes wait for one another: ddp against one GPU
GATHERING = 0.035  # and with layers gathered beside the matmuls by a collective: fsdp2 against ddp
PULLING = 0.013  # and with frozen layers pulled by copy engines: fsdp2 against ddp
ZERO_3 = 0.035  # and of DeepSpeed's stage 3 on top
GATHER_OVERLAP = 0.8  # share of a layer's computation that a gather may hide behind; estimate
BETWEEN_HOSTS = 40e9  # bytes/s each way of a GPU's share of the network between hosts; estimate (400 Gb/s InfiniBand)
HOST_LINK = 24e9  # bytes/s between a GPU and its host's memory; estimate (PCIe 4.0 x16)
HOST_ADAM = 1.5e9  # weights that a process's optimizer steps on in host memory each second; estimate

# --------------------------------------------------------------------------------------------------------------- memory

CONTEXT = 0.8 * GIB  # CUDA's context and libraries, which torch does not count; estimate
COMMUNICATION = 1.0 * GIB  # NCCL's buffers, with several processes; estimate
MARGIN = 0.05  # of what is predicted, left free for the allocator and the prediction's error
GATHERED_LAYERS = 3  # trained ones, whole at a time under fsdp2: computing, coming, and copied out of what was received
FROZEN_LAYERS = 2  # frozen ones: computing and coming
ZERO_BUFFERS = 2.4  # bytes for each trained weight that DeepSpeed holds to send and receive; one run of zero3
HOST_PROCESS = 4.0 * GIB  # of host memory that a process has for Python, torch, CUDA and its packs; estimate

# ------------------------------------------------------------------------------------ what nobody knows before the data

TRAINED_SHARE = 0.5  # of the tokens that are in the loss
ATTENDED = 256  # positions a token attends to: documents of some 500 tokens
