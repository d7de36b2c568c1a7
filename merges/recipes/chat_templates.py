"""Chat templates that a recipe can name, written to the formats that the models were trained on.

    chat_template: chatml

The names are mergekit's. The content of a message is trimmed where the template of the original model trims it.
"""

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{{ '' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{{ '' }}
{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{{ '' }}
{%- endif -%}
"""

MISTRAL = """\
{{- bos_token -}}
{%- set turns = namespace(system='', expected='user') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set turns.system = message['content'] + '\\n\\n' -%}
    {%- elif message['role'] != turns.expected -%}
        {{- raise_exception('after a system message, if any, user and assistant take turns') -}}
    {%- elif message['role'] == 'user' -%}
        {{- ' [INST] ' + turns.system + message['content'] + ' [/INST]' -}}
        {%- set turns.system = '' -%}
        {%- set turns.expected = 'assistant' -%}
    {%- else -%}
        {{- ' ' + message['content'] + eos_token -}}
        {%- set turns.expected = 'user' -%}
    {%- endif -%}
{%- endfor -%}
"""

EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}
[|system|][|endofturn|]
{{ '' }}
{%- endif -%}
{%- for message in messages -%}
[|{{ message['role'] }}|]{{ message['content'] }}{{ '' if message['role'] == 'user' else '[|endofturn|]' }}
{{ '' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
[|assistant|]
{%- endif -%}
"""

ALPACA = """\
{%- set headings = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}
{%- set blocks = namespace(found=[]) -%}
{%- for message in messages -%}
    {%- set content = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {%- set blocks.found = blocks.found + [content] -%}
    {%- elif message['role'] in headings -%}
        {%- set blocks.found = blocks.found + ['### ' + headings[message['role']] + ':\\n' + content] -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
    {%- set blocks.found = blocks.found + ['### Response:\\n'] -%}
{%- endif -%}
{{- blocks.found | join('\\n\\n') -}}
"""

NAMED = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA3, "mistral": MISTRAL}
