"""Tiny models with images, for servers: a checkpoint with a tokenizer and a processor, pictures, and the answers.

``tiny_models`` has the models. Nothing is fetched: the tokenizer is the demo model's, with more tokens for images.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import transformers
from harness import Answer
from PIL import Image
from sglang_shift.models.demo import demo_model_path

# The towers of Qwen take 28 or 32 pixels for a token, so their processors resize no picture. Gemma's resizes all.
SIZES = ((224, 224), (448, 224), (224, 448))  # width and height
QWEN_TOKENS = {
    "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}  # fmt: skip
GEMMA_TOKENS = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
QWEN_PROCESSORS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


class ImageModel:
    """A tiny model with images, and what transformers computes with it.

    Args:
        name: Its name in ``tiny_models``.
        folder: Where to write its checkpoint.

    Attributes:
        flags: Flags of a server that serves it.
        image: What stands for a picture in a prompt.
    """

    def __init__(self, name: str, folder: Path) -> None:
        gemma = name.startswith("gemma")
        tokens = GEMMA_TOKENS if gemma else QWEN_TOKENS
        self.image = GEMMA_TOKENS["boi"] if gemma else "<|vision_start|><|image_pad|><|vision_end|>"
        tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_path())
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
        model = with_tokens(tiny_models.MODELS[name], tokenizer, tokens, "token_index" if gemma else "token_id")
        self.flags = ("--model-path", str(folder), *model.flags)
        tiny_models.write(model, str(folder))
        self.model = tiny_models.build(model)
        self.processor = (gemma_processor if gemma else qwen_processor)(tokenizer, self.model.config)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def answer(self, text: str, pictures: list[Image.Image], count: int) -> Answer:
        """Return the likeliest tokens, also after the end of the answer."""
        inputs = self.processor(text=[text], images=pictures or None, return_tensors="pt")
        output = self.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        logprobs = [float(logits[0].log_softmax(-1).max()) for logits in output.logits]
        return Answer(output.sequences[0, length:].tolist(), logprobs, {"prompt_tokens": length})


def with_tokens(
    model: tiny_models.TinyModel, tokenizer: Any, tokens: dict[str, str], suffix: str
) -> tiny_models.TinyModel:
    """Return the model with the vocabulary of a tokenizer, and with the ids of its tokens for images."""
    text = {**model.fields["text_config"], "vocab_size": len(tokenizer)}
    ids = {f"{place}_{suffix}": tokenizer.convert_tokens_to_ids(token) for place, token in tokens.items()}
    return replace(model, fields={**model.fields, "text_config": text, **ids})


def qwen_processor(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    images = transformers.Qwen2VLImageProcessor(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, min_pixels=3136, max_pixels=1 << 20
    )
    processor, videos = (getattr(transformers, name) for name in QWEN_PROCESSORS[config.model_type])
    return processor(images, tokenizer, videos())


def gemma_processor(tokenizer: Any, config: Any) -> Any:
    for place, token in GEMMA_TOKENS.items():
        setattr(tokenizer, f"{place}_token", token)
        setattr(tokenizer, f"{place}_token_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.init_kwargs[f"{place}_token"] = token  # the file keeps these
    size = config.vision_config.image_size
    images = transformers.Gemma3ImageProcessor(size={"height": size, "width": size})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=config.mm_tokens_per_image)


def picture(number: int) -> Image.Image:
    """Return a random picture of broad stripes and noise."""
    generator = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    stripes = generator.integers(0, 256, (height // 28, 1, 3)).repeat(28, 0).repeat(width, 1)
    noise = generator.integers(-40, 40, (height, width, 3))
    return Image.fromarray((stripes + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> str:
    """Return a picture as a request has it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
