{% extends "script.sh" %}
{% block about %}
align's own server with {{ "this adapter" if base else "this model" }}, asked for as {{ name }}: OpenAI's API on a CPU, with keys and limits for tenants (stage.keys=FILE). align's docs/deploying.md has containers and larger machines.
{% if scores %}
It scores conversations: POST /v1/rewards.
{% endif %}
{% if unnamed_base %}
BASE is the folder of {{ base.id }}, as it was trained on.
{% endif %}
{% endblock %}
{% block body %}
folder=$(cd "$here/.." && pwd)
exec python -m align stage=serve "stage.adapters={{ "{" }}{{ name }}: {{ "'$folder'" if base else "base" }}}"
{%- if not base %} model=hub "model.path=$folder"
{%- elif unnamed_base %} model=hub "model.path=${BASE:?names the folder of the base that it was trained on}"
{%- endif %} "$@"
{% endblock %}
