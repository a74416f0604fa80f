"""`packtrain merge` and `verify`: from an adapter to one model that is proven to be the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def merge(
    source: Path,
    *,
    out: Path | None = None,
    base: Literal["dequantized", "original"] = "dequantized",
) -> None:
    """Make one model of what was trained, tensor by tensor, without a GPU.

    An adapter is merged into its base, with tokenizer, template, card and hashes. A full fine-tune's checkpoint, as
    however many processes wrote it, becomes standard safetensors; it needs nothing but its own files.

    Args:
        source: run dir (its best checkpoint, else the newest), a checkpoint of it, or an adapter in PEFT's format.
        out: appears only when complete; default: merged/ in the run dir.
        base: merge onto the weights trained on, quantised ones dequantised, or onto the 16-bit ones.
    """
    from trainer.checkpoint.layout import RunDir
    from trainer.checkpoint.result import find_result
    from trainer.errors import UserError
    from trainer.export.consolidate import consolidate
    from trainer.export.merge import merge_adapter
    from trainer.export.result import full_checkpoint

    if checkpoint := full_checkpoint(source):
        if out is None:
            raise UserError("--out", "not given", "a folder that does not exist yet", "name one")
        whole = consolidate(checkpoint, out)
        print(
            f"{whole.out}: {whole.tensors} tensors of step {whole.step}, {whole.num_bytes / 2**30:.2f} GiB "
            f"in {whole.seconds:.1f} s"
        )
        return
    if out is None:
        run_dir: RunDir | None = find_result(source).run_dir
        if run_dir is None:
            raise UserError("--out", "not given, and the adapter lies in no run", "a folder that does not exist yet")
        out = run_dir.merged
    report = merge_adapter(source, out, base)
    print(
        f"{report.out}: {report.tensors} tensors, {report.changed} changed, merged onto the {report.base} base, "
        f"{report.num_bytes / 2**30:.2f} GiB in {report.seconds:.1f} s"
    )


def verify(folder: Path) -> None:
    """Prove that a merged model is base and adapter as trained: hashes, tensors, logits, tokenizer, stop token.

    Args:
        folder: merged folder, or a run dir that has one.
    """
    from trainer.export.verify import verify_export

    report = verify_export(folder)
    print(
        f"{report.folder} is the model that was trained ({report.computed}, {report.seconds:.1f} s)\n"
        f"  tensors: {report.tensors} compared with PEFT's float32 merge onto the {report.merged_onto} base, "
        f"{report.adapted} with an adapter; at most {report.rounded_otherwise:.2%} of one's elements lie one rounding "
        "step beside it\n"
        f"  logits: off by {report.logit_error:.3%} of the adapter's own effect (at most 5% allowed), which is "
        f"{report.adapter_effect:.2%} of the base's logits; over {report.prompts}\n"
        "  hashes, tokenizer, chat template and stop tokens agree"
    )
