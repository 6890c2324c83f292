#!/bin/sh
{% filter comment %}{% block about %}{% endblock %}{% endfilter %}

set -eu
here=$(cd "$(dirname "$0")" && pwd)
{% block body %}{% endblock %}
