"""The reference: transformers' model, picture processor and tokenizer over the weights of the model maker.

The only module here that needs torch. Knows nothing of GGUF or the Lookonce library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers  # type: ignore[import-not-found,unused-ignore]
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lookonce.synthetic.shape import Shape
from lookonce.synthetic.template import CHAT_TEMPLATES
from lookonce.synthetic.vocabulary import Vocabulary
from lookonce.synthetic.weight import Weights

__all__ = ["QWEN_SPLIT", "Evaluation", "Reference", "make_fresh_network", "make_network", "make_tokenizer"]

# Qwen2TokenizerFast's own pattern, from tokenizer.json of both families.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROCESSOR = {
    "qwen3vl": {
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "qwen2.5vl": {"size": {"shortest_edge": 3_136, "longest_edge": 12_845_056}, "patch_size": 14},
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one prompt gives: its token ids (one image token a row), logits and every layer's output.

    `logits` is (tokens, vocabulary), each of `layers` (tokens, hidden size), before DeepStack is added.
    """

    tokens: list[int]
    logits: NDArray[np.float32]
    layers: list[NDArray[np.float32]]


class Reference:
    """One model of transformers in F32 on the CPU."""

    def __init__(self, shape: Shape, weights: Weights, vocabulary: Vocabulary) -> None:
        self._shape = shape
        self._image_token = vocabulary.id_of("<|image_pad|>")
        self.tokenizer = make_tokenizer(shape.family, vocabulary)
        self.processor = Qwen2VLImageProcessorPil(**_PROCESSOR[shape.family], resample=Image.Resampling.BICUBIC)
        self.model = make_network(shape, weights, vocabulary)

    def preprocess(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32], tuple[int, int]]:
        """Give a picture's pixels after resizing, its flat patches, and its grid of merged tokens (rows, columns)."""
        made = self.processor(Image.fromarray(picture), return_tensors="np")
        patches = np.asarray(made["pixel_values"], dtype=np.float32)
        _, height, width = (int(n) for n in made["image_grid_thw"][0])
        size, merge = self._shape.vision.patch_size, self._shape.vision.merge_size
        grid = (height // merge, width // merge)
        blocks = patches.reshape(*grid, merge, merge, 3, 2, size, size)[:, :, :, :, :, 0]
        image = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, 3)
        mean, std = np.array(self.processor.image_mean), np.array(self.processor.image_std)
        return np.rint((image * std + mean) * 255).astype(np.uint8), patches, grid

    def look(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give the vision tower's tokens before the projector, and the rows: projected tokens and DeepStack's."""
        made = self.processor(Image.fromarray(picture), return_tensors="pt")
        tower: list[torch.Tensor] = []
        visual = self.model.model.visual
        hook = visual.blocks[-1].register_forward_hook(lambda module, given, result: tower.append(result))
        try:
            with torch.inference_mode():
                seen = self.model.model.get_image_features(
                    made["pixel_values"], made["image_grid_thw"], return_dict=True
                )
        finally:
            hook.remove()
        parts = [torch.cat(list(seen.pooler_output))]
        for features in getattr(seen, "deepstack_features", None) or ():
            parts.append(torch.cat(list(features)) if isinstance(features, (tuple, list)) else features)
        return tower[0].numpy(), torch.cat(parts, dim=-1).numpy()

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Render a conversation through transformers' own template code."""
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def tokenize(self, text: str, pictures: Sequence[NDArray[np.uint8]] = ()) -> list[int]:
        """Split text into ids, each image mark standing for as many tokens as the picture has rows."""
        ids: list[int] = []
        grids = [self.preprocess(picture)[2] for picture in pictures]
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            rows = np.prod(grids.pop(0)) if token == self._image_token and grids else 1
            ids += [token] * int(rows)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Give the text of tokens."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def evaluate(self, tokens: list[int], pictures: Sequence[NDArray[np.uint8]] = ()) -> Evaluation:
        """Run the model once over a whole prompt."""
        layers: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda module, given, result: layers.append(result[0] if isinstance(result, tuple) else result)
            )
            for layer in self.model.model.language_model.layers
        ]
        try:
            with torch.inference_mode():
                logits = self.model(**self._inputs(tokens, pictures), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        return Evaluation(tokens, logits.numpy(), [layer.reshape(len(tokens), -1).numpy() for layer in layers])

    def hidden_states(self, tokens: list[int], pictures: Sequence[NDArray[np.uint8]] = ()) -> list[NDArray[np.float32]]:
        """Give transformers' `hidden_states`, (tokens, hidden size) each: the input, then every layer's output.

        The last is `last_hidden_state`, after the final norm.
        """
        with torch.inference_mode():
            seen = self.model.model(**self._inputs(tokens, pictures), use_cache=False, output_hidden_states=True)
        if not torch.equal(seen.hidden_states[-1], seen.last_hidden_state):
            raise RuntimeError("this transformers gives a last hidden state before the final norm")
        return [states.reshape(len(tokens), -1).numpy() for states in seen.hidden_states]

    @property
    def image_token(self) -> int:
        """Id of the token that stands for one image row."""
        return self._image_token

    def generate(self, tokens: list[int], pictures: Sequence[NDArray[np.uint8]], count: int) -> list[int]:
        """Give the greedy continuation, by transformers' own generation."""
        options = transformers.GenerationConfig(max_new_tokens=count, do_sample=False)
        grown = self.model.generate(**self._inputs(tokens, pictures), generation_config=options)
        return [int(token) for token in grown[0, len(tokens) :]]

    def _inputs(self, tokens: list[int], pictures: Sequence[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            inputs |= self.processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
            inputs["mm_token_type_ids"] = (ids == self._image_token).int()
        return inputs


def make_tokenizer(family: str, vocabulary: Vocabulary) -> transformers.PreTrainedTokenizerFast:
    """Give transformers' tokenizer over a vocabulary, with the family's pre-tokenizer and chat template."""
    added = vocabulary.control | vocabulary.user_defined
    regular = {token: index for index, token in enumerate(vocabulary.tokens) if index not in added | vocabulary.unused}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=regular, merges=list(vocabulary.merges)))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    for index in sorted(added):
        token = tokenizers.AddedToken(vocabulary.tokens[index], special=index in vocabulary.control, normalized=False)
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    made.chat_template = CHAT_TEMPLATES[family]
    return made


def make_network(shape: Shape, weights: Mapping[str, NDArray[np.float32]], vocabulary: Vocabulary) -> Any:
    """Give transformers' model of a shape with those weights, in F32, ready to be evaluated."""
    model = make_fresh_network(shape, vocabulary).eval()
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(weights[name]) for name in weights}, strict=False
    )
    allowed = {"lm_head.weight"} if shape.text.tied else set()
    if set(missing) - allowed or unexpected:
        raise RuntimeError(f"the weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
    if shape.text.tied:
        model.tie_weights()
    return model


def make_fresh_network(shape: Shape, vocabulary: Vocabulary) -> Any:
    """Give transformers' model of a shape in F32, its weights as transformers draws them from torch's generator."""
    text, vision = shape.text, shape.vision
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
    }
    text_config: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "max_position_embeddings": text.context_length,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": text.tied,
    }
    vision_config: dict[str, Any] = {
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.heads,
        "intermediate_size": vision.intermediate_size,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "out_hidden_size": text.hidden_size,
    }
    if shape.family == "qwen3vl":
        rope["mrope_interleaved"] = True
        text_config["head_dim"] = text.head_dim
        vision_config |= {
            "num_position_embeddings": vision.n_positions,
            "deepstack_visual_indexes": list(vision.deepstack),
        }
        config_class, model_class = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    else:
        vision_config |= {
            "fullatt_block_indexes": list(vision.full_attention),
            "window_size": vision.window_size,
        }
        config_class, model_class = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    config = config_class(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=vocabulary.id_of("<|image_pad|>"),
        video_token_id=vocabulary.id_of("<|video_pad|>"),
        vision_start_token_id=vocabulary.id_of("<|vision_start|>"),
        vision_end_token_id=vocabulary.id_of("<|vision_end|>"),
        tie_word_embeddings=text.tied,
    )
    config._attn_implementation = "sdpa"
    return model_class(config).to(torch.float32)
