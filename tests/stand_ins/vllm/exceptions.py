class VLLMValidationError(Exception):
    """As of 0.32 no ValueError."""
