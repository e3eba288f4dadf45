"""What /server_info says of a server."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.core import SPECULATION_OFF, SamplingParams
from engine.server import access, bodies, protocol, sampling_fields, tool_fields
from engine.server.state import ServerOptions, Serving
from engine.server.version import version


def facts(serving: Serving, options: ServerOptions) -> dict[str, Any]:
    """What /server_info says: the model, its sizes, defaults and limits. No key is among them."""
    config, draft_name = serving.served.engine.config, serving.served.draft_name
    fields = ("temperature", "top_p", "top_k", "min_p")
    speculation = SPECULATION_OFF if draft_name == "none" else config.speculation
    return {
        "version": version(),
        "model": serving.names[0],
        "served_model_names": serving.names,
        "root": serving.served.root,
        "dtype": config.dtype_name,
        "device": config.device,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "prefix_caching": config.prefix_caching,
        "speculation": {
            "is_on": not speculation.is_off,
            "draft": draft_name,
            "is_planned": config.planned,
            **msgspec.to_builtins(speculation),
        },
        "sampling_defaults": {field: getattr(SamplingParams(), field) for field in fields},
        "limits": {
            "max_num_queued_reqs": options.max_num_queued_reqs,
            "max_num_queued_tokens": options.max_num_queued_tokens,
            "body_bytes": bodies.MAX_BODY,
            "body_values": bodies.MAX_VALUES,
            "all_bodies_bytes": bodies.MAX_TOTAL,
            "nesting": protocol.MAX_NESTING,
            "prompts": protocol.MAX_PROMPTS,
            "stop_strings": sampling_fields.MAX_STOP_STRINGS,
            "tools": tool_fields.MAX_TOOLS,
        },
        "open_routes": access.OPEN_ROUTES if options.api_keys else ["*"],
    }
