"""From rows of text to packed batches: sources -> formats -> masking -> packing -> cache -> sampler."""
