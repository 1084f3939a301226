"""What live servers of the tests serve, and with what limits."""
import json
import shutil
import tempfile
from pathlib import Path

from qwen_jax.checkpoint.source import SHIPPED

PAGE_BYTES = 262_144  # of the bundled model in float32
# One page less than a sequence may have, so that a request can be larger than the whole cache.
SIZES = ("--max-seq-len", "1024", "--max-batch-size", "8", "--max-requests", "16", "--dtype", "float32",
         "--max-adapters", "2", "--kv-cache-bytes", str(15 * PAGE_BYTES), "--served-model-name", "bundled",
         "--public-adapters", "--adapter-dir", tempfile.gettempdir(), "--response-cache-mb", "0")
# Tools as Qwen2.5's own template has them; without any, it says what the bundled one says.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def model_with_tools(folder: Path) -> Path:
    """The bundled model, whose template knows tools."""
    shutil.copytree(SHIPPED["bundled"], folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder
