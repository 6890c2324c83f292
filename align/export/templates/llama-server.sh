{% extends "script.sh" %}
{% from "pieces.sh" import gap_note with context %}
{% block about %}
llama.cpp's server with {{ "base and adapter" if adapter else "this model" }}, asked for as {{ name }}. WEIGHTS is that of the {{ stem }}: {{ weights | join(", ") }}.
{% if adapter %}
A request may turn the adapter off: "lora": [{"id": 0, "scale": 0}].
{% endif %}
This server reads special tokens in whatever a content spells out: remove such spellings from text that you do not trust, or send token ids. {{ gap_note() }}
{% endblock %}
{% block body %}
model="$here/../{{ stem }}-${WEIGHTS:-f16}.gguf"
[ -f "$model" ] || { echo "WEIGHTS: $model is not there" >&2; exit 2; }
exec llama-server --model "$model"{% if adapter %} --lora "$here/../{{ adapter }}"{% endif %} \
  --alias {{ name | quote }} --jinja "$@"
{% endblock %}
