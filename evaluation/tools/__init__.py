"""What a model may call while it answers: how a call is written, what is run, and what comes back."""

from evaluation.tools.calls import Call, MalformedCall, Tool, build_tools, calls_in, described, run_call, tool_turns

__all__ = ["Call", "MalformedCall", "Tool", "build_tools", "calls_in", "described", "run_call", "tool_turns"]
