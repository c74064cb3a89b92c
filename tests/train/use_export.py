"""Uses an exported folder as its reader would, without this project: logits, tokens and answers.

python -I use_export.py FOLDER CONVERSATIONS.json OUT [FOLDER_OF_PACKAGES]
"""

import json
import sys
from pathlib import Path

# An editable install would find them.
sys.modules["train"] = sys.modules["data"] = None  # type: ignore[assignment]
folder, conversations, out = sys.argv[1:4]
sys.path[:0] = sys.argv[4:]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer  # noqa: E402

NEW = 8

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto").eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
talks = json.loads(Path(conversations).read_text())
tensors, answers = {}, {}


def use(name, messages):
    inputs = processor(messages)
    with torch.no_grad():
        tensors[f"{name}/logits"] = model(**inputs).logits.contiguous()
    tensors[f"{name}/ids"] = inputs["input_ids"]
    tensors[f"{name}/tokens"] = model.generate(**inputs, max_new_tokens=NEW)
    answers[name] = model.chat(messages, sampling=False, max_new_tokens=NEW, temperature=1.0)


for name, talk in talks.items():
    use(name, talk)
use("batch", list(talks.values()))
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
with torch.no_grad():
    for name, talk in talks.items():
        tensors[f"{name}/bf16"] = half(**processor(talk)).logits.contiguous()
answers["drawn"] = model.chat(talks["text"], sampling=True, temperature=0.7, top_p=0.9, max_new_tokens=NEW)
chat = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).apply_chat_template
answers["template"] = chat(talks["turns"], tokenize=False, add_generation_prompt=True)
facts = {"version": transformers.__version__, "answers": json.dumps(answers)}
assert not any(name.startswith(("train.", "data.")) for name in sys.modules)
save_file(tensors, out, metadata=facts)
