{% macro gap_note() %}
{% if gap %}
It was trained on the base in NF4. On the original weights{% if original %}, which are in this export,{% endif %} the adapter is another model: KL {{ "%.2g" % gap.kl }} nats a token from the trained model, the same top token on {{ "{:.0%}".format(gap.top1) }}.
{% endif %}
{% endmacro %}

{% macro guarded() %}
It listens on this machine alone, unless LISTEN names another interface, and VLLM_API_KEY in the environment holds its key, which vLLM asks for under /v1 alone: put a proxy in front of it before LISTEN opens it to others.
{% endmacro %}

{% macro loading() %}
RUNTIME_LORA=yes lets each client with the key load adapters from any folder that vLLM can read.
{% endmacro %}

{# Ends a launch without a key. vLLM reads the key from the environment, where no list of processes shows it. #}
{% macro guard() %}
: "${VLLM_API_KEY:?holds the key that clients have to send: Authorization: Bearer KEY}"
export VLLM_API_KEY
{% endmacro %}

{# Sets `base`. #}
{% macro place() %}
{% if base.folder %}
base=${BASE:-$here/{{ base.folder | quote }}}
[ -n "${BASE:-}" ] || [ -d "$base" ] || { echo "the base is not there; bring it along, or set BASE: $base" >&2; exit 2; }
{% elif base.revision %}
base=${BASE:-{{ base.id | quote }}}
[ -n "${BASE:-}" ] || set -- --revision {{ base.revision | quote }} "$@"
{% else %}{# its id is a name of ours, which a hub may know as something else #}
base=${BASE:?names the folder of the base}
{% endif %}
{% endmacro %}

{% macro serve() %}
exec vllm serve "{{ "$base" if base else "$here/.." }}" --host "${LISTEN:-127.0.0.1}" --served-model-name {{ (base.name if base else name) | quote }} {# -#}
{% if base %}
--enable-lora --max-lora-rank {{ rank }} \
  {%+ elif scores %}
--runner pooling {# -#}
{% endif %}
{% if chat_template %}
--chat-template "$here/{{ chat_template }}" \
  {%+ endif %}
{% endmacro %}
