"""Which codes and wordings tell failures apart? OpenAI's own, and those of servers like it."""

from __future__ import annotations

import re
from typing import Final

QUOTA: Final = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
    }
)
TOO_LONG: Final = frozenset(
    {"context_length_exceeded", "string_above_max_length", "exceed_context_size_error"}
)
TOO_LARGE: Final = frozenset({"max_tokens_per_request", "array_above_max_length"})

# Wordings of OpenAI, then vLLM, Text Embeddings Inference and llama.cpp, for one long text.
TOO_LONG_WORDS: Final = re.compile(
    r"maximum (?:input|context) length|must have less than \d+ tokens"
    r"|input (?:\(\d+ tokens\) )?is too (?:large|long)",
    re.IGNORECASE,
)
# Wordings of OpenAI, then TEI, Mistral, Gemini and DashScope, for too much in one request.
TOO_LARGE_WORDS: Final = re.compile(
    r"maximum request size|max \d+ tokens per request|array (?:length must be|too long)"
    r"|maximum allowed batch size|too many (?:inputs|tokens overall)"
    r"|at most \d+ requests can be in one batch|batch size is invalid",
    re.IGNORECASE,
)
# A 429 that no waiting can help: this request alone is above the limit per minute.
NEVER_FITS_WORDS: Final = re.compile(r"request too large", re.IGNORECASE)
POSITION: Final = re.compile(r"\binput(?:\[|\.)(\d{1,6})\b")
