"""What nodes would wait for while they hold GPUs, done before: the data's cache, and the base model's files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trainer.config import ModelConfig, RunConfig

logger = logging.getLogger(__name__)


def prepare(configs: Sequence[RunConfig]) -> list[str]:
    """Fetches and looks at what the runs read. What a recipe has wrong with data or model shows here.

    Returns:
        the fingerprint of each run's data.

    Raises:
        UserError: data or model cannot be used.
    """
    from trainer.data.prepare import load_splits, log_report  # imports torch
    from trainer.model.source import list_tensors
    from trainer.model.tokenizer import load_tokenizer

    looked_at: list[ModelConfig] = []
    fingerprints: list[str] = []
    for config in configs:
        splits = load_splits(config, load_tokenizer(config.model))
        if splits.fingerprint not in fingerprints:
            for name, report in splits.reports.items():
                log_report(name, report)
        fingerprints.append(splits.fingerprint)
        if config.model not in looked_at:
            looked_at.append(config.model)
            if config.model.init == "pretrained":
                tensors = list_tensors(config.model)
                logger.info("base model %s: %d tensors here", config.model.path, len(tensors))
    return fingerprints
