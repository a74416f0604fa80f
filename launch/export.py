"""`packtrain merge` and `verify`: from an adapter to one model that is proven to be the trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.export.parity import ParityReport
    from trainer.export.verify import VerifyReport
    from trainer.export.verify_model import ModelReport


def merge(
    source: Path,
    *,
    out: Path | None = None,
    base: Literal["dequantized", "original"] = "dequantized",
    verify: Annotated[bool, Parameter(negative="--no-verify")] = True,
) -> None:
    """Make one model of what was trained, tensor by tensor, on a GPU if there is one; after a kill it goes on.

    An adapter is merged into its base, with tokenizer, template, card and hashes. A full fine-tune's checkpoint, as
    however many processes wrote it, becomes standard safetensors; it needs nothing but its own files.

    Args:
        source: run dir (its adapter/, else its best checkpoint, else the newest), a checkpoint of it, or an adapter in
            PEFT's format.
        out: appears only when complete and proven; default: merged/ in the run dir. Inside a run dir only that and
            merged-NAME are left alone by a training.
        base: merge onto the weights trained on, quantised ones dequantised, or onto the 16-bit ones.
        verify: prove an adapter's merge as `packtrain verify` does, and measure what it did to the validation loss,
            before the folder appears.
    """
    from trainer.checkpoint.layout import RunDir
    from trainer.checkpoint.result import enclosing_run, find_result, is_run
    from trainer.export.consolidate import consolidate
    from trainer.export.merge import merge_adapter
    from trainer.export.result import full_checkpoint

    if checkpoint := full_checkpoint(source):
        if out is None:
            raise _no_place_for(checkpoint)
        whole = consolidate(checkpoint, out)
        print(
            f"{whole.out}: {whole.tensors} tensors of step {whole.step}, {whole.num_bytes / 2**30:.2f} GiB "
            f"in {whole.seconds:.1f} s"
        )
        return
    if out is None:
        run_dir = RunDir(source) if is_run(source) else enclosing_run(source)
        if run_dir is None:
            find_result(source)  # says so where there is nothing to merge
            raise UserError("--out", "not given, and the adapter lies in no run", "a folder that does not exist yet")
        out = run_dir.merged

    def approve(folder: Path) -> None:
        if verify:
            from trainer.export.verify import verify_export

            _print_proof(replace(verify_export(folder), folder=out))

    report = merge_adapter(source, out, base, approve=approve)
    print(
        f"{report.out}: {report.tensors} tensors, {report.changed} changed, merged onto the {report.base} base, "
        + (f"on which the adapter was not trained ({report.not_trained_on}), " if report.not_trained_on else "")
        + f"{report.num_bytes / 2**30:.2f} GiB in {report.seconds:.1f} s"
        + (f"\n  taken from {report.checkpoint}" if report.checkpoint else "")
    )


def verify(folder: Path, *, vllm: bool = False) -> None:
    """Prove that a merged model is base and adapter as trained: hashes, tensors, logits, tokenizer, stop token.

    What merging did to the loss of some validation rows is written into the folder's manifest and card. Of a full
    fine-tune's model: that it is as it was written, and its checkpoint's bit for bit where that is kept.

    Args:
        folder: merged folder, a full fine-tune's model, or a run dir that has one; with --vllm also another whole
            model, or an adapter that is served unmerged.
        vllm: prove as well that vLLM serves what was trained: prompts, log-probabilities, adapter and stop token on 100
            rows or more.
    """
    from trainer.export.verify import find_merged, verify_export
    from trainer.export.verify_model import find_model, verify_model
    from trainer.servable import WITHOUT_VLLM, vllm_is_usable

    if vllm and not vllm_is_usable():
        fix = "install the extra `serve` on a host with a GPU, or vLLM's build for CPUs"
        raise UserError("--vllm", WITHOUT_VLLM, fix=fix)
    if not find_merged(folder) and (model := find_model(folder)):
        _print_model(verify_model(model))
    elif not vllm or find_merged(folder):
        _print_proof(verify_export(folder))
    if vllm:
        from trainer.export.parity import check_parity

        _print_parity(check_parity(folder))


def _no_place_for(checkpoint: Path) -> UserError:
    """What to say where a full fine-tune's checkpoint is to become a model, and where to is not said."""
    from trainer.checkpoint.layout import MANIFEST, read_manifest
    from trainer.checkpoint.result import enclosing_run

    run, found, instead = enclosing_run(checkpoint), "not given", ""
    if run and (run.model / MANIFEST).exists():
        found = f"not given, and the run's finished model lies in {run.model} already"
        found, instead = f"{found}, of step {read_manifest(run.model).get('step')}", "use that one, or "
    place = run.path / f"merged-{checkpoint.name}" if run else checkpoint.with_name(f"{checkpoint.name}-model")
    fix = f"{instead}name a folder for {checkpoint.name}, such as --out {place}"
    return UserError("--out", found, "a folder that does not exist yet", fix)


def _print_model(report: ModelReport) -> None:
    step = f" at step {report.step}" if report.step is not None else ""
    checkpoint = report.checkpoint
    print(
        f"{report.folder}: {report.files} files ({report.num_bytes / 2**20:,.1f} MiB) are as they were written{step} "
        f"({report.seconds:.1f} s)\n"
        f"  tensors: {report.tensors}, of the names and shapes that its config asks for"
        + (f", each bit for bit that of {checkpoint}, rounded as the recipe says" if checkpoint else "")
        + "\n  config, tokenizer, chat template and stop tokens "
        + (f"are those of {checkpoint}" if checkpoint else "can be read")
        + ("" if checkpoint else "\n  not compared with what was trained: its checkpoint is gone or unreadable")
    )


def _print_proof(report: VerifyReport) -> None:
    print(
        f"{report.folder} is {report.what} ({report.computed}, {report.seconds:.1f} s)\n"
        f"  tensors: {report.tensors} compared with PEFT's float32 merge onto the {report.merged_onto} base, "
        f"{report.adapted} with an adapter; at most {report.rounded_otherwise:.2%} of one's elements lie one rounding "
        "step beside it\n"
        f"  logits: off by {report.logit_error:.3%} of the adapter's own effect (at most 5% allowed), which is "
        f"{report.adapter_effect:.2%} of the base's logits; over {report.prompts}\n"
        "  hashes, tokenizer, chat template and stop tokens agree"
        + (f"\n  validation loss: {report.validation}" if report.validation else "")
    )


def _print_parity(report: ParityReport) -> None:
    from trainer.export.parity import MAX_MEAN_DIFFERENCE

    effect = (
        "no base to compare with" if report.effect is None else f"differs from its base by {report.effect:.3g} nats"
    )
    stopped = "no reference tells" if report.stopped is None else f"{report.stopped:.0%} of the answers"
    print(
        f"{report.engine} serves {report.folder} as it was trained ({report.seconds:.1f} s)\n"
        f"  prompts: {report.conversations} conversations are asked in the tokens trained on; {report.prompts}\n"
        f"  log-probabilities: off by {report.mean_difference:.2g} nats on average (at most {MAX_MEAN_DIFFERENCE} "
        f"allowed) and {report.largest_difference:.2g} at most over {report.tokens:,} tokens, beside transformers in "
        f"{report.computed}; the likeliest token agrees at all {report.tops:,} places with a margin of more than "
        f"{report.margin:.2g}\n"
        f"  {report.served}: {effect}\n"
        f"  ends at the trained stop token: {stopped}"
    )
