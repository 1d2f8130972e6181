"""The decoder of the pre-training ablation, as a transformers model.

Pre-norm with a gain per channel, learned positions, GELU and an untied head (Ahmadian et al. 2023,
arXiv:2305.19268, section 3, small). Two axes beyond the paper's: where positions come from, and
whether a norm has one gain or one per channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

POSITIONS = ("learned", "sinusoidal", "alibi")
GAINS = ("channel", "single")


class AblationConfig(PretrainedConfig):
    """Shape and the two architectural axes."""

    model_type = "ptqkit-ablation"

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 384,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 6,
        max_position_embeddings: int = 512,
        dropout: float = 0.0,
        positions: str = "learned",
        gain: str = "channel",
        **options,
    ) -> None:
        if positions not in POSITIONS or gain not in GAINS:
            raise ValueError(f"positions must be one of {POSITIONS}, gain one of {GAINS}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.positions = positions
        self.gain = gain
        options.setdefault("tie_word_embeddings", False)
        super().__init__(**options)


class Norm(nn.Module):
    """LayerNorm without a bias, whose gain is one number or one per channel."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(config.hidden_size if config.gain == "channel" else 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class Attention(nn.Module):
    """Causal attention; with ALiBi a slope per head instead of positions (arXiv:2108.12409)."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.dropout
        self.alibi = config.positions == "alibi"
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def _bias(self, length: int, like: torch.Tensor) -> torch.Tensor:
        slopes = 2.0 ** (-8.0 / self.heads * torch.arange(1, self.heads + 1, device=like.device))
        place = torch.arange(length, device=like.device)
        distance = place[None, :] - place[:, None]
        bias = slopes[:, None, None] * distance
        return bias.masked_fill(distance > 0, -math.inf).to(like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        mask = self._bias(length, q) if self.alibi else None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn_norm, self.attention = Norm(config), Attention(config)
        self.mlp_norm = Norm(config)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attn_norm(x)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.mlp_norm(x)))))


class AblationForCausalLM(PreTrainedModel):
    """The language model."""

    config_class = AblationConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False

    def __init__(self, config: AblationConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            scale = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.attention.o_proj.weight, std=scale)
            nn.init.normal_(module.fc2.weight, std=scale)

    def _sinusoids(self, length: int, like: torch.Tensor) -> torch.Tensor:
        half = self.config.hidden_size // 2
        rate = torch.exp(-math.log(1e4) / half * torch.arange(half, device=like.device))
        angle = torch.arange(length, device=like.device)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], -1).to(like.dtype)

    def forward(self, input_ids=None, attention_mask=None, labels=None, **_) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        if self.config.positions == "learned":
            x = x + self.embed_positions(torch.arange(length, device=x.device))
        elif self.config.positions == "sinusoidal":
            # embeddings start at 0.02: positions of the same size do not drown them
            x = x + 0.02 * self._sinusoids(length, x)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
