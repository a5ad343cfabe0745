"""Test policies with features of real ones that the embedded pair lacks."""

import json
import shutil
from pathlib import Path
from typing import Any

from grpo_harness.policy import PolicyName, find


def two_ended(folder: Path) -> str:
    """Make nano-base with a second end token, and a tokenizer that adds a begin token.

    Many instruct models end a turn and a text by different tokens, and many tokenizers add a begin
    token to every text, even if the chat template has already added it. Here the second end token
    is the digit 1, which the policy writes often; the begin token is the first token of the
    template. ``folder`` is replaced; its path is returned as the policy's name.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(find(PolicyName("nano-base")).path, folder)
    tokenizer = _read(folder / "tokenizer.json")
    vocabulary, begin = tokenizer["model"]["vocab"], "<|im_start|>"
    (begin_id,) = (t["id"] for t in tokenizer["added_tokens"] if t["content"] == begin)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": begin, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {begin: {"id": begin, "ids": [begin_id], "tokens": [begin]}},
    }
    _write(folder / "tokenizer.json", tokenizer)
    config = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", {**config, "bos_token": begin})
    generation = _read(folder / "generation_config.json")
    ends = [generation["eos_token_id"], vocabulary["1"]]
    _write(folder / "generation_config.json", {**generation, "eos_token_id": ends})
    return str(folder)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
