"""Policies that real ones are like and the embedded pair is not, made on the fly from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from grpo_harness.policy import PolicyName, find


def two_ended(folder: Path) -> str:
    """Make nano-base with a second end token, and a tokenizer that begins every text by itself.

    Instruct models end a turn by one token and a text by another, and many tokenizers put a
    beginning before whatever they are given, also where the chat template has put it there. Here
    the second end is the digit 1, which the policy writes often; the beginning is the token that
    the template begins with. ``folder`` is written anew; returns it as a policy's name.
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
