{% extends "script.sh" %}
{% from "pieces.sh" import gap_note, guarded, guard, loading, serve, place with context %}
{% block about %}
vLLM with all adapters of a folder, each found by its name when it is first asked for. ADAPTERS holds a folder for each, such as ADAPTERS/{{ name }}: a copy of this export, or a link to it. All speak by the chat template of this export. BASE, a folder or a hub id, puts it on another base than it was trained on. {{ gap_note() }} {{ guarded() }} vLLM finds adapters by name only if it also lets clients load them, which has to be allowed: {{ loading() }}
{% endblock %}
{% block body %}
{{ guard() -}}
[ "${RUNTIME_LORA:-}" = yes ] || {
  echo "RUNTIME_LORA: set it to yes to let clients with the key load adapters; vLLM finds none by name without" >&2
  exit 2
}
{{ place() -}}
adapters=$(cd "${ADAPTERS:?names the folder of the adapters}" && pwd)
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_PLUGINS=lora_filesystem_resolver
export VLLM_LORA_RESOLVER_CACHE_DIR="$adapters"
# vLLM takes an adapter only where its adapter_config.json names the base in the very words that vLLM was given: so the
# folder is given by a link of that name, in a folder of its own: paths among the arguments have to be absolute.
if [ -d "$base" ]; then
  base=$(cd "$base" && pwd)
  room=$(mktemp -d)
  mkdir -p "$(dirname "$room"/{{ base.name | quote }})"
  ln -s "$base" "$room"/{{ base.name | quote }}
  cd "$room"
  base={{ base.name | quote }}
fi
{{ serve() }}"$@"
{% endblock %}
