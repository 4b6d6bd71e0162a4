"""Tokens that vLLM makes of texts and of chats, without a model: `vllm_tokens.py FOLDER [TEXTS, CHATS].json OUT.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import renderer_from_config
from vllm.renderers.params import ChatParams


def main() -> None:
    folder, fixed, out = sys.argv[1:]
    texts, chats = json.loads(Path(fixed).read_text("utf-8"))
    renderer = renderer_from_config(EngineArgs(folder, max_model_len=512).create_engine_config())
    prompts = renderer.render_cmpl([{"prompt": text} for text in texts])
    for chat, ask in chats:
        wanted = ChatParams(chat_template_kwargs={"add_generation_prompt": ask})
        prompts += renderer.render_chat([chat], wanted)[1]
    Path(out).write_text(json.dumps([prompt["prompt_token_ids"] for prompt in prompts]), "utf-8")


if __name__ == "__main__":
    main()
