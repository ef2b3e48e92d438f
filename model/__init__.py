"""The network alone: what it is, how it is stored, how it writes. Knows nothing of data or training."""

from model.config import GPTConfig
from model.folder import load_config, load_pretrained, save_pretrained
from model.generate import Generation, generate, stream
from model.gpt import GPT

__all__ = ["GPT", "GPTConfig", "Generation", "generate", "load_config", "load_pretrained", "save_pretrained", "stream"]
