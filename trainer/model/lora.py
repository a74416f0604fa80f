"""LoRA on frozen linears, fused: one autograd node for the base's matmul and the adapter's (arXiv:2106.09685).

PEFT owns configuration, names and files, so an adapter trained here loads in PEFT and vLLM and one made by PEFT loads
here. Only the forward is ours, and only where nothing special is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn
from transformers import PreTrainedModel

from trainer.config import AdapterConfig
from trainer.errors import PacktrainError, UserError
from trainer.model.adapters import Adapter, cast_adapters
from trainer.model.format import Format
from trainer.model.linears import Linears, LinearSpec, beside, project, project_backward
from trainer.model.quantized import QuantizedLinear

ADAPTER = "default"  # PEFT's name of the only adapter


class LoraMatMul(torch.autograd.Function):
    """One linear with its adapter. Saves x, the rank-r product, the base and the adapter as it is multiplied.

    PEFT's own path keeps the input twice (with a cast between the adapter's dtype and the base's) and the adapter's
    output once more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, spec: LinearSpec, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """``x [..., in]`` in the dtype of the matmuls; tensors as of `trainer.model.linears.Linears`."""
        linears, rows = Linears([spec], tensors), x.reshape(-1, x.shape[-1])
        wide = beside(rows, linears)
        output = project(wide, linears)
        if bias is not None:
            output += bias.to(x.dtype)
        ctx.save_for_backward(x, wide[:, rows.shape[1] :].clone(), *tensors)
        ctx.spec = spec
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low_rank, *tensors = ctx.saved_tensors
        linears, rows = Linears([ctx.spec], tensors), x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        wide = beside(grad.to(x.dtype), linears)
        grad_x, grad_tensors = project_backward(wide, rows, low_rank, linears, ctx.needs_input_grad[0])
        return grad_x if grad_x is None else grad_x.view_as(x), None, None, *grad_tensors


class FusedLora(PeftLoraLinear):
    """PEFT's LoRA layer with a fused forward; PEFT's own for dropout, DoRA, several or disabled adapters.

    Attributes:
        drawn: first value of A on the CPU, until `attach_adapter` takes it. PEFT takes an adapter's storage away where
            the base has none.
    """

    drawn: torch.Tensor | None = None

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Draws A as PEFT does, with the CPU's generator, and sets B to zero."""
        super().reset_lora_parameters(adapter_name, init_lora_weights)
        matrix: Any = self.lora_A[adapter_name]
        self.drawn = matrix.weight.detach()

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter."""
        super().update_layer(adapter_name, *args, **kwargs)
        matrix: Any = self.lora_A[adapter_name]
        if self.drawn is not None:
            self.drawn = self.drawn.to(matrix.weight.dtype)  # PEFT rounds to a 16-bit base's

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in] -> [..., out]``; in the input's dtype, or in the matmuls' under autocast."""
        if args or kwargs or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        autocast = torch.is_autocast_enabled(x.device.type)
        if isinstance(base, QuantizedLinear):
            dtype = base.compute_dtype
        else:
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.weight.dtype
        # autocast inside an autograd function would cast the forward and not the backward
        with torch.autocast(x.device.type, enabled=False):
            ((lora_a, (lora_b,)),) = cast_adapters([[self.adapter()]], dtype)
            format, tensors = read_base(base)
            spec = LinearSpec(format, rank=lora_b.shape[1])
            output = LoraMatMul.apply(x.to(dtype), base.bias, spec, *tensors, lora_b, lora_a)
        return output if autocast else output.to(x.dtype)

    def adapter(self) -> Adapter:
        """That of a plain layer."""
        name = self.active_adapters[0]
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        return Adapter(lora_a.weight, lora_b.weight, self.scaling[name])

    def is_plain(self) -> bool:
        """Whether nothing is asked for but one adapter's product, which is what is fused."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return False
        base, dropout = self.get_base_layer(), self.lora_dropout[active[0]]
        drops = isinstance(dropout, nn.Dropout) and self.training and dropout.p > 0
        frozen = isinstance(base, QuantizedLinear) or not base.weight.requires_grad
        return frozen and not drops and active[0] not in self.lora_variant and not self.lora_bias[active[0]]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge into a 16-bit base.

        Raises:
            PacktrainError: the base is quantised, where rounding would lose the adapter.
        """
        if isinstance(self.get_base_layer(), QuantizedLinear):
            raise PacktrainError("an adapter cannot be merged into quantised weights: use `packtrain merge`")
        super().merge(safe_merge, adapter_names)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


class PlainLinear(NamedTuple):
    """A linear without bias whose product and its adapter's are all that it computes.

    Attributes:
        base: a QuantizedLinear or nn.Linear; what it holds may be gathered later.
    """

    base: Any
    adapter: Adapter | None


def plain_linear(module: nn.Module, dtype: torch.dtype | None = None) -> PlainLinear | None:
    """What a linear computes with in `dtype` (None: in its own); None where only the module itself can say.

    That is with a bias, dropout, DoRA and the like, and where a module's own hooks have to run: ZeRO-3 gathers what a
    module owns when that module is called.
    """
    base: Any = module.get_base_layer() if isinstance(module, FusedLora) else module
    if not isinstance(base, (QuantizedLinear, nn.Linear)) or base.bias is not None:
        return None
    if isinstance(base, QuantizedLinear) and dtype not in (None, base.compute_dtype):
        return None
    if any(part._forward_pre_hooks or part._forward_hooks for part in (module, base)):
        return None
    if isinstance(module, FusedLora):
        return PlainLinear(base, module.adapter()) if module.is_plain() else None
    return PlainLinear(base, None)


def read_base(base: Any) -> tuple[Format | None, tuple[torch.Tensor, ...]]:
    """Format and tensors of a linear's own weight, as `trainer.model.linears.Linears` takes them."""
    if isinstance(base, QuantizedLinear):
        return base.format, (base.packed, base.scales)
    return None, (base.weight,)


def decoder_linears(causal_lm: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear modules of the decoder layers by full name, quantised ones included; neither embeddings nor head."""
    layers = causal_lm.get_decoder().layers
    prefix = next(name for name, module in causal_lm.named_modules() if module is layers)
    return {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, QuantizedLinear))
    }


def lora_config(causal_lm: PreTrainedModel, adapter: AdapterConfig) -> LoraConfig:
    """PEFT's configuration of `adapter`, `all-linear` spelled out (PEFT's own finds no quantised linears).

    Raises:
        UserError: a target or a module to save does not exist, or a tied one would be trained apart from its twin.
    """
    _check_rank(causal_lm, adapter)
    # vLLM and older PEFT read an integer; PEFT computes with any number.
    alpha: Any = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        target_modules=_check_targets(causal_lm, adapter),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=_check_modules_to_save(causal_lm, adapter),
    )
    config._register_custom_module({QuantizedLinear: FusedLora, nn.Linear: FusedLora})
    return config


def _check_targets(causal_lm: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    names = list(decoder_linears(causal_lm))
    short = sorted({name.rpartition(".")[2] for name in names})
    if adapter.targets == "all-linear":
        return short
    unknown = [t for t in adapter.targets if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown or not adapter.targets:
        raise UserError("adapter.targets", ", ".join(unknown) or "no target", ", ".join(["all-linear", *short]))
    return list(adapter.targets)


def _check_rank(causal_lm: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Beyond the largest side of a matrix a rank adds nothing but memory."""
    linears: dict[str, Any] = decoder_linears(causal_lm)
    largest = max(max(linear.in_features, linear.out_features) for linear in linears.values())
    if adapter.r > largest:
        raise UserError("adapter.r", str(adapter.r), f"1 to {largest}, the largest side of the model's matrices")


def _check_modules_to_save(causal_lm: PreTrainedModel, adapter: AdapterConfig) -> list[str] | None:
    names = [name for name, module in causal_lm.named_modules() if isinstance(module, (nn.Embedding, nn.Linear))]
    allowed = sorted({name.rpartition(".")[2] for name in names} - set(_short_names(causal_lm)))
    if unknown := [name for name in adapter.modules_to_save if name not in allowed]:
        raise UserError("adapter.modules_to_save", ", ".join(unknown), ", ".join(allowed))
    if adapter.modules_to_save and causal_lm.config.tie_word_embeddings:
        raise UserError(
            "adapter.modules_to_save",
            f"{', '.join(adapter.modules_to_save)} of a model whose head is tied to its embeddings",
            "modules_to_save of models with untied embeddings",
            "leave modules_to_save out, or train in full (no adapter)",
        )
    return adapter.modules_to_save or None


def _short_names(causal_lm: PreTrainedModel) -> set[str]:
    return {name.rpartition(".")[2] for name in decoder_linears(causal_lm)}


def attach_adapter(
    causal_lm: PreTrainedModel, adapter: AdapterConfig, seed: int
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Wraps a model without storage in a PeftModel, and draws the adapter: the same for a seed on any device.

    Returns:
        The PeftModel, and the first values of its low-rank matrices by parameter name, whole, on the CPU. What else is
        trained (DoRA's magnitudes, modules to save) follows from the base's weights.

    Raises:
        UserError: see `lora_config`.
    """
    config = lora_config(causal_lm, adapter)
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        model = get_peft_model(causal_lm, config)
    first_values: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FusedLora):
            assert layer.drawn is not None
            matrix_b: Any = layer.lora_B[ADAPTER]
            first_values[f"{name}.lora_A.{ADAPTER}.weight"] = layer.drawn
            first_values[f"{name}.lora_B.{ADAPTER}.weight"] = torch.zeros(()).expand(matrix_b.weight.shape)  # no memory
            layer.drawn = None
    return model, first_values


@torch.no_grad()
def dora_magnitudes(layer: FusedLora, weight: torch.Tensor) -> torch.Tensor:
    """First magnitudes ``[out]`` of a DoRA layer on a base of `weight` ``[out, in]``: its rows' norms, by PEFT."""
    magnitudes: Any = layer.lora_magnitude_vector[ADAPTER]
    nothing = weight.new_zeros(())  # B @ A of a fresh adapter
    return magnitudes.get_weight_norm(weight, nothing, 0.0)
