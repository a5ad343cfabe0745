"""The nano pair's tokenizer: fixed segments of the prompt are one token, the rest is characters.

Short sequences let two cores train and sample the pair in minutes. Decoding restores every prompt,
and every completion in printable ASCII, exactly.
"""

from __future__ import annotations

from typing import cast

from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_harness.policy.policy import SYSTEM_MESSAGE

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
PAD_ID, END_ID = 0, 2

# Qwen2's template without its default system message: the caller always sends one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# One token each. If a task type changes its wording, its prompt falls back to characters and
# unknown tokens, and the test that decodes every prompt fails.
_SEGMENTS = (
    f"system\n{SYSTEM_MESSAGE}",
    "user\n",
    "assistant\n",
    "【数学题】计算：",
    *(f" {symbol} " for symbol in ("+", "-", "*", "//")),
    '\n要求：只输出最终结果（整数），不要解释。\nTASK={"type":"math","op":"',
    *(f'{name}","a":' for name in ("add", "sub", "mul", "div")),
    "【编程题】给定 a=",
    "，b=",
    '，输出 gcd(a,b)。\n要求：只输出一个整数，不要解释。\nTASK={"type":"gcd","a":',
    ',"b":',
    "【编程题】对数组进行升序排序：",
    '\n要求：只输出排序后的数字，用空格分隔，不要解释。\nTASK={"type":"sort","arr":',
    "【编程题】判断字符串是否回文：",
    '\n要求：只输出 YES 或 NO，不要解释。\nTASK={"type":"palindrome","s":"',
    "【编程题】把字符串反转：",
    '\n要求：只输出反转后的字符串，不要解释。\nTASK={"type":"reverse","s":"',
    "【编程题】求下面 Python 表达式的值：\n",
    '\n要求：只输出表达式的值，不要解释。\nTASK={"type":"py_eval","expr":"',
    *(f"{name}(" for name in ("len", "abs", "max", "min")),
    "sum([",
    "'[::-1]",
    "'.upper()",
    ", ",
    '"}',
)


SPOKEN = 134
"""The number of tokens, from id 0, that prompts and ASCII completions consist of."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer: Qwen2's own, with bytes as its vocabulary and the segments on top.

    It is Qwen2's class because transformers gives every Qwen2 checkpoint that class, whatever the
    checkpoint says. The bytes that occur only in non-ASCII text come last.
    """
    byte_characters = bytes_to_unicode()
    ascii_bytes = [*b"\n", *sorted(set(range(33, 127)), key=chr), *b" "]
    other_bytes = [byte for byte in byte_characters if byte not in {*ascii_bytes, *b"\t"}]
    pieces = sorted(_SEGMENTS, key=len, reverse=True)
    tokens = [
        *(PAD, START, END),
        byte_characters[ord("\t")],
        *pieces,
        *(byte_characters[byte] for byte in ascii_bytes),
        *(byte_characters[byte] for byte in sorted(other_bytes)),
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token=cast("str", None),  # bytes leave nothing unknown
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer
