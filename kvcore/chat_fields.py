"""Which fields of a chat request there are, and which of them can shape the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcore.errors import InvalidFieldError

# Parameters of the call that renders, which must not be reached as template variables.
RESERVED_VARIABLES = frozenset({
    "chat_template", "conversation", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
# Fields that shape the prompt; all others below do not.
_PROMPT_FIELDS = frozenset({
    "messages", "model", "tools", "tool_choice", "reasoning_effort", "documents",
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "cache_salt",
})  # fmt: skip
# What sampling, streaming, accounting and transport need; the prompt is the same without.
_OTHER_FIELDS = frozenset({
    "allowed_token_ids", "audio", "bad_words", "best_of", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "data_parallel_rank", "echo", "ec_transfer_params", "frequency_penalty",
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json",
    "guided_regex", "guided_whitespace_pattern", "ignore_eos", "include_reasoning",
    "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logit_bias",
    "logits_processors", "logprob_token_ids", "logprobs", "max_completion_tokens", "max_tokens",
    "media_io_kwargs", "metadata", "min_p", "min_tokens", "mm_payload", "mm_processor_kwargs",
    "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty", "priority",
    "prompt_cache_key", "prompt_cache_retention", "prompt_logprobs", "repetition_detection",
    "repetition_penalty",
    "request_id", "response_format", "return_mm_kwargs", "return_prompt_text",
    "return_token_ids", "return_token_offsets", "return_token_strs", "return_tokens_as_token_ids",
    "return_weight_versions", "routed_experts_prompt_start", "safety_identifier", "seed",
    "separate_reasoning", "service_tier", "session_id", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "store", "stream",
    "stream_interval", "stream_options", "stream_reasoning", "structured_outputs",
    "temperature", "thinking_token_budget", "top_k", "top_logprobs", "top_p", "use_beam_search",
    "user", "verbosity", "vllm_xargs", "watermarking", "web_search_options",
})  # fmt: skip
# Fields that change the prompt in ways that cannot be followed here.
_REFUSED_FIELDS = {
    "functions": "is deprecated; use tools",
    "function_call": "is deprecated; use tool_choice",
    "truncate_prompt_tokens": "cuts the prompt, which is not supported",
    "truncation_side": "cuts the prompt, which is not supported",
    "prompt_embeds": "has no token ids to look up",
}


def check_fields(request: Mapping[str, Any]) -> None:
    """Refuse a chat request for a field that could change the prompt unseen.

    Raises:
        InvalidFieldError: Names the field.
    """
    for field, value in request.items():
        if field in _PROMPT_FIELDS or field in _OTHER_FIELDS or value is None:
            continue
        raise InvalidFieldError(field, _REFUSED_FIELDS.get(field, "is not a known field"))
    salt = request.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise InvalidFieldError("cache_salt", "must be a non-empty string")
    transfer = request.get("kv_transfer_params")
    if isinstance(transfer, Mapping) and transfer.get("prompt_token_ids"):
        raise InvalidFieldError(
            "kv_transfer_params.prompt_token_ids", "replaces the messages; send it as a prompt"
        )
