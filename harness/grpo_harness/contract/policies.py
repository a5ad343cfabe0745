"""Test policies with features of real ones that the embedded pair lacks."""

import json
import shutil
from pathlib import Path

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
    names = ("tokenizer", "tokenizer_config", "generation_config")
    files = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names}
    tokenizer, begin = files["tokenizer"], "<|im_start|>"
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
    files["tokenizer_config"]["bos_token"] = begin
    ends = [files["generation_config"]["eos_token_id"], tokenizer["model"]["vocab"]["1"]]
    files["generation_config"]["eos_token_id"] = ends
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text, "utf-8")
    return str(folder)
