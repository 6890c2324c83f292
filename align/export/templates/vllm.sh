{% extends "script.sh" %}
{% from "pieces.sh" import gap_note, guarded, guard, loading, serve, place with context %}
{% block about %}
{% if base %}
vLLM with this adapter, asked for as the model {{ name }}. BASE, a folder or a hub id, puts it on another base than it was trained on. {{ gap_note() }} {{ guarded() }} {{ loading() }}
{% else %}
vLLM with this model, asked for as {{ name }}.
{% if scores %}
It scores conversations: POST /classify {"model": …, "messages": […], "use_activation": false}, by vLLM's documentation; no receipt asked it.
{% endif %}
{{ gap_note() }} {{ guarded() }}
{% endif %}
{% endblock %}
{% block body %}
{{ guard() }}
{%- if base %}
if [ "${RUNTIME_LORA:-}" = yes ]; then
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
else
  unset VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_PLUGINS
fi
{{ place() }}
{%- endif %}
{{ serve() }}
{%- if base %}--lora-modules {{ name | quote }}="$here/.." {% endif %}"$@"
{% endblock %}
